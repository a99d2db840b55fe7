"""MobileNetV2 as flows of inverted residual blocks, as published and as it is used on images of 32 x 32."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from einops.layers.torch import Reduce
from torch import nn

from odenets.errors import check_number
from odenets.fields import InvertedField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.projections import InvertedProjection, convolution, inverted
from odenets.models.resnets import residual
from odenets.network import Network

__all__ = ["mobilenet_v2"]

_STAGES = ((24, 2), (32, 3), (64, 4), (96, 3), (160, 3))
"""Channels and blocks of each flow, with that which changes the shape; 16 come before, 320 behind, one block each."""
_STRIDES = {"cifar": (1, 1, 2, 2, 1, 2), "imagenet": (2, 2, 2, 2, 1, 2)}
"""Of the first convolution, and of the block that leads to each flow."""


@refusing_other_names(width_mult="width", width_multiplier="width", channels="width")
def mobilenet_v2(
    in_channels: int = 3,
    classes: int = 10,
    *,
    form: str = "cifar",
    width: float = 1.0,
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """MobileNetV2 (Sandler et al. 2018): five flows of 1, 2, 3, 2 and 2 inverted blocks, and those between them.

    In the form "imagenet" it is the network of the paper and of torchvision, for images of 224 x 224: 3,504,872
    parameters with 1000 classes. In the form "cifar" it is that in wide use on images of 32 x 32 (pytorch-cifar):
    2,296,922 parameters with 10 classes. There the first convolution and the block of 24 channels have stride 1, the
    first block has a 1 x 1 convolution to as many channels as it takes, and the four blocks of stride 1 that change the
    number of channels have a 1 x 1 convolution with batch norm as their shortcut, where the paper's have none; the
    activation is ReLU6 here as in the paper, ReLU there. Torchvision's dropout before the last layer is left out.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        form: "cifar" or "imagenet".
        width: multiplies the numbers of channels, which are rounded to multiples of 8.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, H, W)`` to logits ``(B, classes)``.

    Raises:
        TypeError: a width that is no number.
        ValueError: an unknown form, or a width that is not positive.

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: inverted residuals and linear bottlenecks. arXiv:1801.04381
        (2018).

    >>> import torch
    >>> network = mobilenet_v2(width=0.25)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 10)
    """
    if form not in _STRIDES:
        raise ValueError(f"form must be 'cifar' or 'imagenet', got {form!r}")
    if not check_number("width", width) > 0:
        raise ValueError(f"width must be positive, got {width}")
    stem, *strides = _STRIDES[form]
    first, second, *channels, last = (_rounded(width * c) for c in (32, 16, *(c for c, _ in _STAGES), 320))
    out = _rounded(1280 * max(1.0, width))

    def lead(a: int, b: int, stride: int, expansion: int = 6) -> nn.Module:
        cifar = form == "cifar"
        if stride == 1 and (cifar or a == b):  # as many where rounding makes them so
            return InvertedProjection(a, b, expansion, expand=True if cifar else None)
        return inverted(a, b, expansion, stride)

    def flow_of(c: int, blocks: int) -> Flow:
        return Flow(lambda: InvertedField(c, norm=norm), depth=blocks - 1, **residual(flow))

    encoder = nn.Sequential(
        normalize or nn.Identity(),
        *(convolution(in_channels, first, 3, stem), nn.BatchNorm2d(first), nn.ReLU6()),
        lead(first, second, 1, expansion=1),
        lead(second, channels[0], strides[0]),
    )
    flows = [flow_of(c, blocks) for c, (_, blocks) in zip(channels, _STAGES, strict=True)]
    transitions = [lead(a, b, stride) for (a, b), stride in zip(pairwise(channels), strides[1:], strict=True)]
    head = nn.Sequential(
        lead(channels[-1], last, 1),
        *(convolution(last, out, 1), nn.BatchNorm2d(out), nn.ReLU6()),
        Reduce("b c h w -> b c", "mean"),
        nn.Linear(out, classes),
    )
    return Network(encoder, flows, head, transitions=transitions, readout=readout)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not below nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 * (nearest < 0.9 * channels)
