"""Normalize: pixels to zero mean and unit deviation, inside the model."""

from __future__ import annotations

from torch import nn

__all__ = ["Normalize"]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, inside the model, so that a model always takes raw pixels in [0, 1].

    Args:
        mean, std: one number per channel, dimension 1 of the input.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need one entry per channel and std > 0, got {mean} and {std}")
        self.mean, self.std = list(mean), list(std)

    def forward(self, x):
        """Normalise ``x`` ``(B, C, ...)``."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - x.new_tensor(self.mean).reshape(shape)) / x.new_tensor(self.std).reshape(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"
