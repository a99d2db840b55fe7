"""What merged blocks err: of one step in the place of several, and of the output of the whole network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.block_sequence import BlockSequence
from odenets.blocks import take_step
from odenets.groups import Choice, Group, Rule, Stays, groups_by_place, place_of
from odenets.inputs import arguments, call, inputs_of, samples_in
from odenets.modes import evaluating, inputs_for
from odenets.regrouping import Inputs, blocks_of, coarsened, norms_of

__all__ = ["groups_by_output", "merge_errors"]


@torch.no_grad()
def merge_errors(
    network: nn.Module, flows: Sequence[BlockSequence], inputs: Inputs | None, rule: Rule, stays: Stays
) -> list[dict[tuple[int, int], Choice]]:
    """The error of every group of blocks of each flow, and the block that stays."""
    for flow in flows:
        flow.check_one_step("network", "errors of merged steps are measured one by one; give blocks without inputs")
    totals: list[dict[tuple[int, int, int], tuple[float, float]]] = [{} for _ in flows]
    places = [groups_by_place(flow.depth, stays) for flow in flows]
    samples, passing = 0, cast(Any, network)
    with evaluating(network):
        for of_batch in inputs_of(inputs, "inputs"):
            _, *args = arguments(of_batch := inputs_for(network, of_batch))
            steps = list(call(passing.steps, of_batch, closing=False))
            samples += (n := samples_in(of_batch))
            for flow, its, by_place in zip(flows, totals, places, strict=True):
                own, steps = steps[: flow.depth], steps[flow.depth :]
                embedded = rule != "difference" and flow.tableau.low is not None
                for (a, b), (_, stay) in by_place.items():
                    for j in range(a, b) if stays == "best" else (stay,):
                        error, difference = _errors(flow, own, a, b, j, embedded, args)
                        old = its.get((a, b, j), (0.0, 0.0))
                        its[a, b, j] = old[0] + n * error, old[1] + n * difference
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


def _errors(
    flow: BlockSequence, steps: Sequence[Any], a: int, b: int, j: int, embedded: bool, args: Sequence[Any]
) -> tuple[float, float]:
    """Mean error of one step of block j in the place of those from a to before b, and its difference to them."""
    blocks, begin, end = blocks_of(flow), steps[a], steps[b - 1].x1
    if b - a == 1 and not embedded:
        return 0.0, 0.0
    h = math.fsum(flow.h[a:b])
    following = blocks[b] if b < len(blocks) else None
    fields = blocks[j].velocities(flow.tableau, flow.stage_fields, following, args)
    step = take_step(blocks[j], args, fields, begin.t, begin.x0, h, flow.tableau, None, closing=embedded)
    apart = (step.x1 - end).flatten(1)
    apart = apart.to(torch.promote_types(apart.dtype, torch.float32))
    difference = apart.square().mean(1).sqrt().mean().item()
    return (measures.error(step).mean().item() if embedded else difference), difference


@torch.no_grad()
def groups_by_output(
    network: nn.Module, flows: Sequence[BlockSequence], counts: Sequence[int], inputs: Inputs, stays: Stays
) -> list[list[Group]]:
    """So many groups of each flow, merged one pair after the other: that which changes the network's output least.

    Batch norms take the statistics of the inputs.
    """
    groups = [[Group(m, m + 1, m) for m in range(flow.depth)] for flow in flows]
    with evaluating(network), _norms_by_batch(network):
        batches = [inputs_for(network, x) for x in inputs_of(inputs, "inputs")]
        whole = [_checked(call(network, x)) for x in batches]
        while any(len(its) > count for its, count in zip(groups, counts, strict=True)):
            trials = [
                [*groups[:i], merged, *groups[i + 1 :]]
                for i, its in enumerate(groups)
                if len(its) > counts[i]
                for merged in _merges(its, stays)
            ]
            groups = min(trials, key=lambda trial: _change(network, trial, batches, whole))
    return groups


def _merges(groups: list[Group], stays: Stays) -> Iterator[list[Group]]:
    """The groups with two neighbors merged; where the best block is to stay, either group's may."""
    for n, (one, other) in enumerate(pairwise(groups)):
        first, last = one.first, other.last
        for stay in (one.stays, other.stays) if stays == "best" else (place_of(stays, first, last),):
            yield [*groups[:n], Group(first, last, stay), *groups[n + 2 :]]


def _change(network: nn.Module, groups: list[list[Group]], batches: list[Any], whole: list[Tensor]) -> float:
    """Mean square by which the output changes."""
    with coarsened(network, groups):
        total = sum(float((call(network, x) - y).square().sum()) for x, y in zip(batches, whole, strict=True))
    return _or_infinite(total / sum(y.numel() for y in whole))


def _checked(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"rule='output' compares outputs that are tensors, got {type(output).__name__}: rule='error'")
    return output


@contextmanager
def _norms_by_batch(network: nn.Module) -> Iterator[None]:
    """Batch norms take the statistics of each batch for a while, and keep their own."""
    norms = norms_of(network)
    before = [(norm, dict(norm._buffers)) for norm in norms]
    try:
        for norm, buffers in before:
            norm.training = True
            norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for norm, buffers in before:
            norm._buffers.update(buffers)
