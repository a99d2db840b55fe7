"""ConvNeXt: every block of it is a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from einops.layers.torch import Reduce
from torch import Tensor, nn

from odenets.fields import ConvNeXtField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.resnets import residual
from odenets.network import Network

__all__ = ["convnext"]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place.

    >>> import torch
    >>> bool(ChannelNorm(8)(torch.randn(2, 8, 3, 3)).mean(1).abs().max() < 1e-6)
    True
    """

    def forward(self, input: Tensor) -> Tensor:
        """The normalized ``input`` ``(B, C, H, W)``."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@refusing_other_names(depths="blocks", depth="blocks, of each flow", dims="channels", patch_size="patch")
def convnext(
    in_channels: int = 3,
    classes: int = 1000,
    *,
    blocks: Sequence[int] = (3, 3, 9, 3),
    channels: Sequence[int] = (96, 192, 384, 768),
    patch: int = 4,
    scale: float | None = 1e-6,
    norm: str | None = "layer",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """ConvNeXt (Liu et al. 2022), by default ConvNeXt-T: 28,589,128 parameters, as torchvision.

    Convolutions of patches lead to each flow, so that every block is a step.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        blocks: of each flow.
        channels: of the states of each flow.
        patch: height, width and stride of the first convolution; those of the others are 2.
        scale: with which the layer scale of each block begins; None for none.
        norm: that of the fields: "layer", over the channels of each place, "batch" (statistics per stage), "group" or
            None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, H, W)`` to logits ``(B, classes)``.

    Raises:
        ValueError: not as many numbers of blocks as of channels.

    References:
        Liu, Mao, Wu, Feichtenhofer, Darrell, Xie. A ConvNet for the 2020s. arXiv:2201.03545 (2022).

    >>> import torch
    >>> network = convnext(classes=10, blocks=(1, 2), channels=(8, 16))
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 3)
    """
    if len(blocks) != len(channels):
        raise ValueError(f"blocks and channels must be as many, one of each flow, got {blocks!r} and {channels!r}")
    stem = nn.Conv2d(in_channels, channels[0], patch, stride=patch)
    encoder = nn.Sequential(normalize or nn.Identity(), stem, ChannelNorm(channels[0], eps=1e-6))

    def flow_of(c: int, depth: int) -> Flow:
        return Flow(lambda: ConvNeXtField(c, norm=norm, scale=scale), depth=depth, **residual(flow))

    transitions = [nn.Sequential(ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2)) for a, b in pairwise(channels)]
    last = channels[-1]
    head = nn.Sequential(Reduce("b c h w -> b c", "mean"), nn.LayerNorm(last, eps=1e-6), nn.Linear(last, classes))
    flows = [flow_of(c, depth) for c, depth in zip(channels, blocks, strict=True)]
    return Network(encoder, flows, head, transitions=transitions, readout=readout)
