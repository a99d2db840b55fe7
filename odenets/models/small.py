"""Networks of one flow for small images and for points; their method is that of a flow unless told otherwise."""

from __future__ import annotations

from typing import Any

from einops.layers.torch import Rearrange
from torch import nn

from odenets.fields import ConvField, MLPField
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.resnets import unit_steps
from odenets.network import Network

__all__ = ["points_network", "small_network"]


@refusing_other_names(channels="features", width="features", image_size="size", img_size="size")
def small_network(
    in_channels: int = 1,
    classes: int = 10,
    *,
    features: int = 16,
    size: int = 8,
    norm: str | None = "group",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """A network of one flow for images of a few pixels: a 3x3 convolution, the flow, a linear head.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        features: channels of the state.
        size: height (= width) of the images.
        norm: that of the fields: "batch" (statistics per stage), "group", "layer" or None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="euler"``; steps with h = 1 if
            not given.

    Returns:
        The network, ``(B, in_channels, size, size)`` to logits ``(B, classes)``.

    >>> import torch
    >>> network = small_network(depth=3)
    >>> network(torch.rand(2, 1, 8, 8)).shape, network.depth
    (torch.Size([2, 10]), 3)
    """
    encoder = nn.Sequential(normalize or nn.Identity(), nn.Conv2d(in_channels, features, 3, padding=1, bias=False))
    head = nn.Sequential(Rearrange("b c h w -> b (c h w)"), nn.Linear(features * size * size, classes))
    return Network(encoder, Flow(lambda: ConvField(features, norm=norm), **unit_steps(flow)), head, readout=readout)


@refusing_other_names(
    **dict.fromkeys(
        ("features", "in_features", "dim", "in_channels", "input_channels", "num_channels", "in_chans"), "dimensions"
    ),
    **dict.fromkeys(("width", "hidden_features"), "hidden"),
    norm_layer="of a field: Network(encoder, Flow(lambda: MLPField(2, norm='batch')), head)",
)
def points_network(
    dimensions: int = 2,
    classes: int = 2,
    *,
    hidden: int = 16,
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """A network on points: a flow in the space of the points themselves, and a linear head.

    Args:
        dimensions: of the points.
        classes: number of outputs.
        hidden: width of the fields' hidden layer.
        normalize: the first layer, none if not given.
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``solver="euler"``; steps with h = 1 if
            not given.

    Returns:
        The network, ``(B, dimensions)`` to logits ``(B, classes)``.

    >>> import torch
    >>> network = points_network(depth=3)
    >>> network(torch.rand(5, 2)).shape, network.depth
    (torch.Size([5, 2]), 3)
    """
    encoder = normalize or nn.Identity()
    flow_ = Flow(lambda: MLPField(dimensions, hidden), **unit_steps(flow))
    return Network(encoder, flow_, nn.Linear(dimensions, classes), readout=readout)
