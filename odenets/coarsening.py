"""Flows at another depth, without training: neighboring blocks merge into one step, or a block is split into several.

A group of blocks becomes one block: one of them stays and takes the sum of their h, so that the total time is the same.
That is what dropping steps means for an integrator, and the error of the merged step says what a group may lose: its
embedded error where the method has one, or else the difference of the group's steps to the one step in their place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from odenets.block_sequence import BlockSequence
from odenets.errors import check_number
from odenets.groups import RULES, STAYS, Group, Rule, Stays, groups_by_place, partition, share_blocks, split_blocks
from odenets.inputs import inputs_of
from odenets.merging import groups_by_output, merge_errors
from odenets.normalization import known_statistics, recalibrate
from odenets.regrouping import Inputs, flows_of, norms_of, regrouped

__all__ = ["at_depth", "groups_at_depth"]

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
        inputs: on which errors are measured and statistics of batch norms recomputed: batches of inputs or of pairs
            ``(inputs, labels)``, whose labels are not read, or a function that makes them. What the fields take besides
            is in a pair, ``((x, c), labels)``.
        rule: of what the groups minimize the sum of squares: "error", the embedded errors of the merged steps, or where
            the method has none, as "euler", "difference", that of the group's steps to the one step in their place;
            "even", the step sizes, which are then as even as may be. Or "output": two neighbors after two others merge,
            those by which the network's output changes least. "error" if not given, "even" without inputs.
        stays: which block of a group stays: "first", "middle", "last", or "best", that with the least difference.
            "best" if not given, "first" without inputs.
        recalibration: inputs for the statistics of batch norms, if not those of ``inputs``.

    Returns:
        The copy, in the network's modes; where nothing changes, the same to the last bit.

    Errors are root mean squares over the features, averaged over the inputs, in eval mode and at the states of the
    whole network. For a flow of d blocks that takes about ``d^2 / 2`` steps, or ``d^3 / 6`` where the best block stays;
    by the output up to ``d^2`` passes.

    Raises:
        TypeError: another network, or inputs that are none.
        ValueError: both blocks and tolerance, or neither; numbers out of range; a rule or a tolerance without inputs; a
            network with statistics of batch norms without inputs; a flow that is shared, a neural ODE, or has no field
            yet, or a flow or block that is used twice.

    >>> import odenets, torch
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
    if inputs is None and recalibration is None and any(known_statistics(norm) for norm in norms_of(network)):
        raise ValueError(
            "inputs must be given for a network with statistics of batch norms, which another depth changes: "
            "at_depth(..., inputs=batches), on which they are recomputed"
        )
    for flow, its in zip(flows_of(copied), groups, strict=True):
        flow.replace_blocks(regrouped(flow, its, copied))
    again = recalibration if recalibration is not None else inputs
    if again is not None:
        recalibrate(copied, inputs_of(again, "recalibration" if recalibration is not None else "inputs"))
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
    tolerance = _checked_tolerance(blocks, tolerance, rule)
    reading = {
        "tolerance": tolerance is not None,
        f"rule={rule!r}": rule != "even",
        f"stays={stays!r}": stays == "best",
    }
    if inputs is None and any(reading.values()):
        first = next(name for name, reads in reading.items() if reads)
        raise ValueError(f"{first} reads errors, which are measured on inputs: at_depth(..., inputs=batches)")
    counts: list[int | None] = [None] * len(flows)
    if blocks is not None:
        counts = [*share_blocks(blocks, [flow.depth for flow in flows])]
    every = [groups_by_place(flow.depth, stays) for flow in flows]
    merged: list[list[Group] | None] = [None] * len(flows)
    if inputs is not None and any(reading.values()) and any(map(_merges, counts, flows)):
        if rule == "output":
            merged = [*groups_by_output(network, flows, [count or 1 for count in counts], inputs, stays)]
        else:
            every = merge_errors(network, flows, inputs, rule, stays)
    return [
        tuple(its or partition(flow.h, errors, count, tolerance, rule))
        if _merges(count, flow)
        else tuple(split_blocks(flow.h, count or flow.depth))
        for flow, count, errors, its in zip(flows, counts, every, merged, strict=True)
    ]


def _merges(count: int | None, flow: BlockSequence) -> bool:
    """Whether a flow that is to have so many blocks, or as few as a tolerance allows, may get fewer."""
    return count is None or count < flow.depth


def _checked_tolerance(blocks: object, tolerance: float | None, rule: Rule) -> float | None:
    """The tolerance, where it stands in the place of a number of blocks."""
    if (blocks is None) == (tolerance is None):
        raise ValueError("at_depth takes either blocks, how many there are to be, or tolerance, the largest error")
    if tolerance is None:
        return None
    tolerance = check_number("tolerance", tolerance)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if rule == "output":
        raise ValueError("tolerance is one of the errors of steps, which rule='output' does not measure: give blocks")
    return tolerance


def _changes(groups: Iterable[Iterable[Group]]) -> bool:
    return any(group.last - group.first > 1 or group.pieces > 1 for its in groups for group in its)
