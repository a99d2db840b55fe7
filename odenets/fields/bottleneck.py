"""The bottleneck block, of ResNet-50 and of ResNeXt, as a velocity field."""

from __future__ import annotations

from torch import Tensor, nn

from odenets.fields.activations import make_activation
from odenets.fields.sizes import check_divides, check_sizes
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["BottleneckField"]


class BottleneckField(VelocityField):
    """The bottleneck block 1x1-3x3-1x1 of He et al. (2015), with groups that of ResNeXt (Xie et al. 2017).

    With the activation behind the sum ``v(x) = act(x + F(x)) - x`` with F of conv1x1-norm-act, conv3x3-norm-act and
    conv1x1-norm, so that an Euler step of h = 1 is the block. Without it ``v = F(x)`` of norm-act-conv1x1,
    norm-act-conv3x3 and norm-act-conv1x1, the branch of He et al. (2016).

    Args:
        channels: channels of x.
        hidden: channels of the 3x3 convolution; a quarter of ``channels``, at least 1, if not given.
        groups: its groups.
        norm: "batch" (own statistics per stage where stages share the field), "group", "layer" or None.
        activation: "relu", "silu", "gelu", "tanh" or "relu6".
        post_activation: whether activations stand behind the convolutions, and the last one behind the sum.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, groups that do not divide hidden, or an unknown activation or norm.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition. arXiv:1512.03385 (2015); Identity mappings in
        deep residual networks. arXiv:1603.05027 (2016). Xie, Girshick, Dollar, Tu, He. Aggregated residual
        transformations for deep neural networks. arXiv:1611.05431 (2017).

    >>> import torch
    >>> field = BottleneckField(64, 16, groups=4)
    >>> field(0.0, torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        groups: int = 1,
        *,
        norm: str | None = "batch",
        activation: str = "relu",
        post_activation: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, hidden=hidden)
        hidden = hidden or max(1, channels // 4)
        check_divides(groups=groups, hidden=hidden)
        self.post_activation = post_activation
        normed = (hidden, hidden, channels) if post_activation else (channels, hidden, hidden)
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = make_norm(norm, normed[0])
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm2 = make_norm(norm, normed[1])
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = make_norm(norm, normed[2])
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape; ``t`` is not read, ``stage`` is for the norms."""
        act = self.activation
        if not self.post_activation:
            x = self.conv1(act(self.norm1(x, stage)))
            x = self.conv2(act(self.norm2(x, stage)))
            return self.conv3(act(self.norm3(x, stage)))
        y = act(self.norm1(self.conv1(x), stage))
        y = act(self.norm2(self.conv2(y), stage))
        return act(x + self.norm3(self.conv3(y), stage)) - x
