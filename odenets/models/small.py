"""Networks of one flow for small images and for points; their method is that of a flow unless told otherwise."""

from __future__ import annotations

from typing import Any

from einops.layers.torch import Rearrange
from torch import nn

from odenets.fields import ConvField, MLPField
from odenets.flow import Flow
from odenets.models.normalize import Normalize
from odenets.models.resnets import unit_steps
from odenets.network import Network

__all__ = ["points_network", "small_network"]


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
        size: height (= width) of the images.
        features: channels of the state.
        others: see :mod:`odenets.models`.
    """
    encoder = nn.Sequential(normalize or nn.Identity(), nn.Conv2d(in_channels, features, 3, padding=1, bias=False))
    head = nn.Sequential(Rearrange("b c h w -> b (c h w)"), nn.Linear(features * size * size, classes))
    return Network(encoder, Flow(lambda: ConvField(features, norm=norm), **unit_steps(flow)), head, readout=readout)


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
        hidden: width of the fields' hidden layer.
        others: see :mod:`odenets.models`.
    """
    encoder = normalize or nn.Identity()
    flow_ = Flow(lambda: MLPField(dimensions, hidden), **unit_steps(flow))
    return Network(encoder, flow_, nn.Linear(dimensions, classes), readout=readout)
