"""Flows at another depth, without training: neighboring blocks merge into one step, or a block is split into several.

A group of blocks becomes one block: one of them stays and takes the sum of their h, so that the total time is the same.
That is what dropping steps means for an integrator, and the error of the merged step says what a group may lose: its
embedded error where the method has one, or else the difference of the group's steps to the one step in their place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.block_sequence import BlockSequence
from odenets.blocks import Block, take_step
from odenets.errors import check_number
from odenets.groups import (
    RULES,
    STAYS,
    Choice,
    Group,
    Rule,
    Stays,
    check_groups,
    groups_by_place,
    partition,
    share_blocks,
    split_blocks,
)
from odenets.modes import evaluating, inputs_for
from odenets.normalization import known_statistics, recalibrate
from odenets.normalization.stage_batch_norm import StageBatchNorm

__all__ = ["Inputs", "at_depth", "coarsened", "flows_of", "groups_at_depth"]

Inputs = Iterable[Tensor] | Callable[[], Iterable[Tensor]]
N = TypeVar("N", bound=nn.Module)


def at_depth(
    network: N,
    blocks: int | Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    inputs: Inputs | None = None,
    rule: Rule | None = None,
    stays: Stays | None = None,
    recalibration: Inputs | None = None,
) -> N:
    """A copy of a network with other numbers of blocks, which is not trained: blocks merge, or are split.

    Each group of neighboring blocks becomes one, whose h is the sum of theirs; the total time of every flow stays.

    Args:
        network: an :class:`~odenets.Network` or a :class:`~odenets.Flow`; it stays as it is.
        blocks: how many there are to be, in total, which the flows share in proportion to what they have, or one number
            per flow. More than there are split blocks, those with the largest h first, into equal parts.
        tolerance: in place of ``blocks``, the largest error of a merged step: as few blocks as keep it.
        inputs: on which errors are measured and statistics of batch norms recomputed: batches, tensors ``(B, *S)``, or
            a function that makes them.
        rule: of what the groups minimize the sum of squares: "error", the embedded errors of the merged steps, or where
            the method has none, as "euler", "difference", that of the group's steps to the one step in their place;
            "even", the step sizes, which are then as even as may be. "error" if not given, "even" without inputs.
        stays: which block of a group stays: "first", "middle", "last", or "best", that with the least difference.
            "best" if not given, "first" without inputs.
        recalibration: inputs for the statistics of batch norms, if not those of ``inputs``.

    Returns:
        The copy, in the network's modes; where nothing changes, the same to the last bit.

    Errors are root mean squares over the features, averaged over the inputs, in eval mode and at the states of the
    whole network. With d blocks a pass takes about ``d^2 / 2`` steps, and ``d^3 / 6`` where the best block stays.

    Raises:
        TypeError: another network, or inputs that are none.
        ValueError: both blocks and tolerance, or neither; numbers out of range; a rule or a tolerance without inputs; a
            network with statistics of batch norms without inputs; a flow that is shared, a neural ODE, or has no field
            yet, or a flow or block that is used twice.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver="bs23", depth=8)
    >>> at_depth(flow, 2).h
    (0.5, 0.5)
    >>> at_depth(flow, tolerance=1.0, inputs=[torch.randn(20, 2)]).depth
    1
    """
    inputs = [*inputs] if isinstance(inputs, Iterator) else inputs  # which are read twice
    groups = groups_at_depth(network, blocks, tolerance=tolerance, inputs=inputs, rule=rule, stays=stays)
    copied = copy.deepcopy(network)
    if not _changes(groups):
        return copied
    if inputs is None and recalibration is None and any(known_statistics(norm) for norm in _norms(network)):
        raise ValueError(
            "inputs must be given for a network with statistics of batch norms, which another depth changes: "
            "at_depth(..., inputs=batches), on which they are recomputed"
        )
    for flow, its in zip(flows_of(copied), groups, strict=True):
        flow.replace_blocks(_regrouped(flow, its, copied))
    again = recalibration if recalibration is not None else inputs
    if again is not None:
        recalibrate(copied, _batches(again, "recalibration" if recalibration is not None else "inputs"))
    return copied


def groups_at_depth(
    network: nn.Module,
    blocks: int | Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    inputs: Inputs | None = None,
    rule: Rule | None = None,
    stays: Stays | None = None,
) -> list[tuple[Group, ...]]:
    """The groups of blocks that :func:`at_depth` makes one block each.

    Args:
        network, blocks, tolerance, inputs, rule, stays: as :func:`at_depth` takes them.

    Returns:
        One tuple of groups per flow, which :func:`coarsened` takes.

    Raises:
        TypeError, ValueError: as :func:`at_depth`, but for statistics of batch norms, which are not looked at.

    >>> import odenets
    >>> groups_at_depth(odenets.Flow(odenets.MLPField(2), depth=4), 2)
    [(Group(first=0, last=2, stays=0, pieces=1), Group(first=2, last=4, stays=2, pieces=1))]
    """
    flows = flows_of(network)
    rule = rule or ("even" if inputs is None else "error")
    stays = stays or ("first" if inputs is None else "best")
    for name, value, known in (("rule", rule, RULES), ("stays", stays, STAYS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if (blocks is None) == (tolerance is None):
        raise ValueError("at_depth takes either blocks, how many there are to be, or tolerance, the largest error")
    reading = [
        *[f"rule={rule!r}"] * (rule != "even"),
        *[f"stays={stays!r}"] * (stays == "best"),
        *["tolerance"] * (tolerance is not None),
    ]
    if inputs is None and reading:
        raise ValueError(f"{reading[0]} reads errors, which are measured on inputs: at_depth(..., inputs=batches)")
    counts = [None] * len(flows) if blocks is None else share_blocks(blocks, [flow.depth for flow in flows])
    if tolerance is not None:
        tolerance = check_number("tolerance", tolerance)
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    merging = [count is None or count < flow.depth for count, flow in zip(counts, flows, strict=True)]
    read = bool(reading) and any(merging)
    every = (
        _measured(network, flows, inputs, rule, stays)
        if read
        else [groups_by_place(flow.depth, stays) for flow in flows]
    )
    return [
        tuple(
            split_blocks(flow.h, count)
            if count is not None and count >= flow.depth
            else partition(flow.h, its, count, tolerance, rule)
        )
        for flow, count, its in zip(flows, counts, every, strict=True)
    ]


@contextmanager
def coarsened(network: nn.Module, groups: Sequence[Sequence[Group]]) -> Iterator[None]:
    """The network itself with its blocks merged, for a while: what training at several depths takes, without copies.

    Statistics of batch norms are those of the whole network, and passes in training mode change them.

    Args:
        network: an :class:`~odenets.Network` or a :class:`~odenets.Flow`.
        groups: for each flow its groups in order, as :func:`groups_at_depth` returns them.

    Yields:
        Nothing; afterwards every block is there again with its own h, also after an error.

    Raises:
        TypeError, ValueError: as :func:`at_depth`, or groups that are not all blocks of a flow, each once and in order.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), depth=4)
    >>> with coarsened(flow, [[Group(0, 3, stays=1), Group(3, 4, stays=3)]]):
    ...     flow.h
    (0.75, 0.25)
    >>> flow.depth
    4
    """
    flows = flows_of(network)
    if len(groups) != len(flows):
        raise ValueError(f"groups must hold those of each of {len(flows)} flows, got {len(groups)}")
    for flow, its in zip(flows, groups, strict=True):
        check_groups(its, flow.depth)
    before = [[(block, block.h) for block in _blocks(flow)] for flow in flows]
    try:
        for flow, its in zip(flows, groups, strict=True):
            flow.replace_blocks(_regrouped(flow, its, network))
        yield
    finally:
        for flow, blocks in zip(flows, before, strict=True):
            for block, h in blocks:
                block.h = h
            flow.replace_blocks([block for block, _ in blocks])


def flows_of(network: nn.Module) -> list[BlockSequence]:
    """The flows of a network, or a flow itself, whose blocks can be merged.

    Raises:
        TypeError: another network.
        ValueError: a flow that is shared, a neural ODE, or has no field yet, or a flow or block that is used twice.
    """
    network = getattr(network, "_orig_mod", network)  # behind torch.compile too
    flows: Any = [network] if isinstance(network, BlockSequence) else getattr(network, "flows", None)
    if not isinstance(flows, list) or not hasattr(network, "steps"):
        raise TypeError(
            f"network must be an odenets.Network or Flow, whose blocks are steps, got {type(network).__name__}"
        )
    for i, flow in enumerate(flows):
        if not isinstance(flow, BlockSequence) or flow.shared:
            raise ValueError(
                f"flow {i} has one field for all its steps: there are no blocks to merge; make one with other steps, "
                "NeuralODE(field, steps=...) or Flow(field, depth=..., shared=True)"
            )
        if not len(flow.blocks):
            raise ValueError(f"flow {i} has no field yet: call the network once before it gets another depth")
    blocks = [block for flow in flows for block in flow.blocks]
    if len({*flows}) < len(flows) or len({*blocks}) < len(blocks):
        raise ValueError("network uses a flow or a block twice: another depth needs each once")
    return flows


def _blocks(flow: BlockSequence) -> list[Block]:
    return [cast(Block, block) for block in flow.blocks]


def _norms(network: nn.Module) -> list[nn.Module]:
    kinds = StageBatchNorm | nn.modules.batchnorm._BatchNorm
    return [m for m in network.modules() if isinstance(m, kinds) and m.running_mean is not None]


def _changes(groups: Iterable[Iterable[Group]]) -> bool:
    return any(group.last - group.first > 1 or group.pieces > 1 for its in groups for group in its)


def _regrouped(flow: BlockSequence, groups: Sequence[Group], whole: nn.Module) -> list[Block]:
    """The blocks that stay, with their new h, and copies of those that are split."""
    blocks, h, new = _blocks(flow), flow.h, []
    for group in groups:
        block = blocks[group.stays]
        block.h = math.fsum(h[group.first : group.last]) / group.pieces
        new += [block, *(block.copy_within(whole) for _ in range(group.pieces - 1))]
    return new


@torch.no_grad()
def _measured(
    network: nn.Module, flows: Sequence[BlockSequence], inputs: Inputs | None, rule: Rule, stays: Stays
) -> list[dict[tuple[int, int], Choice]]:
    """The error of every group of blocks of each flow, and the block that stays."""
    totals: list[dict[tuple[int, int, int], tuple[float, float]]] = [{} for _ in flows]
    places = [groups_by_place(flow.depth, stays) for flow in flows]
    samples, passing = 0, cast(Any, network)
    with evaluating(network):
        for x in _batches(cast(Inputs, inputs), "inputs"):
            steps = list(passing.steps(inputs_for(network, x), closing=False))
            samples += len(x)
            for flow, its, by_place in zip(flows, totals, places, strict=True):
                own, steps = steps[: flow.depth], steps[flow.depth :]
                embedded = rule != "difference" and flow.tableau.low is not None
                for (a, b), (_, stay) in by_place.items():
                    for j in range(a, b) if stays == "best" else (stay,):
                        error, difference = _errors(flow, own, a, b, j, embedded)
                        old = its.get((a, b, j), (0.0, 0.0))
                        its[a, b, j] = old[0] + len(x) * error, old[1] + len(x) * difference
    if not samples:
        raise ValueError("inputs must hold at least one batch, got none: was the iterator used up before?")
    chosen = []
    for its, by_place in zip(totals, places, strict=True):
        best: dict[tuple[int, int], Choice] = {}
        for a, b in by_place:
            of = [j for j in range(a, b) if (a, b, j) in its]
            j = min(of, key=lambda j: _or_infinite(its[a, b, j][1]))
            best[a, b] = _or_infinite(its[a, b, j][0]) / samples, j
        chosen.append(best)
    return chosen


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _errors(flow: BlockSequence, steps: Sequence[Any], a: int, b: int, j: int, embedded: bool) -> tuple[float, float]:
    """Mean error of one step of block j in the place of those from a to before b, and its difference to them."""
    blocks, begin, end = _blocks(flow), steps[a], steps[b - 1].x1
    if b - a == 1 and not embedded:
        return 0.0, 0.0
    h = math.fsum(flow.h[a:b])
    following = blocks[b] if b < len(blocks) else None
    fields = blocks[j].velocities(flow.tableau.stages, flow.stage_fields, following)
    step = take_step(blocks[j], (), fields, begin.t, begin.x0, h, flow.tableau, None, closing=embedded)
    apart = (step.x1 - end).flatten(1)
    apart = apart.to(torch.promote_types(apart.dtype, torch.float32))
    difference = apart.square().mean(1).sqrt().mean().item()
    return (measures.error(step).mean().item() if embedded else difference), difference


def _batches(inputs: Inputs, name: str) -> Iterator[Tensor]:
    """Batches of inputs, if they are tensors.

    Raises:
        TypeError: they are one tensor, pairs or no iterable.
    """
    must = f"{name} must hold batches of inputs, tensors (B, *S), got"
    if isinstance(inputs, Tensor):
        raise TypeError(f"{must} one tensor: pass [x]")
    batches = inputs() if callable(inputs) and not isinstance(inputs, Iterable) else inputs
    if not isinstance(batches, Iterable):
        raise TypeError(f"{must} a {type(batches).__name__}")
    for x in batches:
        if not isinstance(x, Tensor):
            raise TypeError(f"{must} a {type(x).__name__}: give (x for x, y in batches)")
        yield x
