"""A network as consecutive parts, each of which records the steps of its own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.adapting.tracing import cut_adapted
from odenets.flow import Flow
from odenets.measures import Measure
from odenets.modes import keeping_modes
from odenets.network import Network
from odenets.recording import Records

__all__ = ["At", "Part", "blocks_of", "cut"]

At = Literal["end", "start"]


class Part(nn.Module):
    """Flows and other layers, one after another; states are not checked, so that a diverging network can be measured.

    Args:
        pieces: in order.
    """

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(piece.depth for piece in self.pieces if isinstance(piece, Flow))

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        return sum(piece.evaluations for piece in self.pieces if isinstance(piece, Flow))

    def forward(self, x: Tensor) -> Tensor:
        """The last state for inputs ``x`` ``(B, ...)``."""
        return self.record(x)[0]

    def record(self, x: Tensor, /, **measures: Measure) -> tuple[Tensor, Records]:
        """The last state, and per measure ``(blocks, B)``."""
        parts = []
        for piece in self.pieces:
            if not isinstance(piece, Flow):
                x = piece(x)
                continue
            x, records = piece.record(x, "solution", False, **measures)
            parts.append((records, piece.depth))
        return x, Records.join(parts)


def blocks_of(network: Flow | Network | AdaptedModel) -> int:
    """Number of blocks between which a network can be cut; a transformer's block of two steps is one."""
    return len(network.places) if isinstance(network, AdaptedModel) else network.depth


def cut(
    network: Flow | Network | AdaptedModel, ends: Sequence[int], at: At = "end"
) -> tuple[list[nn.Module], nn.Module]:
    """The parts of a network, which share its modules, and its head.

    Args:
        network: a :class:`~odenets.Flow`, a :class:`~odenets.Network` or an adapted one.
        ends: after how many blocks each part ends, rising; the last is the number of blocks.
        at: whether what stands between two blocks, a transition, belongs to the later part ("end": the cut is at the
            end of the earlier block) or to the earlier ("start": at the start of the next).

    Returns:
        The parts, each with ``record``, and the head; the identity for a flow.

    Raises:
        TypeError: no such network.
        ValueError: ends out of order, or a network that cannot be cut there.
    """
    if not isinstance(network, Flow | Network | AdaptedModel):
        raise TypeError(f"network must be a Flow, a Network or an adapted model, got {type(network).__name__}")
    depth, ends = blocks_of(network), list(ends)
    if not ends or ends[-1] != depth or ends[0] < 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"ends must rise from at least 1 to the number of blocks, {depth}, got {ends}")
    if at not in ("end", "start"):
        raise ValueError(f"at must be 'end' or 'start', got {at!r}")
    if isinstance(network, AdaptedModel):
        with keeping_modes(network):
            *parts, head = cut_adapted(network, ends, at)
        return parts, head
    if isinstance(network, Flow):
        return [Part([network.part(a, b)]) for a, b in pairwise([0, *ends])], nn.Identity()
    if network.readout != "solution":
        raise ValueError(f"a network that reads out {network.readout!r} cannot be cut: build it with 'solution'")
    parts, begin = [], 0
    for end in ends:
        parts.append(Part(_pieces(network, begin, end, at)))
        begin = end
    return parts, network.head


def _pieces(network: Network, begin: int, end: int, at: str) -> list[nn.Module]:
    """What stands in a network from its block ``begin`` to before its block ``end``."""
    pieces: list[nn.Module] = [] if begin else [network.encoder]
    offset = 0
    for i, flow in enumerate(network.flows):
        first, last = max(begin - offset, 0), min(end - offset, flow.depth)
        before = first == 0 and i and (begin < offset or at == "end")
        if first < last:
            if before:
                pieces.append(cast(nn.Module, network.transitions[i - 1]))
            pieces.append(flow.part(first, last))
            if at == "start" and last == flow.depth and end == offset + last and i + 1 < len(network.flows):
                pieces.append(cast(nn.Module, network.transitions[i]))
        offset += flow.depth
    return pieces
