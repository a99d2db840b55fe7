"""Runs of blocks: everything that may take their places, fitted to the states of the network as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from odenets.depth.compression.calls import Calls, Passage
from odenets.depth.compression.candidates import Candidate
from odenets.depth.compression.least_squares import NormalEquations
from odenets.depth.compression.linear_maps import (
    add_rows,
    has_constant,
    identity_of,
    is_dense,
    macs_of,
    seam_for,
    weights_of,
    with_weights,
)
from odenets.depth.compression.positions import at_tokens, number_of, weights_at
from odenets.depth.compression.replacements import scaled
from odenets.flow import Flow
from odenets.modes import total_dtype

__all__ = ["candidates_of"]

Walks = Sequence[Sequence[Passage]]
"""The passages of the states of each batch along a line."""


@torch.no_grad()
def candidates_of(
    calls: Calls, line: Sequence[int], *, choices: Iterable[str], kernels: Sequence[int], longest: int
) -> Iterator[Candidate]:
    """Everything that may take the place of runs of a ``line`` of units.

    Args:
        calls: of the network, on the data to fit and judge them.
        line: positions of units, each of which takes what the one before returns.
        choices: some of :data:`~odenets.depth.compression.candidates.CHOICES`.
        kernels: widths of the linear maps that are tried.
        longest: blocks of the longest run.
    """
    walks = []
    for b in range(len(calls.batches.inputs)):
        walks.append([replace(one, features=None, output=None) for one in calls.line(b, line)])
    wanted = {*choices}
    for at in range(len(line)):
        start = _Start(calls, line, at, walks, longest)
        if start.free and "remove" in wanted:
            yield start.removed()
        if "seam" in wanted:
            for kernel in kernels:
                yield from start.seams(kernel)
        for k, ends in start.kept().items():
            merged = start.merged(k, ends) if "merge" in wanted else {}
            fitted = start.fitted(k, ends) if "fit" in wanted else {}
            for end in ends:
                found = [each[end] for each in (merged, fitted) if end in each]
                if found:
                    yield min(found, key=lambda one: one.error)


@dataclass(frozen=True)
class _Start:
    """The runs that begin at one position of a line.

    Attributes:
        calls, line, walks: as above.
        at: the position.
        longest: blocks of the longest run.
    """

    calls: Calls
    line: Sequence[int]
    at: int
    walks: Walks
    longest: int

    @property
    def ends(self) -> list[int]:
        """Behind which positions of the line a run may end."""
        return [*range(self.at + 1, min(self.at + self.longest, len(self.line)) + 1)]

    @property
    def free(self) -> list[int]:
        """Those of runs of which every block may go."""
        return [end for end in self.ends if self._keep(self.at, end)]

    def _keep(self, first: int, last: int) -> bool:
        return all(self.calls.units[m].keeps for m in self.line[first:last])

    def kept(self) -> dict[int, list[int]]:
        """The positions of blocks that may stay alone, and the ends of their runs, whose states end as theirs do."""
        kept = {self.at: [end for end in self.ends[1:] if self._keep(self.at + 1, end)]}
        kept |= {end - 1: [end] for end in self.free[1:]}
        rectified = [self.calls.rectified(m) for m in self.line]
        return {k: [end for end in ends if rectified[end - 1] == rectified[k]] for k, ends in kept.items()}

    def _rows(self, k: int, width: int) -> int:
        """Rows that there are to fit a map of so many outputs; of fewer than features nothing comes."""
        batches = self.calls.batches
        walks = [(walk[k].before, batches.tokens(b)) for b, walk in enumerate(self.walks) if not batches.held_out[b]]
        return sum(number_of(before, width, tokens) for before, tokens in walks)

    def _saved(self, end: int) -> int:
        return sum(self.calls.units[m].macs for m in self.line[self.at : end])

    def _scale(self, end: int) -> float:
        """The sum of the squares of the states at an end, on the data that is held out."""
        return sum(self._size(b, self.walks[b][end - 1].before) for b in self._held_out) or 1.0

    @property
    def _held_out(self) -> list[int]:
        """The batches by which is judged."""
        return [b for b, out in enumerate(self.calls.batches.held_out) if out]

    def _size(self, b: int, x: Tensor) -> float:
        """The sum of the squares of ``x`` in a batch, weighed as errors at the state where the runs begin are."""
        tokens = self.calls.batches.tokens(b)
        x, weights = at_tokens(x, tokens), weights_at(self.walks[b][self.at].x0, tokens)
        x = x if weights is None else x * weights[..., None]
        return x.to(total_dtype(x.device)).square().sum().item()

    def _candidate(self, end: int, choice: str, **options: object) -> Candidate:
        return Candidate(self.line[self.at], self.line[end - 1] + 1, choice, **options)  # type: ignore[arg-type]

    def _add(self, sums: NormalEquations, layer: nn.Module, x: Tensor, y: Tensor, b: int) -> None:
        """Count what a ``layer`` should make ``y`` of ``x`` in a batch."""
        batches, x0 = self.calls.batches, self.walks[b][self.at].x0
        add_rows(sums, layer, x, y, x0, held_out=batches.held_out[b], tokens=batches.tokens(b))

    def removed(self) -> Candidate:
        """The block itself, left out."""
        lost, end = 0.0, self.at + 1
        for b in self._held_out:
            passage = self.walks[b][self.at]
            lost += self._size(b, passage.before - passage.x0)
        return self._candidate(end, "remove", error=lost / self._scale(end), saved=self._saved(end))

    def seams(self, kernel: int) -> Iterator[Candidate]:
        """Linear maps in the places of runs."""
        m, ends = self.line[self.at], self.free
        layer = seam_for(self.calls.units[m], self.calls.modules[m], kernel) if ends else None
        if layer is None:
            return
        features, width = weights_of(layer).shape
        if self._rows(self.at, width) < features:
            return
        sums = NormalEquations(features - 1, len(ends) * width)
        for b, walk in enumerate(self.walks):
            x0 = walk[self.at].x0
            targets = torch.cat([walk[end - 1].before - x0 for end in ends], -1 if is_dense(layer) else 1)
            self._add(sums, layer, x0, targets, b)
        macs = macs_of(layer, self.calls.units[m].shape)
        for n, end in enumerate(ends):
            if self._saved(end) <= macs:
                continue
            fit = sums.solve(columns=slice(n * width, (n + 1) * width))
            seam = with_weights(layer, fit.weight + identity_of(layer), fit.bias)
            module = nn.Sequential(seam, nn.ReLU()) if self.calls.rectified(self.line[end - 1]) else seam
            error = fit.error * sums.rows(held_out=True) * width / self._scale(end)
            name = f"seam {kernel}x{kernel}"
            yield self._candidate(end, name, module=module, error=error, saved=self._saved(end) - macs, added=macs)

    def _one(self, k: int, end: int, choice: str, module: nn.Module, error: float) -> Candidate:
        saved = self._saved(end) - self.calls.units[self.line[k]].macs
        return self._candidate(end, choice, kept=self.line[k], module=module, error=error, saved=saved)

    def _own(self, k: int, b: int) -> Passage:
        """How the state of a batch at the beginning of the runs passes the block at a position."""
        return self.calls.passage(b, self.line[k], self.walks[b][self.at].x0)

    def merged(self, k: int, ends: Sequence[int]) -> Mapping[int, Candidate]:
        """The block at a position with the time of the whole run, by the end of the run."""
        if not (ends and self.calls.units[self.line[self.at]].keeps):
            return {}
        errors = dict.fromkeys(ends, 0.0)
        longer = {end: self._longer(k, end) for end in ends}
        for b in self._held_out:
            walk = self.walks[b]
            for end, module in longer.items():
                x1 = self.calls.output(b, self.line[k], walk[self.at].x0, module)
                errors[end] += self._size(b, x1 - walk[end - 1].x1)
        return {end: self._one(k, end, "merge", longer[end], errors[end] / self._scale(end)) for end in ends}

    def _longer(self, k: int, end: int) -> nn.Module:
        """The block at a position with the time of a run, from that at which the run begins."""
        module, first = self.calls.modules[self.line[k]], self.calls.modules[self.line[self.at]]
        start = first.start if isinstance(first, Flow) else None
        return scaled(module, self.calls.units[self.line[k]], self._times(k, end), start)

    def _times(self, k: int, end: int) -> float:
        """How many times as long as the step of the block at a position a run is."""
        run = [self.calls.modules[m] for m in self.line[self.at : end]]
        own = self.calls.modules[self.line[k]]
        if isinstance(own, Flow) and all(isinstance(one, Flow) for one in run):
            return sum(one.total_time for one in run if isinstance(one, Flow)) / own.total_time
        return float(end - self.at)

    def fitted(self, k: int, ends: Sequence[int]) -> Mapping[int, Candidate]:
        """The block at a position, its last linear map fitted to the whole run, by the end of the run."""
        last, module = self.calls.maps[self.line[k]], self.calls.modules[self.line[k]]
        if last is None or not ends:
            return {}
        layer = module.get_submodule(last.name)
        width = len(last.scale)
        if self._rows(k, width) < len(weights_of(layer)):
            return {}
        sums = NormalEquations(len(weights_of(layer)) - 1, len(ends) * width, has_constant(layer))
        for b, walk in enumerate(self.walks):
            own = self._own(k, b)
            features, output = own.of_map
            targets = [last.target(own.before, output, walk[end - 1].before) for end in ends]
            self._add(sums, layer, features, torch.cat(targets, last.axis), b)
        found = {}
        for n, end in enumerate(ends):
            fit = sums.solve(last.prior(layer), columns=slice(n * width, (n + 1) * width))
            of_flow = isinstance(module, Flow)  # whose step scales the map
            base, h = (self._longer(k, end), self._times(k, end)) if of_flow else (module, 1.0)
            error = fit.error * sums.rows(held_out=True) * width / self._scale(end)
            found[end] = self._one(k, end, "fit", last.put(base, fit.weight / h, fit.bias / h), error)
        return found
