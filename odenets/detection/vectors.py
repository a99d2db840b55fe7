"""Scores and p-values as arrays of numbers, one for each image."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["vector"]


def vector(name: str, values: Any, what: str = "scores") -> np.ndarray:
    """The values of an argument of this ``name``, ``(N,)`` float64: arrays, lists, or tensors without gradients.

    Raises:
        TypeError: they are no real numbers, or a tensor with gradients or on a GPU.
        ValueError: they have another shape.

    >>> vector("scores", [0.5, 2]), vector("scores", 3.0)
    Traceback (most recent call last):
        ...
    ValueError: scores must hold scores (N,), got shape ()
    """
    rule = f"{name} must hold {what} (N,)"
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex")
        array = np.asarray(values, dtype=float)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{rule}, one array of numbers, got {type(values).__name__} ({error})") from error
    if array.ndim != 1:
        raise ValueError(f"{rule}, got shape {array.shape}")
    return array
