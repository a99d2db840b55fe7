"""The residual block of two convolutions with its activation behind the sum, as a velocity field."""

from __future__ import annotations

from torch import Tensor, nn

from odenets.fields.activations import make_activation
from odenets.fields.sizes import check_odd, check_sizes
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["BasicField"]


class BasicField(VelocityField):
    """The basic block of He et al. (2015), whose activation stands behind the sum: ``v(x) = act(x + F(x)) - x``.

    F is conv3x3-norm-act-conv3x3-norm, so that an Euler step of h = 1 is the block, ``act(x + F(x))``. The block with
    its activations before the convolutions (He et al. 2016) is
    :class:`~odenets.ConvField`.

    Args:
        channels: channels of x.
        hidden: channels between the convolutions; ``channels`` if not given.
        norm: "batch" (own statistics per stage where stages share the field), "group", "layer" or None.
        activation: "relu", "silu", "gelu", "tanh" or "relu6".
        kernel_size: odd size of the convolutions.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an even kernel_size, or an unknown activation or norm.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition. arXiv:1512.03385 (2015).

    >>> import torch
    >>> field = BasicField(8)
    >>> x = torch.randn(2, 8, 4, 4)
    >>> bool((x + field(0.0, x) > -1e-6).all())
    True
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        *,
        norm: str | None = "batch",
        activation: str = "relu",
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, hidden=hidden)
        check_odd(kernel_size)
        hidden = hidden or channels
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm1 = make_norm(norm, hidden)
        self.conv2 = nn.Conv2d(hidden, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm2 = make_norm(norm, channels)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape; ``t`` is not read, ``stage`` is for the norms."""
        y = self.activation(self.norm1(self.conv1(x), stage))
        return self.activation(x + self.norm2(self.conv2(y), stage)) - x
