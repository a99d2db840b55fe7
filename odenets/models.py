"""Known networks as compositions of fields and flows."""

from __future__ import annotations

from typing import Any

from einops.layers.torch import Rearrange
from torch import nn

from odenets.fields import ConvField, MLPField
from odenets.flow import Flow
from odenets.network import Network

__all__ = ["Normalize", "points_network", "resnet9", "small_network"]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, inside the model, so that a model always takes raw pixels in [0, 1].

    Args:
        mean, std: one number per channel, dimension 1 of the input.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need one entry per channel and std > 0, got {mean} and {std}")
        self.mean, self.std = list(mean), list(std)

    def forward(self, x):
        """Normalise ``x`` ``(B, C, ...)``."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - x.new_tensor(self.mean).reshape(shape)) / x.new_tensor(self.std).reshape(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


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
    """ResNet-9 of the thesis (section 3): a stride-2 encoder, ``depth`` blocks at one resolution, a two-layer head.

    Args:
        in_channels, size: channels and height (= width) of the images.
        classes: number of classes.
        features: channels of the state: 32 for MNIST, 100 for CIFAR.
        depth: number of blocks.
        norm: normalisation of the fields.
        normalize: first layer, so that inputs are pixels in [0, 1].
        readout: see :class:`~odenets.Network`.
        flow: arguments of :class:`~odenets.Flow`; an Euler residual network with h = 1 unless told otherwise.
    """
    if flow.get("solver", "euler") == "euler" and "total_time" not in flow:
        flow.setdefault("h", 1.0)
    flow.setdefault("solver", "euler")
    half = (size + 1) // 2
    encoder = nn.Sequential(
        normalize or nn.Identity(),
        nn.Conv2d(in_channels, features // 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(features // 2),
        nn.ReLU(),
        nn.Conv2d(features // 2, features, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )
    head = nn.Sequential(
        Rearrange("b c h w -> b (c h w)"),
        nn.Linear(features * half * half, 10 * classes),
        nn.BatchNorm1d(10 * classes),
        nn.ReLU(),
        nn.Linear(10 * classes, classes),
    )
    return Network(encoder, Flow(lambda: ConvField(features, norm=norm), depth=depth, **flow), head, readout=readout)


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
        in_channels, size: channels and height (= width) of the images.
        classes: number of classes.
        features: channels of the state.
        norm: normalisation of the fields.
        normalize: first layer, so that inputs are pixels in [0, 1].
        readout: see :class:`~odenets.Network`.
        flow: arguments of :class:`~odenets.Flow`.
    """
    encoder = nn.Sequential(normalize or nn.Identity(), nn.Conv2d(in_channels, features, 3, padding=1, bias=False))
    head = nn.Sequential(Rearrange("b c h w -> b (c h w)"), nn.Linear(features * size * size, classes))
    return Network(encoder, Flow(lambda: ConvField(features, norm=norm), **flow), head, readout=readout)


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
        classes: number of classes.
        hidden: width of the fields' hidden layer.
        normalize: first layer.
        readout: see :class:`~odenets.Network`.
        flow: arguments of :class:`~odenets.Flow`.
    """
    encoder = normalize or nn.Identity()
    flow_ = Flow(lambda: MLPField(dimensions, hidden), **flow)
    return Network(encoder, flow_, nn.Linear(dimensions, classes), readout=readout)
