"""Training images and their labels, of which features take statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from odenets.detection.features.base import check_data, check_images
from odenets.detection.features.feature_maps import check_positional

__all__ = ["check_training", "training_labels"]


def check_training(x: Any, *, normalized: bool = False) -> None:
    """That ``x`` is a tensor of training inputs; where it is one of images ``(N, C, H, W)``, as :func:`check_images`.

    Raises:
        TypeError, ValueError: it is not; or inputs by keyword.
    """
    check_positional(x)
    if not isinstance(x, Tensor) or x.ndim == 4:
        check_images(x, "x", normalized=normalized)
        return
    check_data(x, "x")
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")


def training_labels(x: Tensor, y: Any, fewest: int = 1) -> np.ndarray:
    """Labels ``y`` of training inputs ``x``, ``(N,)`` int64, if every class has so many.

    Raises:
        TypeError: no tensor.
        ValueError: not one whole number 0, 1, ... for each input, or a class with fewer.

    >>> training_labels(torch.rand(3, 2), torch.tensor([1, 0, 3]))
    Traceback (most recent call last):
        ...
    ValueError: y must hold every class from 0 to 3, got no image of [2]
    """
    if not isinstance(y, Tensor):
        remedy = "" if y is None else ": torch.as_tensor(y)"
        raise TypeError(f"y must be a tensor of integer labels (N,), got {type(y).__name__}{remedy}")
    if len(x) == 0 or y.shape != (len(x),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = f"{y.dtype} of shape {tuple(y.shape)}"
        raise ValueError(f"y must hold one integer label for each of {len(x)} images, got {got}")
    labels = y.cpu().long().numpy()
    if labels.min() < 0:
        raise ValueError(f"y must hold labels 0, 1, ..., got {labels.min()}")
    if len(few := np.flatnonzero(np.bincount(labels) < fewest)):
        every, none = ("every class", "no image") if fewest == 1 else (f"{fewest} images of every class", "fewer")
        some = ", ".join(map(str, few[:5])) + (", ..." if len(few) > 5 else "")
        raise ValueError(f"y must hold {every} from 0 to {labels.max()}, got {none} of [{some}]")
    return labels
