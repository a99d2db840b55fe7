"""Detectors on disk: archives of known types, of which nothing runs code of the file, with trees that are checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from odenets.detection import features
from odenets.detection.detector import Detector
from odenets.detection.one_class import OneClassGaussian
from odenets.detection.quantile import QuantileTest
from odenets.errors import needs
from odenets.files import write_atomically

__all__ = ["read", "stored_shape", "trusted_types", "write"]


@cache
def _tree_type() -> type:
    """scikit-learn's type of fitted decision trees, which has no public name."""
    with needs("detection"):
        from sklearn.tree import DecisionTreeClassifier

    return type(DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1]).tree_)


def trusted_types() -> list[str]:
    """Types that a file may hold besides those that skops trusts: numbers, arrays, scikit-learn's estimators."""
    kinds = (getattr(features, name) for name in features.__all__)
    types = (Detector, OneClassGaussian, QuantileTest, *kinds, _tree_type())
    return [f"{each.__module__}.{each.__qualname__}" for each in types]


def write(path: Path, content: dict[str, Any]) -> None:
    """Write an archive, atomically, without pickle."""
    io = _skops()
    write_atomically(path, lambda partial: io.dump(content, partial))


def read(path: Path, trusted: Sequence[str] = (), writer: str = "Pipeline.save") -> dict[str, Any]:
    """Read an archive.

    Args:
        path: of the file.
        trusted: dotted names of further types that it may hold, such as another classifier's.
        writer: what writes such files, for errors.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: skops is not installed.
        ValueError: a file of another kind, of another version or damaged, one that holds types that are not trusted,
            none of which is constructed, or trees that lead out of themselves.
    """
    io = _skops()
    if not path.is_file():
        raise FileNotFoundError(f"no detector at {path}")
    trusted = [*trusted_types(), *trusted]
    try:
        unknown = sorted(set(io.get_untrusted_types(file=path)) - {*trusted})
    except Exception as error:  # whatever a foreign file does to the reader
        raise ValueError(f"{path} holds no detector: it was not written by {writer} ({error})") from error
    names = ", ".join(unknown)
    if unknown and all(name.startswith("odenets.") for name in unknown):
        rule = "was written by another version of odenets, with types that this one does not load"
        raise ValueError(f"{path} {rule}: {names}; fit it again and save it")
    if unknown:
        raise ValueError(
            f"{path} holds types that are not trusted, so nothing of it was loaded: {names}; "
            f"trusted={unknown} loads them"
        )
    try:
        content = io.load(path, trusted=trusted)
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no detector: it was not written by {writer}")
    for tree, columns in _trees(content):
        if not _is_sound(tree, columns):
            raise ValueError(f"{path} is damaged: it holds a tree whose branches lead out of it or of its features")
    return content


def stored_shape(shape: Any, path: Path) -> tuple[int, ...] | None:
    """The ``shape`` of an image, as the file at ``path`` holds it, ``(C, H, W)`` or None.

    Raises:
        ValueError: it is none.
    """
    if shape is None:
        return None
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{path} is damaged: the shape of an image must be (C, H, W), got {shape!r}")
    return tuple(shape)


def _skops() -> Any:
    with needs("detection"):
        import skops.io
    return skops.io


def _trees(value: Any, columns: Any = None) -> Iterator[tuple[Any, Any]]:
    """The decision trees in it, which predict without checks, and the numbers of features of their estimators."""
    if isinstance(value, _tree_type()):
        yield value, columns
    elif isinstance(value, dict):
        for part in value.values():
            yield from _trees(part, columns)
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        for part in value:
            yield from _trees(part, columns)
    elif hasattr(value, "__dict__"):
        yield from _trees(vars(value), getattr(value, "n_features_in_", None))


def _is_sound(tree: Any, columns: Any) -> bool:
    """Whether every branch leads to a later node of the tree, by a feature that there is."""
    if tree.n_features != columns:
        return False
    nodes = np.arange(tree.node_count)
    branches = tree.children_left != -1
    for children in (tree.children_left, tree.children_right):
        inside = (children > nodes) & (children < tree.node_count)
        if (inside != branches).any():
            return False
    return bool(((tree.feature >= 0) & (tree.feature < tree.n_features))[branches].all())
