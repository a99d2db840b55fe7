"""Kinds of modules that stand in compressed networks alone: what a file says of each, and how it is made of that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from odenets.blocks import Block
from odenets.depth.compression.replacements import InPlaceOf, ScaledStep, Zero
from odenets.flow import Flow
from odenets.network import Network

__all__ = ["KINDS", "Kind", "kind_of"]

Parts = Mapping[str, Any]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of modules.

    Attributes:
        type: its class.
        settings: attributes that a file holds.
        make: of its parts by name and its settings, a module; one with parameters has none of its own yet, they are on
            the device "meta".
    """

    type: type[nn.Module]
    settings: tuple[str, ...]
    make: Callable[[Parts, Settings], nn.Module]


def _layer(kind: type[nn.Module], *settings: str, **options: Any) -> Kind:
    """A kind whose settings and parts are arguments of its class."""
    return Kind(kind, settings, lambda parts, values: kind(**parts, **values, **options))


def _flow(parts: Parts, settings: Settings) -> Flow:
    like = settings["like"]
    like.check_one_step("model", "blocks that are removed one by one are those of Flow(solver='euler') and its like")
    kind = Flow if settings["plain"] else type(like)
    return kind.of([*parts["blocks"]], start=settings["start"], **like.settings)


def _network(parts: Parts, _: Settings) -> Network:
    return Network(parts["encoder"], [*parts["_flows"]], parts["head"], transitions=[*parts["transitions"]])


KINDS: Mapping[str, Kind] = {
    kind.type.__name__: kind
    for kind in (
        _layer(nn.Identity),
        _layer(nn.ReLU),
        _layer(Zero),
        _layer(InPlaceOf, "argument", "elements"),
        _layer(ScaledStep, "h", "argument", "elements", "rectified", "branch"),
        _layer(nn.Linear, "in_features", "out_features", device="meta"),
        _layer(nn.Conv2d, "in_channels", "out_channels", "kernel_size", "padding", device="meta"),
        Kind(nn.Sequential, (), lambda parts, _: nn.Sequential(OrderedDict(parts))),
        Kind(nn.ModuleList, (), lambda parts, _: nn.ModuleList(parts.values())),
        Kind(Block, ("h",), lambda parts, settings: Block([*parts["fields"]], settings["h"])),
        Kind(Flow, ("start",), _flow),
        Kind(Network, (), _network),
    )
}
"""By the names of their classes."""


def kind_of(module: nn.Module) -> str | None:
    """The name of the kind of a new ``module``; None if it is of no kind.

    >>> kind_of(nn.Identity()), kind_of(nn.Tanh())
    ('Identity', None)
    """
    if isinstance(module, Flow):
        return "Flow"  # or a class of the user's, that of the flow that it comes from
    name = type(module).__name__
    return name if name in KINDS and KINDS[name].type is type(module) else None
