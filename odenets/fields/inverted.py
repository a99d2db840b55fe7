"""The inverted residual block of MobileNetV2, with squeeze and excitation that of EfficientNet, as a velocity field."""

from __future__ import annotations

from torch import Tensor, nn

from odenets.fields.activations import make_activation
from odenets.fields.sizes import check_odd, check_sizes
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["InvertedField"]


class InvertedField(VelocityField):
    """The branch of an inverted residual block with a linear bottleneck (MBConv; Sandler et al. 2018).

    conv1x1-norm-act to ``expansion`` times the channels, depthwise conv-norm-act, conv1x1-norm back. There is no first
    convolution where the expansion is 1. With ``squeeze`` each expanded channel is multiplied by a number in [0, 1],
    ``sigmoid(W2 silu(W1 m + b1) + b2)`` of the means m over places (Hu et al. 2018), as in EfficientNet (Tan and Le
    2019; there with "silu").

    Args:
        channels: channels of x.
        expansion: expanded channels over channels.
        norm: "batch" (own statistics per stage where stages share the field), "group", "layer" or None.
        activation: "relu6", "silu", "relu", "gelu" or "tanh".
        kernel_size: odd size of the depthwise convolution.
        squeeze: channels between W1 and W2, a quarter of ``channels`` in EfficientNet; without it if not given.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an even kernel_size, or an unknown activation or norm.

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: inverted residuals and linear bottlenecks. arXiv:1801.04381
        (2018). Hu, Shen, Sun. Squeeze-and-excitation networks. arXiv:1709.01507 (2018). Tan, Le. EfficientNet.
        arXiv:1905.11946 (2019).

    >>> import torch
    >>> field = InvertedField(8, activation="silu", squeeze=2)
    >>> field(0.0, torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 6,
        *,
        norm: str | None = "batch",
        activation: str = "relu6",
        kernel_size: int = 3,
        squeeze: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, expansion=expansion, squeeze=squeeze)
        check_odd(kernel_size)
        wide = expansion * channels
        self.expand = nn.Conv2d(channels, wide, 1, bias=False) if expansion > 1 else None
        self.norm1 = make_norm(norm if expansion > 1 else None, wide)
        self.depthwise = nn.Conv2d(wide, wide, kernel_size, padding=kernel_size // 2, groups=wide, bias=False)
        self.norm2 = make_norm(norm, wide)
        self.excitation = None if squeeze is None else _excitation(wide, squeeze)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm3 = make_norm(norm, channels)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape; ``t`` is not read, ``stage`` is for the norms."""
        if self.expand is not None:
            x = self.activation(self.norm1(self.expand(x), stage))
        x = self.activation(self.norm2(self.depthwise(x), stage))
        if self.excitation is not None:
            x = x * self.excitation(x.mean((2, 3), keepdim=True))
        return self.norm3(self.project(x), stage)


def _excitation(channels: int, squeeze: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, squeeze, 1), nn.SiLU(), nn.Conv2d(squeeze, channels, 1), nn.Sigmoid())
