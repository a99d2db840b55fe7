"""The autoencoder of ResNet-9: its encoder, and a decoder that mirrors it, to look at the states of its blocks."""

from __future__ import annotations

from torch import nn

__all__ = ["resnet9_decoder"]


def resnet9_decoder(channels: int = 1, *, features: int = 32, size: int = 28) -> nn.Sequential:
    """The mirror of :func:`resnet9`'s encoder: states ``(B, features, size / 2, size / 2)`` to images in [0, 1].

    Args:
        channels: of the images.
        features: channels of the states.
        size: height and width of the images.
    """
    return nn.Sequential(
        nn.ConvTranspose2d(features, features // 2, 5, stride=2, padding=2, output_padding=1 - size % 2, bias=False),
        nn.BatchNorm2d(features // 2),
        nn.ReLU(),
        nn.Conv2d(features // 2, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.Tanh(),
        _ToPixels(),
    )


class _ToPixels(nn.Module):
    """[-1, 1] to [0, 1]."""

    def forward(self, x):
        return (x + 1) / 2
