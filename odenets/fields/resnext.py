"""The branch of a ResNeXt block as a velocity field of images, not negative."""

from __future__ import annotations

from torch import Tensor, nn

from odenets.fields.sizes import check_divides, check_sizes
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["ResNeXtField"]


class ResNeXtField(VelocityField):
    """The branch of a ResNeXt block with a ReLU behind it (Xie et al. 2017; published code of [K24]).

    conv1x1-norm-ReLU, grouped conv3x3-norm-ReLU, conv1x1-norm-ReLU: velocities are not negative, so that for a state
    that is not negative ``x + r`` is what the block's last ReLU would give.

    Args:
        channels: channels of x.
        hidden: channels of the grouped convolution.
        groups: its groups.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an unknown norm, or groups that do not divide hidden.

    >>> import torch
    >>> field = ResNeXtField(64, hidden=32, groups=8)
    >>> bool((field(0.0, torch.randn(2, 64, 8, 8)) >= 0).all())
    True
    """

    def __init__(self, channels: int, hidden: int, groups: int = 32, *, norm: str | None = "batch") -> None:
        super().__init__()
        check_sizes(channels=channels)
        check_divides(groups=groups, hidden=hidden)
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = make_norm(norm, hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.norm2 = make_norm(norm, hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = make_norm(norm, channels)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, C, H, W)``, of its shape, not negative; ``t`` is not read, ``stage`` is for norms."""
        x = self.norm1(self.conv1(x), stage).relu()
        x = self.norm2(self.conv2(x), stage).relu()
        return self.norm3(self.conv3(x), stage).relu()
