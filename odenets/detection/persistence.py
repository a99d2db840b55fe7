"""Detectors on disk: archives of known types, none of which runs code of the file, with trees that are looked over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.tree._tree import Tree

from odenets.files import write_atomically

__all__ = ["TRUSTED", "read", "write"]

TRUSTED = (
    "odenets.detection.detector.Detector",
    "odenets.detection.features.trajectory.Trajectory",
    "odenets.detection.features.fourier.FourierSpectrum",
    "odenets.detection.features.lid.LID",
    "odenets.detection.features.mahalanobis.Mahalanobis",
    "odenets.detection.quantile.QuantileTest",
    "odenets.detection.features.natural_scenes.SceneStatistics",
    "sklearn.tree._tree.Tree",
)
"""Types that a file may hold besides those that skops trusts: numbers, arrays, scikit-learn's estimators."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Write an archive, atomically, without pickle.

    Raises:
        ModuleNotFoundError: skops is not installed.
    """
    io = _skops()
    write_atomically(path, lambda partial: io.dump(content, partial))


def read(path: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Read an archive.

    Args:
        path: of the file.
        trusted: dotted names of further types that it may hold.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: skops is not installed.
        ValueError: a file of another kind or damaged, one that holds types that are not trusted, none of which is made,
            or trees that lead out of themselves.
    """
    io = _skops()
    if not path.is_file():
        raise FileNotFoundError(f"no detector at {path}")
    try:
        unknown = sorted(set(io.get_untrusted_types(file=path)) - {*TRUSTED, *trusted})
    except Exception as error:  # whatever a foreign file makes of the reader
        raise ValueError(f"{path} holds no detector: it was not written by Pipeline.save ({error})") from error
    if unknown:
        raise ValueError(f"{path} holds types that are not trusted, so nothing of it was loaded: {', '.join(unknown)}")
    try:
        content = io.load(path, trusted=[*TRUSTED, *trusted])
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no detector: it was not written by Pipeline.save")
    for tree, columns in _trees(content):
        if not _is_sound(tree, columns):
            raise ValueError(f"{path} is damaged: it holds a tree whose branches lead out of it or of its features")
    return content


def _skops() -> Any:
    try:
        import skops.io
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("detectors are saved by skops: pip install odenets[detection]") from error
    return skops.io


def _trees(value: Any, columns: Any = None) -> Iterator[tuple[Tree, Any]]:
    """The decision trees anywhere in it, which read arrays without checks when they predict, each with the number of
    features that its estimator asks for.
    """
    if isinstance(value, Tree):
        yield value, columns
    elif isinstance(value, dict):
        for part in value.values():
            yield from _trees(part, columns)
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        for part in value:
            yield from _trees(part, columns)
    elif hasattr(value, "__dict__"):
        yield from _trees(vars(value), getattr(value, "n_features_in_", None))


def _is_sound(tree: Tree, columns: Any) -> bool:
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
