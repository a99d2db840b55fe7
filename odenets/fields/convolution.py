"""Two convolutions as a velocity field of images: the branch of a pre-activation residual block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.fields.activations import make_activation
from odenets.fields.sizes import check_odd, check_sizes
from odenets.fields.time_input import time_like
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["ConvField"]


class ConvField(VelocityField):
    """The branch of a pre-activation residual block: norm-act-conv3x3-norm-act-conv3x3 (He et al. 2016).

    Args:
        channels: channels of x.
        hidden: channels between the convolutions; ``channels`` if not given.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None.
        activation: "relu", "silu", "gelu", "tanh" or "relu6".
        time: whether t is an input, as a constant channel of both convolutions.
        kernel_size: odd size of the convolutions.
        bias: whether the convolutions have one.
        leading: whether the first norm and activation are there; a block right behind its encoder may do without.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an even kernel_size, or an unknown activation or norm.

    >>> field = ConvField(16, norm="batch")
    >>> field(0.0, torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        *,
        norm: str | None = "group",
        activation: str = "relu",
        time: bool = False,
        kernel_size: int = 3,
        bias: bool = False,
        leading: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, hidden=hidden)
        check_odd(kernel_size)
        hidden = hidden or channels
        self.time = time
        self.leading = leading
        self.norm1 = make_norm(norm if leading else None, channels)
        self.conv1 = nn.Conv2d(channels + time, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm2 = make_norm(norm, hidden)
        self.conv2 = nn.Conv2d(hidden + time, channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)`` and time ``t``, of the shape of x; ``stage`` is for the norms."""
        x = self.conv1(self._with_time(t, self.activation(self.norm1(x, stage)) if self.leading else x))
        return self.conv2(self._with_time(t, self.activation(self.norm2(x, stage))))

    def _with_time(self, t: float | Tensor, x: Tensor) -> Tensor:
        return torch.cat([x, time_like(t, x[:, :1])], 1) if self.time else x
