"""ResNet-50, -101 and -152, and their wide and grouped kin, as flows of bottleneck blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from einops.layers.torch import Reduce
from torch import nn

from odenets.errors import check_count
from odenets.fields import BottleneckField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.projections import BottleneckProjection, convolution
from odenets.models.resnets import residual
from odenets.network import Network

__all__ = ["resnet50"]


@refusing_other_names(depth="blocks, of each resolution", layers="blocks", width_per_group="width", channels="width")
def resnet50(
    in_channels: int = 3,
    classes: int = 1000,
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    groups: int = 1,
    width: int = 64,
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """ResNet-50 (He et al. 2015) for images of 224 x 224, that of torchvision: 25,557,032 parameters.

    The first block of each resolution changes the shape of the state and is no step: the encoder ends in one, and the
    transitions are the others. The flows hold the rest, ``v(x) = relu(x + F(x)) - x``, 2, 3, 5 and 2 of them, by
    Euler steps of h = 1. With ``blocks=(3, 4, 23, 3)`` it is ResNet-101 (44,549,160), with ``(3, 8, 36, 3)``
    ResNet-152 (60,192,808), with ``groups=32, width=4`` ResNeXt-50 32x4d (25,028,904), with ``width=128`` Wide
    ResNet-50-2 (68,883,240).

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        blocks: of each resolution, with that which changes the shape; at least 2.
        groups: groups of the 3 x 3 convolutions.
        width: channels per group at the first resolution; twice as many at each next one.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, H, W)`` to logits ``(B, classes)``.

    Raises:
        TypeError: a number of blocks that is no whole number.
        ValueError: a resolution with less than two blocks, whose flow would be empty.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition. arXiv:1512.03385 (2015).

    >>> import torch
    >>> network = resnet50(classes=10, blocks=(2, 3), width=4)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 3)
    """
    for number in blocks:
        check_count("blocks", number, 2)
    channels = [256 * 2**i for i in range(len(blocks))]
    hidden = [width * groups * 2**i for i in range(len(blocks))]
    encoder = nn.Sequential(
        normalize or nn.Identity(),
        *(convolution(in_channels, 64, 7, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(3, stride=2, padding=1),
        BottleneckProjection(64, channels[0], hidden[0], groups=groups),
    )

    def flow_of(i: int) -> Flow:
        return Flow(
            lambda: BottleneckField(channels[i], hidden[i], groups, norm=norm), depth=blocks[i] - 1, **residual(flow)
        )

    transitions = [
        BottleneckProjection(a, b, inner, stride=2, groups=groups)
        for (a, b), inner in zip(pairwise(channels), hidden[1:], strict=True)
    ]
    head = nn.Sequential(Reduce("b c h w -> b c", "mean"), nn.Linear(channels[-1], classes))
    return Network(encoder, [flow_of(i) for i in range(len(blocks))], head, transitions=transitions, readout=readout)
