"""Networks of experiments alone: torchvision's classifiers for small images, and a decoder of ResNet-9's states."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

__all__ = ["NAMES", "resnet9_decoder", "vision"]

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg19", "swin_t")


def vision(
    name: str, classes: int, *, stem: Literal["imagenet", "cifar", "tinyimagenet"] = "imagenet", size: int = 64
) -> nn.Module:
    """A classifier of torchvision, without weights from training, for images of any size.

    Args:
        name: one of :data:`NAMES`.
        classes: number of classes.
        stem: of a ResNet: "imagenet", as it is; "cifar", one conv3x3 of stride 1, for 32 x 32; "tinyimagenet",
            conv7x7 of stride 2 without pooling, for 64 x 64 and 96 x 96. A Swin transformer has patches of 4 x 4, or
            of 2 x 2 with "cifar" and windows to fit.
        size: height and width of the images, which a VGG's classifier depends on: it has batch norms and, for images
            below 224, one linear layer behind its convolutions, as is usual for them.

    Raises:
        ValueError: an unknown name or stem, or images too small for a VGG, which halves them five times.
    """
    from torchvision import models

    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if stem not in ("imagenet", "cifar", "tinyimagenet"):
        raise ValueError(f"stem must be 'imagenet', 'cifar' or 'tinyimagenet', got {stem!r}")
    if name == "vgg19":
        if size < 32:
            raise ValueError(f"size must be at least 32 for vgg19, got {size}")
        model = models.vgg19_bn(num_classes=classes)
        if size < 224:
            side = size // 32
            vgg = cast(Any, model)
            vgg.avgpool, vgg.classifier = nn.Identity(), nn.Linear(512 * side * side, classes)
        return model
    if name == "swin_t":
        if stem == "imagenet":
            return models.swin_t(num_classes=classes)
        window, patch = [4, 4], [2, 2] if stem == "cifar" else [4, 4]
        return models.SwinTransformer(
            patch, 96, [2, 2, 6, 2], [3, 6, 12, 24], window, stochastic_depth_prob=0.2, num_classes=classes
        )
    model = cast(Any, getattr(models, name)(num_classes=classes))
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    if stem != "imagenet":
        model.maxpool = nn.Identity()
    return model


def resnet9_decoder(channels: int = 1, *, features: int = 32, size: int = 28) -> nn.Sequential:
    """The mirror of the encoder of ResNet-9: states ``(B, features, size / 2, size / 2)`` to images in [0, 1].

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
