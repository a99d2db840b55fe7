"""The networks that there are: what calls them, where they come from, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from odenets.models.bottlenecks import resnet50
from odenets.models.by_scheme import network
from odenets.models.convnext import convnext
from odenets.models.mobilenet import mobilenet_v2
from odenets.models.resnets import resnet9, resnet110, resnet_km, wide_resnet
from odenets.models.resnext import resnext50
from odenets.models.small import points_network, small_network
from odenets.models.vision_transformer import vit
from odenets.network import Network
from odenets.printing import table
from odenets.schemes import SOURCES, names

__all__ = ["Listed", "entries", "list_models"]

_NETWORKS: tuple[tuple[Callable[..., Network], dict[str, Any], str], ...] = (
    (resnet9, {}, "Karkar 2023"),
    (resnet110, {}, "He 2016"),
    (resnet_km, {"K": 4, "M": 2}, "Karkar 2023"),
    (wide_resnet, {"projections": "block"}, "Zagoruyko 2016"),
    (resnet50, {}, "He 2015"),
    (resnext50, {}, "Xie 2017"),
    (mobilenet_v2, {}, "Sandler 2018"),
    (convnext, {}, "Liu 2022"),
    (vit, {}, "Dosovitskiy 2021, Touvron 2021"),
    (small_network, {}, ""),
    (points_network, {}, ""),
)


@dataclass(frozen=True)
class Listed:
    """A network of :mod:`odenets.models`.

    Attributes:
        call: what makes it, of the module's functions.
        source: the paper that it comes from.
        parameters: how many it has.
        depth: its steps.
        evaluations: field evaluations of a forward pass.
    """

    call: str
    source: str
    parameters: int
    depth: int
    evaluations: int


def entries() -> tuple[Listed, ...]:
    """All networks of the module, each with its defaults, and :func:`~odenets.models.network` of every scheme.

    They are made on the meta device, in a second or two.

    >>> resnet = next(one for one in entries() if one.call == "resnet50()")
    >>> resnet.parameters
    25557032
    """
    with torch.device("meta"):
        made = [(_call(make, options), source, make(**options)) for make, options, source in _NETWORKS]
        made += [(f"network({name!r})", SOURCES.get(name, ""), network(name)) for name in names()]
    return tuple(
        Listed(call, source, sum(p.numel() for p in one.parameters()), one.depth, one.evaluations)
        for call, source, one in made
    )


def list_models() -> None:
    """Print the networks of :mod:`odenets.models`: calls, sources, parameters, steps, field evaluations of a pass.

    The parameters are those with the defaults; of ``network(scheme)`` with 3 blocks of 16, 32 and 64 channels each.

    >>> from odenets import models
    >>> models.list()  # doctest: +ELLIPSIS
      network ...
      resnet9() ...
    """
    rows = [(one.call, one.source, str(one.parameters), str(one.depth), str(one.evaluations)) for one in entries()]
    print("\n".join(table(("network", "source", "parameters", "steps", "evaluations"), rows)))


def _call(make: Callable[..., Network], options: dict[str, Any]) -> str:
    return f"{make.__name__}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
