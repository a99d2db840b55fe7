"""Residual blocks that change the shape of the state, which no step does: encoders end in one, transitions are one."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["BottleneckProjection", "InvertedProjection", "PreactivatedProjection", "convolution", "inverted"]


def convolution(channels: int, out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without a bias that keeps height and width, but for its ``stride``.

    >>> convolution(3, 8, 1).weight.shape
    torch.Size([8, 3, 1, 1])
    """
    return nn.Conv2d(channels, out, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False)


class BottleneckProjection(nn.Module):
    """``relu(P x + F(x))``, F a bottleneck of stride 2 in its 3x3 convolution, P a 1x1 convolution with batch norm.

    Args:
        channels: channels of x.
        out: channels of the output.
        hidden: channels of the 3x3 convolution.
        stride: its stride, and that of P.
        groups: its groups.

    >>> import torch
    >>> BottleneckProjection(8, 16, 4, stride=2)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 16, 3, 3])
    """

    def __init__(self, channels: int, out: int, hidden: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(convolution(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(convolution(hidden, hidden, 3, stride, groups), nn.BatchNorm2d(hidden), nn.ReLU()),
            *(convolution(hidden, out, 1), nn.BatchNorm2d(out)),
        )
        self.shortcut = nn.Sequential(convolution(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """The next state for ``x`` ``(B, channels, H, W)``."""
        return (self.shortcut(x) + self.branch(x)).relu()


class PreactivatedProjection(nn.Module):
    """``P y + F(y)`` with ``y = relu(norm(x))``, F of conv3x3-norm-ReLU-conv3x3, P a 1x1 convolution.

    Args:
        channels: channels of x.
        out: channels of the output.
        stride: that of the first convolution, and of P.

    >>> import torch
    >>> PreactivatedProjection(8, 16, stride=2)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 16, 3, 3])
    """

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(
            convolution(channels, out, 3, stride), nn.BatchNorm2d(out), nn.ReLU(), convolution(out, out, 3)
        )
        self.shortcut = convolution(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The next state for ``x`` ``(B, channels, H, W)``."""
        y = self.activate(x)
        return self.shortcut(y) + self.branch(y)


def inverted(channels: int, out: int, expansion: int, stride: int = 1, *, expand: bool | None = None) -> nn.Sequential:
    """The layers of an inverted residual block: 1x1 to more channels, depthwise 3x3, and a linear 1x1.

    Args:
        channels: channels of the input.
        out: channels of the output.
        expansion: channels between over those of the input.
        stride: that of the depthwise convolution.
        expand: whether the first convolution is there; where the expansion is not 1, if not given.

    Returns:
        The layers.

    >>> import torch
    >>> inverted(8, 16, 6, stride=2)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 16, 3, 3])
    """
    wide = expansion * channels
    expand = expansion > 1 if expand is None else expand
    first = [convolution(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()] if expand else []
    return nn.Sequential(
        *first,
        *(convolution(wide, wide, 3, stride, wide), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(convolution(wide, out, 1), nn.BatchNorm2d(out)),
    )


class InvertedProjection(nn.Module):
    """``P x + F(x)``, F an inverted block of stride 1, P a 1x1 convolution with batch norm, or the identity.

    Args:
        channels: channels of x.
        out: channels of the output; P is the identity where they are as many.
        expansion: channels between over those of x.
        expand: whether the first convolution is there; where the expansion is not 1, if not given.

    >>> import torch
    >>> InvertedProjection(8, 16, 6)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 16, 6, 6])
    """

    def __init__(self, channels: int, out: int, expansion: int, *, expand: bool | None = None) -> None:
        super().__init__()
        self.branch = inverted(channels, out, expansion, expand=expand)
        project = (convolution(channels, out, 1), nn.BatchNorm2d(out)) if channels != out else ()
        self.shortcut = nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        """The next state for ``x`` ``(B, channels, H, W)``."""
        return self.shortcut(x) + self.branch(x)
