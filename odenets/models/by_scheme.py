"""Residual networks of any scheme over any field, for images of 32 x 32 and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import torch
from einops.layers.torch import Reduce
from torch import nn

from odenets.blocks import fields_per_block
from odenets.errors import check_count
from odenets.fields import make as make_field
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.network import Network
from odenets.schemes import Scheme
from odenets.schemes.names import method_of
from solvers import ButcherTableau, LearnedTableau

__all__ = ["FieldName", "network"]

FieldName = str | Callable[[int], nn.Module]
"""The name of a field, or a function of a number of channels that makes one."""


@dataclass(frozen=True)
class Habit:
    """What a scheme is published with.

    Attributes:
        field: its field, or its fields in turns.
        h: its step size.
        norm: that of its fields, "own" is that of their class.
    """

    field: FieldName | tuple[FieldName, ...] = "conv"
    h: float = 1.0
    norm: str = "own"


_IMPLICIT = ("equilibrium", "rkcnn_implicit", "implicit_euler", "implicit_midpoint", "trapezoid", "kvaerno5")
"""Whose stages are roots, which monotone fields have at any step size."""

_HABITS: dict[str, Habit] = {
    "lie_trotter": Habit(("attention", "feed_forward")),
    "strang": Habit(("attention", "feed_forward")),
    "hamiltonian": Habit("parabolic", norm="group"),
    "hamiltonian_verlet": Habit("parabolic", norm="group"),
    "second_order": Habit("parabolic", norm="group"),
    "two_step_midpoint": Habit("antisymmetric", h=0.5),
    **dict.fromkeys(_IMPLICIT, Habit("parabolic")),
}


@refusing_other_names(
    solver="scheme", depth="blocks, of each flow", num_blocks="blocks", features="channels", width="channels"
)
def network(
    scheme: str | ButcherTableau | LearnedTableau = "euler",
    field: FieldName | Sequence[FieldName] | None = None,
    in_channels: int = 3,
    classes: int = 10,
    *,
    channels: Sequence[int] = (16, 32, 64),
    blocks: int = 3,
    stride: int = 1,
    norm: str | None = "own",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """A residual network whose blocks are steps of a scheme over a field: one flow for each number of channels.

    A convolution leads to the first state, 1 x 1 convolutions of stride 2 from flow to flow, and a norm, the mean over
    the places and a linear layer to the logits. Blocks have the step size that the scheme is published with, 1 for most
    of them.

    Args:
        scheme: one of :func:`odenets.schemes.names`, a :class:`~odenets.schemes.Scheme`, or what else a flow takes as
            its solver.
        field: one of :func:`odenets.fields.names`, or a function of a number of channels that makes a field; or
            several, which the fields of a block are in turns. That which the scheme is published with if not given,
            "conv" for most of them.
        in_channels: channels of the images.
        classes: number of outputs.
        channels: of the state of each flow.
        blocks: of each flow.
        stride: of the first convolution.
        norm: that of the fields, "batch" (statistics per use), "group", "layer" or None; "own" is that which each class
            of fields has by itself.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of each :class:`~odenets.Flow`, such as ``h=0.5`` or ``shared=True``.

    Returns:
        The network, ``(B, in_channels, H, W)`` to logits ``(B, classes)``.

    Raises:
        TypeError, ValueError: an unknown scheme or field, or channels that the scheme cannot halve.

    >>> from odenets.models import network
    >>> lm = network("lm", "bottleneck", blocks=2)
    >>> lm(torch.rand(2, 3, 32, 32)).shape, lm.depth, lm.evaluations
    (torch.Size([2, 10]), 6, 6)
    """
    channels = [*channels] if isinstance(channels, Sequence) else [channels]
    check_count("blocks", blocks, 1)
    check_count("stride", stride, 1)
    if not channels:
        raise ValueError("channels must hold the channels of at least one flow, got none")
    for each in channels:
        check_count("channels", each, 1)
    method_of(scheme)
    habit = _HABITS.get(getattr(scheme, "name", scheme), Habit())  # type: ignore[arg-type] - of a learned method
    several = habit.field if field is None else field
    fields: Any = tuple(several) if isinstance(several, list | tuple) else (several,)
    for one in fields or [None]:
        if isinstance(one, nn.Module) or not (isinstance(one, str) or callable(one)):
            raise TypeError(
                f"field must be a name of odenets.fields.names(), a function of a number of channels, as lambda c: "
                f"ConvField(c), or a list of such, got {several!r:.80}"
            )
    if not {"h", "total_time"} & set(flow):
        flow["h"] = habit.h
    first, last = channels[0], channels[-1]
    encoder = nn.Sequential(
        normalize or nn.Identity(), nn.Conv2d(in_channels, first, 3, stride, 1, bias=False), nn.BatchNorm2d(first)
    )
    norm = habit.norm if norm == "own" and field is None else norm
    flows = [
        _flow(scheme, fields, each, blocks, norm, flow, i / len(channels), (i + 1) / len(channels))
        for i, each in enumerate(channels)
    ]
    transitions = [nn.Conv2d(a, b, 1, stride=2, bias=False) for a, b in pairwise(channels)]
    head = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(), Reduce("b c h w -> b c", "mean"), nn.Linear(last, classes))
    return Network(encoder, flows, head, transitions=transitions, readout=readout)


def _flow(
    scheme: Any, fields: Sequence[FieldName], channels: int, depth: int, norm: str | None, settings: dict[str, Any],
    begin: float, end: float,
) -> Flow:  # fmt: skip
    """A flow of so many channels, whose fields come in turns, from one share of the network's blocks to another.

    Raises:
        ValueError: more fields than its blocks have.
    """
    method = method_of(scheme)
    if isinstance(method, Scheme):
        method = method.of_channels(channels).of_share(begin, end)
    state = torch.empty(1, channels, 1, 1)
    own = method.fields_see(state).shape[1] if isinstance(method, Scheme) else channels
    turns, shared = cycle(fields), settings.get("shared", False)
    drawn = fields_per_block(method, settings.get("stage_fields", "tied")) * (1 if shared else depth)
    if len(fields) > drawn:
        raise ValueError(f"field must hold at most the {drawn} of a flow's blocks, got {len(fields)}")
    return Flow(lambda: _field(next(turns), own, norm), solver=method, depth=depth, **settings)


def _field(name: FieldName, channels: int, norm: str | None) -> nn.Module:
    if not isinstance(name, str):
        return name(channels)
    return make_field(name, channels, **({} if norm == "own" else {"norm": norm}))
