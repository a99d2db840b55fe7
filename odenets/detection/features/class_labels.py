"""Labels of training images, by whose classes features take statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["class_labels"]


def class_labels(x: Tensor, y: Any, fewest: int = 1) -> np.ndarray:
    """The labels ``y`` of images ``x`` ``(N, C, H, W)``, ``(N,)`` int64, if every class has the ``fewest`` or more.

    Raises:
        TypeError: they are no tensor.
        ValueError: they are not one integer for each image, or negative, as what has no label often is; or a class
            from 0 to the last has fewer images.

    >>> class_labels(torch.zeros(3, 1, 8, 8), torch.tensor([0, -1, 1]))
    Traceback (most recent call last):
        ...
    ValueError: y must hold labels 0, 1, ..., got -1
    """
    rule = f"y must hold one integer label for each of {len(x)} images"
    if not isinstance(y, Tensor):
        raise TypeError(f"{rule}, in a tensor (N,), got {type(y).__name__}")
    if len(x) == 0 or y.shape != (len(x),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{rule}, got {y.dtype} of shape {tuple(y.shape)}")
    labels = y.cpu().long().numpy()
    if labels.min() < 0:
        raise ValueError(f"y must hold labels 0, 1, ..., got {labels.min()}")
    if few := np.flatnonzero(np.bincount(labels) < fewest).tolist():
        much, less = ("", "no image") if fewest == 1 else (f"{fewest} images of ", "fewer")
        raise ValueError(f"y must hold {much}every class from 0 to {labels.max()}, got {less} of {few}")
    return labels
