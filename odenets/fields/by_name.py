"""Fields of images by short names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from odenets.fields.antisymmetric import AntisymmetricField
from odenets.fields.attention import AttentionField, FeedForwardField
from odenets.fields.basic import BasicField
from odenets.fields.bottleneck import BottleneckField
from odenets.fields.convnext import ConvNeXtField
from odenets.fields.convolution import ConvField
from odenets.fields.inverted import InvertedField
from odenets.fields.resnext import ResNeXtField
from odenets.fields.sizes import check_sizes
from odenets.fields.symmetric import SymmetricField
from odenets.fields.velocity_field import VelocityField

__all__ = ["make", "names"]


def _resnext(channels: int) -> dict[str, Any]:
    hidden = max(1, channels // 2)
    return {"hidden": hidden, "groups": math.gcd(32, hidden)}


_FIELDS: dict[str, tuple[Callable[..., VelocityField], Callable[[int], dict[str, Any]]]] = {
    "antisymmetric": (AntisymmetricField, lambda channels: {"kernel_size": 3}),
    "attention": (AttentionField, lambda channels: {"heads": math.gcd(4, channels)}),
    "basic": (BasicField, lambda channels: {}),
    "bottleneck": (BottleneckField, lambda channels: {}),
    "conv": (ConvField, lambda channels: {}),
    "convnext": (ConvNeXtField, lambda channels: {}),
    "feed_forward": (FeedForwardField, lambda channels: {}),
    "inverted": (InvertedField, lambda channels: {}),
    "mbconv": (InvertedField, lambda channels: {"activation": "silu", "squeeze": max(1, channels // 4)}),
    "parabolic": (SymmetricField, lambda channels: {"kernel_size": 3}),
    "resnext": (ResNeXtField, _resnext),
}
"""By name the class, and the arguments that it has for some channels where they are not those of the class."""


def names() -> tuple[str, ...]:
    """The names that :func:`make` knows.

    >>> "bottleneck" in names()
    True
    """
    return tuple(_FIELDS)


def make(name: str, channels: int, **options: Any) -> VelocityField:
    """A field of images by its name.

    Args:
        name: "conv", the pre-activation block of :class:`ConvField`; "basic", "bottleneck" and "resnext"; "inverted",
            and "mbconv" with squeeze and excitation; "convnext"; "attention", with 4 heads where 4 divides the
            channels, and "feed_forward"; "antisymmetric", and "parabolic", a :class:`SymmetricField`, of 3x3
            convolutions.
        channels: channels of the images.
        options: arguments of the class, for those that it has by itself or above.

    Returns:
        The field, ``(B, channels, H, W)`` to the same shape.

    Raises:
        ValueError: an unknown name; a value that the class refuses.
        TypeError: an option that the class does not take; channels that are no whole number.

    >>> import torch
    >>> make("bottleneck", 16, norm="group")(0.0, torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be one of {', '.join(_FIELDS)}, got {name!r}")
    if name not in _FIELDS:
        raise ValueError(f"name must be one of {', '.join(_FIELDS)}, got {name!r}")
    check_sizes(channels=channels)
    field, defaults = _FIELDS[name]
    return field(channels, **{**defaults(channels), **options})
