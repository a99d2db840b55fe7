"""Normalize: pixels to zero mean and unit deviation, inside the model."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, inside the model, so that a model always takes raw pixels in [0, 1].

    Args:
        mean, std: one number per channel, dimension 1 of the input.

    Raises:
        ValueError: not as many means as deviations, or one that is not finite or a deviation that is not positive.

    >>> import torch
    >>> Normalize([0.5], [0.25])(torch.full((1, 1, 2, 2), 0.75)).unique()
    tensor([1.])
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std) or not all(map(math.isfinite, (*mean, *std))):
            raise ValueError(f"mean and std need one finite entry per channel and std > 0, got {mean} and {std}")
        self.mean, self.std = list(mean), list(std)

    def forward(self, x):
        """The normalized images ``x`` ``(B, C, ...)``, of the shape of x.

        Raises:
            TypeError: x is not floating: in whole numbers mean and deviation would be 0.
            ValueError: x has another number of channels.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must hold floating pixels in [0, 1], got {x.dtype}; convert bytes with x.float() / 255")
        if x.shape[1] != len(self.mean):
            raise ValueError(f"x must have {len(self.mean)} channels, as mean and std, got shape {tuple(x.shape)}")
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - x.new_tensor(self.mean).reshape(shape)) / x.new_tensor(self.std).reshape(shape)

    def extra_repr(self) -> str:
        """Mean and deviation, as ``print`` shows them."""
        return f"mean={self.mean}, std={self.std}"
