"""Residual networks of two-convolution blocks: ResNet-9, ResNet-110, wide ResNets, K modules of M blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise, repeat
from typing import Any

from einops.layers.torch import Rearrange, Reduce
from torch import nn

from odenets.errors import check_count
from odenets.fields import ConvField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.projections import PreactivatedProjection, convolution
from odenets.network import Network

__all__ = ["activated_conv", "residual", "resnet9", "resnet110", "resnet_km", "unit_steps", "wide_resnet"]


def unit_steps(flow: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a flow; the step size of every block is 1 unless told otherwise, whatever the method."""
    return flow if {"h", "total_time"} & set(flow) else {**flow, "h": 1.0}


def residual(flow: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a flow; those of a residual network, Euler steps with h = 1, unless told otherwise."""
    return unit_steps({"solver": "euler", **flow})


def activated_conv(channels: int, out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(channels, out, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU()]


def _normed_head(channels: int, classes: int) -> nn.Sequential:
    """Batch norm, ReLU, the mean over the places, a linear layer."""
    pool = Reduce("b c h w -> b c", "mean")
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), pool, nn.Linear(channels, classes))


@refusing_other_names(channels="features", width="features", image_size="size", img_size="size")
def resnet9(
    in_channels: int = 1,
    classes: int = 10,
    *,
    features: int = 32,
    size: int = 28,
    depth: int = 9,
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """ResNet-9 [K24, section 3]: a stride-2 encoder, ``depth`` blocks at one resolution, a two-layer head.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        features: channels of the state: 32 for MNIST, 100 for CIFAR.
        size: height (= width) of the images.
        depth: number of blocks.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, size, size)`` to logits ``(B, classes)``.

    >>> import torch
    >>> network = resnet9(depth=3)
    >>> network(torch.rand(2, 1, 28, 28)).shape, network.depth
    (torch.Size([2, 10]), 3)
    """
    half = (size + 1) // 2
    encoder = nn.Sequential(
        normalize or nn.Identity(),
        *activated_conv(in_channels, features // 2, 3),
        *activated_conv(features // 2, features, 5, stride=2),
    )
    head = nn.Sequential(
        Rearrange("b c h w -> b (c h w)"),
        nn.Linear(features * half * half, 10 * classes),
        nn.BatchNorm1d(10 * classes),
        nn.ReLU(),
        nn.Linear(10 * classes, classes),
    )
    return Network(encoder, _flow(features, depth, norm, flow), head, readout=readout)


@refusing_other_names(depth="blocks, of each flow", num_blocks="blocks", features="channels")
def resnet110(
    in_channels: int = 3,
    classes: int = 10,
    *,
    blocks: int = 18,
    channels: Sequence[int] = (16, 32, 64),
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """The pre-activation ResNet-110 of [K24] for images of 32 x 32: three flows of 18 blocks.

    The first block begins with a convolution; 1 x 1 convolutions of stride 2 lead from flow to flow, and no norm stands
    before the head. He et al.'s (2016) has shortcuts without weights between the flows, where the first convolution
    changes the number of channels, and 1,727,962 parameters for 1,753,530 here.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        blocks: of each flow; the depth, counted in layers with weights, is ``6 * blocks + 2``.
        channels: of the states of each flow.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, 32, 32)`` to logits ``(B, classes)``.

    >>> import torch
    >>> network = resnet110(blocks=3)  # ResNet-20
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 9)
    """
    first, last = channels[0], channels[-1]
    convolution = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
    encoder = nn.Sequential(normalize or nn.Identity(), convolution, nn.BatchNorm2d(first))
    flows = [_flow(c, blocks, norm, flow, leading=i > 0) for i, c in enumerate(channels)]
    transitions = [nn.Conv2d(a, b, 1, stride=2, bias=False) for a, b in pairwise(channels)]
    head = nn.Sequential(Reduce("b c h w -> b c", "mean"), nn.Linear(last, classes))
    return Network(encoder, flows, head, transitions=transitions, readout=readout)


@refusing_other_names(depth="blocks, of each flow", num_blocks="blocks", widen_factor="widen", width="widen")
def wide_resnet(
    in_channels: int = 3,
    classes: int = 10,
    *,
    blocks: int = 4,
    widen: int = 10,
    projections: str = "convolution",
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """WideResNet-28-10 (Zagoruyko and Komodakis 2016) for images of 32 x 32: three flows of four wide blocks.

    A 1 x 1 convolution leads to each flow, of stride 2 from the second on, so that every block is a step: 38,991,802
    parameters. In the original the first block of a flow changes the number of channels beside such a shortcut; with
    ``projections="block"`` such blocks lead to flows of one block less, and there are 36,479,194 parameters as there.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        blocks: of each flow, with the one that leads to it; the depth, counted in layers with weights, is
            ``6 * blocks + 4``.
        widen: channels of the first flow over 16.
        projections: what leads to each flow, "convolution" or "block".
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, 32, 32)`` to logits ``(B, classes)``.

    Raises:
        TypeError: a number of blocks that is no whole number.
        ValueError: other projections, or too few blocks: 1, or 2 where one of them leads to the flow.

    >>> import torch
    >>> network = wide_resnet(blocks=2, widen=1)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 6)
    """
    if projections not in ("convolution", "block"):
        raise ValueError(f"projections must be 'convolution' or 'block', got {projections!r}")
    block = projections == "block"
    check_count("blocks", blocks, 1 + block)
    channels = [16 * widen, 32 * widen, 64 * widen]
    lead = PreactivatedProjection if block else partial(convolution, kernel_size=1)
    first = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    encoder = nn.Sequential(normalize or nn.Identity(), first, lead(16, channels[0]))
    flows = [_flow(c, blocks - block, norm, flow) for c in channels]
    transitions = [lead(a, b, stride=2) for a, b in pairwise(channels)]
    return Network(encoder, flows, _normed_head(channels[-1], classes), transitions=transitions, readout=readout)


@refusing_other_names(depth="K and M, modules and blocks of each", modules="K", blocks="M", features="channels")
def resnet_km(
    K: int,
    M: int,
    in_channels: int = 3,
    classes: int = 10,
    *,
    channels: int = 256,
    norm: str | None = "batch",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """The K-M ResNet [K24, section 4]: K modules of M blocks; the state has twice the channels in the second half.

    Args:
        K: number of modules.
        M: blocks per module.
        in_channels: channels of the images.
        classes: number of outputs.
        channels: of the states in the first half of the modules (rounded up), twice as many and half the height and
            width in the second.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, H, W)`` to logits ``(B, classes)``.

    Raises:
        ValueError: K or M below 1.

    >>> import torch
    >>> network = resnet_km(K=2, M=2, channels=16)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 4)
    """
    if K < 1 or M < 1:
        raise ValueError(f"K and M must be at least 1, got {K} and {M}")
    encoder = nn.Sequential(normalize or nn.Identity(), *activated_conv(in_channels, channels, 3, stride=2))
    modules = [(channels, (K + 1) // 2), (2 * channels, K // 2)]
    flows = [_flow(c, k * M, norm, flow) for c, k in modules if k]
    transitions = [nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)] * (K > 1)
    head = _normed_head(channels * len(flows), classes)
    return Network(encoder, flows, head, transitions=transitions, readout=readout)


def _flow(channels: int, depth: int, norm: str | None, flow: dict[str, Any], *, leading: bool = True) -> Flow:
    """A flow of two-convolution blocks, the first of which may begin with its convolution."""
    begins = chain([leading], repeat(True))
    return Flow(lambda: ConvField(channels, norm=norm, leading=next(begins)), depth=depth, **residual(flow))
