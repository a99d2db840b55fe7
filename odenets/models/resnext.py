"""ResNeXt: bottleneck blocks of grouped convolutions whose residues are not negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from einops.layers.torch import Reduce
from torch import nn

from odenets.fields import ResNeXtField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.resnets import activated_conv, residual
from odenets.network import Network

__all__ = ["resnext50"]


@refusing_other_names(depth="blocks, of each flow", layers="blocks", cardinality="groups", width_per_group="width")
def resnext50(
    in_channels: int = 3,
    classes: int = 100,
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    groups: int = 32,
    width: int = 4,
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """ResNeXt-50 32x4d for images of 32 x 32, as in [K24]: 16 blocks in four flows.

    A projection (1 x 1 convolution, batch norm, ReLU) leads to each flow, of stride 2 from the second on, so that every
    block is a step from a state that is not negative by a residue that is not negative. In the reference network the
    first block of a flow reads the state before the projection: its first convolution has fewer inputs, 1,400,832
    parameters less in all.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        blocks: of each flow.
        groups: groups of the 3 x 3 convolutions.
        width: channels per group in the first flow; twice as many in each next one.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, 32, 32)`` to logits ``(B, classes)``.

    >>> import torch
    >>> network = resnext50(blocks=(1, 1), groups=4)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 100]), 2)
    """
    channels = [256 * 2**i for i in range(len(blocks))]
    sizes = [(in_channels, 32, 3), (32, 64, 3), (64, channels[0], 1)]
    encoder = nn.Sequential(normalize or nn.Identity(), *(layer for size in sizes for layer in activated_conv(*size)))

    def flow_of(i: int) -> Flow:
        hidden = groups * width * 2**i
        return Flow(lambda: ResNeXtField(channels[i], hidden, groups, norm=norm), depth=blocks[i], **residual(flow))

    transitions = [nn.Sequential(*activated_conv(a, b, 1, stride=2)) for a, b in pairwise(channels)]
    head = nn.Sequential(Reduce("b c h w -> b c", "mean"), nn.Linear(channels[-1], classes))
    return Network(encoder, [flow_of(i) for i in range(len(blocks))], head, transitions=transitions, readout=readout)
