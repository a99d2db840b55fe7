"""What others choose blocks by: block influence, the relative residue, and ReplaceMe's run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.depth.compression.calls import Calls
from odenets.depth.compression.candidates import Candidate
from odenets.depth.compression.least_squares import NormalEquations
from odenets.depth.compression.linear_maps import (
    add_rows,
    has_constant,
    macs_of,
    seam_for,
    targets_of,
    weights_of,
    with_weights,
)
from odenets.depth.compression.positions import at_tokens
from odenets.depth.compression.units import Unit, lines_of

__all__ = ["SCORES", "longest_run", "replace_me", "scored"]

Score = Callable[[Tensor, Tensor], Tensor]
"""Of the states ``(N, D)`` before and behind a block, for each of N positions."""


def influence(x0: Tensor, x1: Tensor) -> Tensor:
    """One minus the cosine of the states, ``(N,)`` (block influence: Men et al. 2024, ShortGPT, eq. 2)."""
    return 1 - F.cosine_similarity(x0.float(), x1.float(), dim=-1)


def residue(x0: Tensor, x1: Tensor) -> Tensor:
    """The size of what a block adds over that of its state, ``(N,)``."""
    return (x1 - x0).float().norm(dim=-1) / x0.float().norm(dim=-1).clamp_min(1e-12)


SCORES: Mapping[str, Score] = {"influence": influence, "residue": residue}
"""Scores of single blocks by name."""


def _features(x: Tensor, tokens: Tensor | None) -> Tensor:
    """A state with a row for each position: tokens apart, without padding, and a sample of an image whole."""
    x = at_tokens(x, tokens)
    return x.flatten(0, -2) if x.ndim == 3 else x.flatten(1)


@torch.no_grad()
def scored(calls: Calls, score: Score) -> list[Candidate]:
    """Every block that may go, with its mean score in the place of an error."""
    found = []
    for line in lines_of(calls.units):
        if calls.units[line[0]].adds:
            continue
        totals, count = [0.0] * len(line), 0
        for b in range(len(calls.batches.inputs)):
            passages = calls.line(b, line)
            for n, passage in enumerate(passages):
                if calls.units[line[n]].keeps:
                    x0, x1 = (_features(x, calls.batches.tokens(b)) for x in (passage.x0, passage.x1))
                    totals[n] += score(x0, x1).sum().item()
            count += len(_features(passages[0].x1, calls.batches.tokens(b)))
        found += [
            Candidate(m, m + 1, "remove", error=total / count, saved=calls.units[m].macs)
            for m, total in zip(line, totals, strict=True)
            if calls.units[m].keeps
        ]
    return found


def longest_run(units: Sequence[Unit]) -> int:
    """Of how many ``units`` that may go the longest run is, one behind the other."""
    return max((_keeping(units, line[at:]) for line in lines_of(units) for at in range(len(line))), default=0)


def _keeping(units: Sequence[Unit], line: Sequence[int]) -> int:
    """How many of a line may go from its beginning on."""
    return next((n for n, m in enumerate(line) if not units[m].keeps or units[m].adds), len(line))


@torch.no_grad()
def replace_me(calls: Calls, remove: int) -> tuple[Candidate, ...]:
    """The run of so many blocks with the least cosine distance, and the linear map that stands for it.

    The map is put behind the last map of the block before the run, into which it goes, so that it costs nothing. Where
    the run begins a line, it is a linear layer of its own.

    Args:
        calls: of the network on the calibration data.
        remove: how many blocks go.

    Raises:
        ValueError: no run of so many blocks keeps the shape of the state.
    """
    least: tuple[float, list[int], int] | None = None
    for line in lines_of(calls.units):
        states = [calls.line(b, line) for b in range(len(calls.batches.inputs))]
        for at in range(len(line)):
            if _keeping(calls.units, line[at:]) < remove:
                continue
            distances = []
            for b, walk in enumerate(states):
                ends = walk[at].x0, walk[at + remove - 1].x1
                distances.append(influence(*(_features(x, calls.batches.tokens(b)) for x in ends)))
            distance = torch.cat(distances).mean().item()
            if math.isfinite(distance) and (least is None or distance < least[0]):
                least = distance, line, at
    if least is None:
        raise ValueError(
            f"remove must be at most {longest_run(calls.units)} blocks that follow each other and keep the shape of "
            f"the state for by='replaceme', got {remove}"
        )
    return _mapped(calls, *least, remove)


def _mapped(calls: Calls, distance: float, line: list[int], at: int, remove: int) -> tuple[Candidate, ...]:
    """The run from a position of a line, with the linear map in the block before it."""
    saved = sum(calls.units[m].macs for m in line[at : at + remove])
    before = at - 1
    last = calls.maps[line[before]] if before >= 0 else None
    if last is None or last.activation != calls.rectified(line[at + remove - 1]):
        return _seam(calls, distance, line, at, remove, saved)
    module = calls.modules[line[before]]
    layer = module.get_submodule(last.name)
    sums: NormalEquations | None = None
    for b in range(len(calls.batches.inputs)):
        walk = calls.line(b, line[: at + remove])
        own, end = walk[before], walk[at + remove - 1]
        output = own.of_map[1]
        target = last.target(own.before, output, end.before)
        rows, targets = (targets_of(layer, at_tokens(x, calls.batches.tokens(b))) for x in (output, target))
        sums = sums or NormalEquations(rows.shape[1], targets.shape[1], has_constant(layer))
        sums.add(rows, targets, held_out=calls.batches.held_out[b])
    assert sums is not None
    fit = sums.solve()
    changed = weights_of(layer) @ fit.weight
    fitted = last.put(module, changed[:-1], changed[-1] + fit.bias)
    start, stop = line[before], line[at + remove - 1] + 1
    return (Candidate(start, stop, "fit", start, fitted, distance, saved),)


def _seam(calls: Calls, distance: float, line: list[int], at: int, remove: int, saved: int) -> tuple[Candidate, ...]:
    """A linear layer in the place of a run, where no block before it can take the map."""
    m = line[at]
    layer = seam_for(calls.units[m], calls.modules[m], 1)
    run = Candidate(m, line[at + remove - 1] + 1, "remove", None, None, distance, saved)
    if layer is None:
        return (run,)
    weights = weights_of(layer)
    sums = NormalEquations(len(weights) - 1, weights.shape[1])
    for b in range(len(calls.batches.inputs)):
        walk = calls.line(b, line[: at + remove])
        end = walk[at + remove - 1]
        x0, batches = walk[at].x0, calls.batches
        add_rows(sums, layer, x0, end.before, x0, held_out=batches.held_out[b], tokens=batches.tokens(b))
    fit = sums.solve()
    seam = with_weights(layer, fit.weight, fit.bias)
    added = macs_of(layer, calls.units[m].shape)
    inner = nn.Sequential(seam, nn.ReLU()) if calls.rectified(line[at + remove - 1]) else seam
    return (replace(run, choice="seam 1x1", module=inner, saved=saved - added, added=added),)
