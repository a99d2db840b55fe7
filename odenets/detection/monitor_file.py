"""Monitors on disk: what their files hold, and whether it is sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odenets.detection.persistence import read, stored_shape

__all__ = ["read_monitor"]

CONTENT = {"network", "features", "detector", "settings", "calibration", "shape"}


def read_monitor(path: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """What ``Monitor.save`` wrote: parts by name, of which scores are sorted ``(n,)`` and the shape is a tuple or None.

    Args:
        path: of the file.
        trusted: dotted names of further types that it may hold.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as :func:`odenets.detection.persistence.read`.
        ValueError: likewise; or a file of another kind, or damaged.
    """
    content = read(path, trusted, "Monitor.save")
    if set(content) != CONTENT:
        raise ValueError(f"{path} holds no monitor: it was not written by Monitor.save")
    try:
        scores = np.sort(np.asarray(content["calibration"], dtype=float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{path} is damaged: its calibration scores are no finite numbers (n,)")
    return content | {"calibration": scores, "shape": stored_shape(content["shape"], path)}
