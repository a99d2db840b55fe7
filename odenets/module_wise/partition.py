"""Where a network is cut, evenly or by measured memory, and the cut into parts that record their own steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.adapting.cutting.cut import blocks_in, cut_adapted
from odenets.analysis.memory import measure_memory
from odenets.flow import Flow
from odenets.inputs import arguments, call, is_by_keyword
from odenets.modes import inputs_for, keeping_modes, keeping_state
from odenets.network import Chain, Network

__all__ = [
    "At",
    "Cuttable",
    "Part",
    "activation_memory",
    "balanced",
    "blocks_of",
    "cut",
    "even",
    "in_order",
    "inputs_on",
    "lightest",
    "shared_parameter",
]

At = Literal["end", "start"]
Cuttable = Flow | Network | AdaptedModel


class Part(Chain):
    """Some flows and other layers of a network.

    Args:
        pieces: in order.
    """

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    @property
    def layers(self) -> list[nn.Module]:
        """The pieces."""
        return list(self.pieces)


def blocks_of(network: Cuttable, x: Any = None) -> int:
    """Number of blocks between which a ``network`` can be cut; a transformer's block of two steps is one.

    Inputs ``x``, a tensor, a tuple or a mapping, are those by which an adapted model finds its blocks, if it has not.

    Raises:
        TypeError: neither a Flow, a Network nor an adapted model.
        ValueError: an adapted model that has not found its blocks, without inputs.

    >>> import odenets
    >>> blocks_of(odenets.models.small_network(depth=4))
    4
    """
    if not isinstance(network, Cuttable):
        raise TypeError(
            f"network must be a Flow, a Network or an adapted model, got {type(network).__name__}: odenets.adapt makes "
            "one of any residual network"
        )
    if not isinstance(network, AdaptedModel):
        return network.depth
    if x is not None:
        call(network.find, inputs_on(network, x))
    return len(blocks_in(network))


def cut(
    network: Cuttable, ends: Sequence[int], at: At = "end", x: Any = None
) -> tuple[list[Part] | list[AdaptedModel], nn.Module]:
    """The parts of a network, which share its modules, and its head.

    Args:
        network: a flow, a network or an adapted model.
        ends: after how many blocks each part ends, rising; the last is the number of blocks.
        at: whether what stands between two blocks, a transition, belongs to the later part ("end": the cut is at the
            end of the earlier block) or to the earlier ("start": at the start of the next).
        x: inputs of an adapted model, a tensor, a tuple ``(x, *args)`` or a mapping of keywords, of two samples or
            more: what its parts get besides the state, ``part(state, *args)``. A model that torch.fx cannot trace,
            such as Hugging Face's, is exported with them; its parts hold for other numbers of samples and tokens, in
            the modes that its modules have now.

    Returns:
        The parts, each with ``record``, and the head; the identity for a flow.

    Raises:
        TypeError: no such network.
        ValueError: ends out of order, or a network that cannot be cut there.

    >>> import odenets
    >>> parts, head = cut(odenets.models.small_network(depth=4), [1, 4])
    >>> [part.depth for part in parts]
    [1, 3]
    """
    depth, ends = blocks_of(network, x), list(ends)
    if not ends or ends[-1] != depth or ends[0] < 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"ends must rise from at least 1 to the number of blocks, {depth}, got {ends}")
    if at not in ("end", "start"):
        raise ValueError(f"at must be 'end' or 'start', got {at!r}")
    if isinstance(network, AdaptedModel):
        with keeping_modes(network):
            return cut_adapted(network, ends, at, None if x is None else inputs_on(network, x))
    if isinstance(network, Flow):
        return [Part([network.part(a, b)]) for a, b in pairwise([0, *ends])], nn.Identity()
    if network.readout != "solution":
        raise ValueError(f"a network that reads out {network.readout!r} cannot be cut: build it with 'solution'")
    return [Part(_pieces(network, a, b, at)) for a, b in pairwise([0, *ends])], network.head


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


def shared_parameter(modules: Sequence[nn.Module], owners: Sequence[int]) -> tuple[int, int, str] | None:
    """The first parameter that modules of two owners hold: the numbers of both modules, and its name in the latter."""
    holders: dict[int, int] = {}
    for k, module in enumerate(modules):
        for name, p in module.named_parameters():
            j = holders.setdefault(id(p), k)
            if owners[j] != owners[k]:
                return j, k, name
    return None


def even(blocks: int, modules: int) -> list[int]:
    """Ends of modules of equally many blocks, the first ones with one more where it does not come out even.

    Args:
        blocks: of the network.
        modules: how many.

    Returns:
        After how many blocks each module ends; the last is ``blocks``.

    Raises:
        ValueError: more modules than blocks, or none.

    >>> even(54, 4)
    [14, 28, 41, 54]
    """
    _check_number(modules, blocks)
    size, more = divmod(blocks, modules)
    return [k * size + min(k, more) for k in range(1, modules + 1)]


def inputs_on(network: nn.Module, x: Any) -> Any:
    """Inputs, x, a tuple ``(x, *args)`` or a mapping, on the device of a network and in its precision."""

    def on(one: Any) -> Any:
        return inputs_for(network, one) if isinstance(one, Tensor) else one

    return {name: on(one) for name, one in x.items()} if is_by_keyword(x) else tuple(map(on, arguments(x)))


def in_order(x: Any) -> tuple[Any, ...]:
    """Inputs ``(x, *args)`` as parts take them, of what comes by position or by keyword."""
    return tuple(x.values()) if is_by_keyword(x) else arguments(x)


def activation_memory(network: Cuttable, x: Any, at: At = "end") -> list[int]:
    """Bytes that each block keeps for its backward pass with inputs ``x``, measured; the first with the encoder's.

    Inputs are a tensor, a tuple ``(x, *args)`` with what conditions the fields, or a mapping.

    The network is left as it was: modes, buffers and random state.
    """
    inputs = inputs_on(network, x)
    parts, _ = cut(network, range(1, blocks_of(network, inputs) + 1), at, inputs)
    sizes: list[int] = []
    x, *args = in_order(inputs)
    with keeping_state(network, *parts):  # batch norms see x, and dropout draws
        for part in parts:
            part.train()
            state = x.detach()
            sizes.append(measure_memory(lambda: part(state, *args), x.device).left)  # noqa: B023 - called here
            with torch.no_grad():
                x = part(state, *args)
    return sizes


def lightest(weights: Sequence[int], modules: int) -> list[int]:
    """Ends of modules of consecutive blocks whose heaviest weighs least.

    Raises:
        ValueError: more modules than blocks, or none.

    >>> lightest([4, 4, 4, 2, 2, 2, 1, 1], 2)
    [2, 8]
    """
    blocks = len(weights)
    _check_number(modules, blocks)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    best = {(0, 0): (0, [0])}  # of the first m blocks in k modules: the heaviest, and the ends
    for k in range(1, modules + 1):
        for m in range(k, blocks + 1):
            options = ((max(best[k - 1, j][0], sums[m] - sums[j]), j) for j in range(k - 1, m) if (k - 1, j) in best)
            weight, j = min(options)
            best[k, m] = (weight, [*best[k - 1, j][1], m])
    return best[modules, blocks][1][1:]


def balanced(network: Cuttable, modules: int, x: Any, at: At = "end") -> list[int]:
    """Ends of equally heavy modules, the heaviest of which keeps least for its backward pass [K24, TRGL*].

    Args:
        network: to be split; a flow, a network or an adapted model.
        modules: how many.
        x: inputs ``(B, *S)`` of the shape of training, a tuple ``(x, *args)`` or a mapping; a few samples will do.
        at: see :func:`cut`.

    Returns:
        After how many blocks each module ends, for ``split_into_modules(network, ends, x)``.

    Raises:
        ValueError: more modules than blocks, or none.

    >>> import odenets
    >>> network = odenets.models.resnet110(blocks=2)  # 6 blocks, the first with large states
    >>> balanced(network, 2, torch.rand(2, 3, 16, 16)), even(6, 2)
    ([2, 6], [3, 6])
    """
    _check_number(modules, blocks_of(network, x))
    return lightest(activation_memory(network, x, at), modules)


def _check_number(modules: int, blocks: int) -> None:
    if not 1 <= modules <= blocks:
        raise ValueError(f"modules must be between 1 and the number of blocks, {blocks}, got {modules}")
