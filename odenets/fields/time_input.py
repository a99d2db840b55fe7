"""The time as an input of a field."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["time_like"]


def time_like(t: float | Tensor, x: Tensor) -> Tensor:
    """The time ``t`` in the shape, dtype and device of ``x``.

    >>> time_like(0.5, torch.zeros(2, 1))
    tensor([[0.5000],
            [0.5000]])
    """
    return t.to(x).expand_as(x) if isinstance(t, Tensor) else torch.full_like(x, t)
