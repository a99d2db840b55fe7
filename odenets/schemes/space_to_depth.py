"""Layers between and before reversible flows that lose nothing: space to depth, and channels of zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.errors import check_count

__all__ = ["InjectivePadding", "SpaceToDepth"]


class SpaceToDepth(nn.Module):
    """A bijective downsampling: squares of pixels become channels, ``(B, C, H, W)`` to ``(B, f^2 C, H / f, W / f)``.

    Channel ``c f^2 + i f + j`` holds the pixels of row i and column j of the squares of channel c, so that halves of
    the channels stay halves. A transition between flows of a reversible network, whose ``inverse`` undoes it.
    Reference: Jacobsen, Smeulders, Oyallon. i-RevNet. ICLR 2018, arXiv:1802.07088.

    Args:
        factor: f.

    Raises:
        TypeError, ValueError: a factor that is no whole number or below 1.

    >>> layer, x = SpaceToDepth(), torch.randn(2, 3, 8, 8)
    >>> layer(x).shape, torch.equal(layer.inverse(layer(x)), x)
    (torch.Size([2, 12, 4, 4]), True)
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_count("factor", factor, 1)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The squares of ``x`` as channels.

        Raises:
            ValueError: x is no batch of images whose sides the factor divides.
        """
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be (B, C, H, W) with sides that {self.factor} divides, got {tuple(x.shape)}")
        return nn.functional.pixel_unshuffle(x, self.factor)

    def inverse(self, x: Tensor) -> Tensor:
        """The images whose squares are the channels of ``x``.

        Raises:
            ValueError: x is no batch of such.
        """
        if x.ndim != 4 or x.shape[1] % self.factor**2:
            raise ValueError(f"x must be (B, C, H, W), C a multiple of {self.factor**2}, got {tuple(x.shape)}")
        return nn.functional.pixel_shuffle(x, self.factor)

    def extra_repr(self) -> str:
        """The factor, as ``print`` shows it."""
        return str(self.factor)


class InjectivePadding(nn.Module):
    """Channels of zeros behind those of an input, ``(B, C, ...)`` to ``(B, channels, ...)``, which ``inverse`` drops.

    An encoder of a reversible network that loses nothing.
    Reference: Jacobsen, Smeulders, Oyallon. i-RevNet. ICLR 2018, arXiv:1802.07088.

    Args:
        inputs: channels C of an input.
        channels: of the output.

    Raises:
        TypeError, ValueError: numbers that are not whole or below 1, or fewer channels than inputs.

    >>> InjectivePadding(3, 4)(torch.ones(1, 3, 1, 1)).flatten()
    tensor([1., 1., 1., 0.])
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        check_count("inputs", inputs, 1)
        check_count("channels", channels, inputs)
        self.inputs, self.channels = inputs, channels

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and zeros.

        Raises:
            ValueError: x has another number of channels.
        """
        if x.ndim < 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x must have {self.inputs} channels, (B, {self.inputs}, ...), got {tuple(x.shape)}")
        return torch.cat([x, x.new_zeros(len(x), self.channels - self.inputs, *x.shape[2:])], 1)

    def inverse(self, x: Tensor) -> Tensor:
        """The channels of ``x`` that are an input's.

        Raises:
            ValueError: x has another number of channels.
        """
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, (B, {self.channels}, ...), got {tuple(x.shape)}")
        return x[:, : self.inputs]

    def extra_repr(self) -> str:
        """The numbers of channels, as ``print`` shows them."""
        return f"{self.inputs}, {self.channels}"
