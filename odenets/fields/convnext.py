"""The block of ConvNeXt as a velocity field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.errors import check_number
from odenets.fields.activations import make_activation
from odenets.fields.feature_norm import FeatureNorm
from odenets.fields.sizes import check_odd, check_sizes
from odenets.fields.velocity_field import VelocityField

__all__ = ["ConvNeXtField", "LayerScale"]


class LayerScale(nn.Module):
    """A learned number per channel by which a branch is multiplied (Touvron et al. 2021).

    Args:
        channels: channels of x.
        value: the number that all begin with.

    References:
        Touvron, Cord, Sablayrolles, Synnaeve, Jegou. Going deeper with image transformers. arXiv:2103.17239 (2021).

    >>> LayerScale(3, 0.5)(torch.ones(1, 3, 1, 1)).flatten()
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<ViewBackward0>)
    """

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every number to that which it begins with."""
        nn.init.constant_(self.scale, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """The scaled ``x``, ``(B, C, H, W)``."""
        return x * self.scale


class ConvNeXtField(VelocityField):
    """The branch of a ConvNeXt block (Liu et al. 2022): ``v = g W2 act(W1 norm(K x) + b1) + g b2``.

    K is a depthwise convolution with a bias, norm is over the channels of each place, W1 and W2 act on these channels,
    and g is a number per channel.

    Args:
        channels: channels of x.
        expansion: channels between W1 and W2 over those of x.
        norm: "layer", over the channels of each place, "group", "batch" (own statistics per stage where stages share
            the field) or None.
        activation: "gelu", "relu", "silu", "tanh" or "relu6".
        kernel_size: odd size of the depthwise convolution.
        scale: that with which g begins; None for a field without it.

    Raises:
        TypeError: a size that is no whole number, or a scale that is no number.
        ValueError: a size below 1, an even kernel_size, or an unknown activation or norm.

    References:
        Liu, Mao, Wu, Feichtenhofer, Darrell, Xie. A ConvNet for the 2020s. arXiv:2201.03545 (2022).

    >>> field = ConvNeXtField(8)
    >>> field(0.0, torch.randn(2, 8, 8, 8)).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 4,
        *,
        norm: str | None = "layer",
        activation: str = "gelu",
        kernel_size: int = 7,
        scale: float | None = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, expansion=expansion)
        check_odd(kernel_size)
        self.scale = nn.Identity() if scale is None else LayerScale(channels, check_number("scale", scale))
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = FeatureNorm(norm, channels)
        self.first = nn.Linear(channels, expansion * channels)
        self.second = nn.Linear(expansion * channels, channels)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape; ``t`` is not read, ``stage`` is for the norm."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1), stage)
        return self.scale(self.second(self.activation(self.first(y))).permute(0, 3, 1, 2))
