"""The walk of samples along the blocks of a flow, each by steps of its own size; those at one block go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from odenets.blocks import Block, Velocity, check_arguments, take_step
from odenets.flow import Flow
from odenets.inputs import rows as rows_of
from odenets.measures import StepFunction, needs_closing
from odenets.normalization import check_closing_statistics
from odenets.recording import check_values
from odenets.schemes.scheme import Scheme
from solvers import ButcherTableau, Step
from solvers.controllers import SampleController, SampleStates, check_returned
from solvers.field_calls import velocity
from solvers.reductions import combine

__all__ = ["NORMS", "Control", "ErrorEstimate", "FlowWalk", "Norm", "PredictionChange"]

Norm = Callable[[Tensor, Tensor], Tensor]
"""Of an error and the states it is of, both ``(B, *S)``, to a number for each sample, ``(B,)``."""
Rows = np.ndarray


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt()


NORMS: dict[str, Norm] = {
    "rms": lambda error, x: _rms(error),
    "raw": lambda error, x: torch.linalg.vector_norm(error.flatten(1), dim=1),
    "relative": lambda error, x: _rms(error) / _rms(x),
}


@dataclass(frozen=True)
class PredictionChange:
    """By how much errors change what layers make of states: half the sum over the classes, ``(B,)``.

    Attributes:
        layers: from a state to logits, one after the other.
    """

    layers: Sequence[nn.Module]

    def __call__(self, error: Tensor, x: Tensor) -> Tensor:
        """Of an ``error`` of states ``x``, both ``(B, *S)``."""
        with torch.no_grad():
            return (self._probabilities(x) - self._probabilities(x - error)).abs().sum(1) / 2

    def _probabilities(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"norm 'prediction' needs a network that returns logits (B, classes), got {got}")
        return x.softmax(1)


@dataclass(frozen=True)
class ErrorEstimate:
    """What tells the error of a step of a method.

    Attributes:
        way: "next", where the velocity at the end of the step is the first stage of the step that follows, with the
            weights of the block there; "step", of the stages of the step alone; or "preceding", the first stage beside
            that of the step before, which is known before the step is taken.
        weights: of the stages.
        order: q, where the error is ``O(h^(q+1))``.
    """

    way: Literal["next", "step", "preceding"]
    weights: tuple[float, ...]
    order: int

    @classmethod
    def of(cls, tableau: ButcherTableau, name: str) -> ErrorEstimate:
        """That of a ``name``: "next", "preceding", "embedded", or an embedded output of the method.

        Raises:
            ValueError: the method has none of that name, or the output is its own solution.
        """
        if name == "preceding":
            return cls(name, (-0.5, 0.5), 1)
        if name == "next":
            if tableau.fsal and tableau.error_weights is not None:
                return cls(name, tableau.error_weights, tableau.error_order)
            return cls(name, (-0.5, *[0.0] * (tableau.interior - 1), 0.5), 1)
        if name == "embedded":
            order = tableau.error_order  # raises where there is no lower solution
            return cls("step", cast(Any, tableau.error_weights), order)
        if name not in tableau.outputs or (low := tableau.solution(name)).b == tableau.b:
            others = [output for output in tableau.outputs if tableau.solution(output).b != tableau.b]
            names = ", ".join(map(repr, ("next", "preceding", "embedded", *others)))
            raise ValueError(f"error must be one of {names} for blocks of {tableau.name}, got {name!r}")
        weights = tuple(b - other for b, other in zip(tableau.b, low.b, strict=True))
        return cls("step", weights, min(tableau.order, low.order))

    def closing(self, tableau: ButcherTableau) -> bool:
        """Whether it reads the closing stages of the step itself."""
        return self.way == "step" and any(self.weights[tableau.interior :])


class Control:
    """What the controller remembers of every sample, from its first flow to its last; sizes are in units of time."""

    def __init__(self, samples: int, controller: SampleController, tolerance: float, norm: Norm) -> None:
        self.controller, self.tolerance, self.norm = controller, tolerance, norm
        self.size = np.zeros(samples)  # of the next attempt
        self.accepted = np.ones(samples, dtype=bool)
        self.errors = np.ones((2, samples))

    def judge(self, rows: Rows, error: Tensor, x: Tensor, size: float | np.ndarray, order: int) -> np.ndarray:
        """Take note of the errors of steps of a ``size`` that end in ``x``, and say which are within the tolerance.

        Args:
            rows: the samples.
            error: of the states, ``(n, *S)``.
            x: states behind the steps, ``(n, *S)``.
            size: of the steps.
            order: of the error.
        """
        value = check_values("norm", self.norm(error.detach(), x.detach()), x).cpu().double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(value > 0, value / self.tolerance, np.where(np.isnan(value), np.nan, 0.0))
        ratio = np.where(self.tolerance > 0, ratio, np.inf)
        errors = cast(Any, tuple(self.errors[:, rows]))
        before = SampleStates(np.broadcast_to(size, rows.shape).astype(float), self.accepted[rows], errors)
        after = self.controller.each(before, ratio, order)
        check_returned(after, SampleStates, self.controller)
        self.size[rows], self.accepted[rows] = after.h, after.accepted
        self.errors[:, rows] = np.stack(after.errors)
        return np.asarray(after.accepted)

    def go_on(self, rows: Rows) -> None:
        """Steps of one block are taken whatever their error: they count as accepted."""
        self.accepted[rows] = True


class FlowWalk:
    """The walk of some samples along a flow.

    Args:
        flow: of discrete blocks; its modes are the caller's.
        x: states before it, ``(B, *S)``.
        args: what the fields take besides; of tensors with a row for each sample those of the samples are taken.
        measures: of accepted steps, by name.

    Attributes:
        x: states, those behind the flow in the end.
        taken: of each block and sample, the number of blocks that the step from there spans, 0 where none begins,
            ``(blocks, B)``.
        rejected: attempts that were rejected, ``(blocks, B)``.
        evaluations: field evaluations of each sample, ``(B,)``.
        measured: by name, ``(blocks, B)``, 0 where no step begins.
    """

    def __init__(self, flow: Flow, x: Tensor, args: tuple[Any, ...], measures: Mapping[str, StepFunction]) -> None:
        flow.check_one_step("network", "no sample skips these; take Flow(solver='bs23') or its like")
        if isinstance(flow.tableau, Scheme):
            raise ValueError(
                f"network must hold Runge-Kutta flows, whose first velocity is the step's, got {flow.tableau.name}: "
                "take Flow(solver='bs23') or its like"
            )
        flow.materialize(x)
        self.flow, self.x, self.args = flow, x.clone(), args
        self.blocks = [cast(Block, block) for block in flow.blocks] * (flow.depth if flow.shared else 1)
        self.times = [flow.start]
        for h in flow.h:
            self.times.append(self.times[-1] + h)
        depth, samples = len(self.blocks), len(x)
        self.taken = np.zeros((depth, samples), dtype=np.int64)
        self.rejected = np.zeros((depth, samples), dtype=np.int64)
        self.evaluations = np.zeros(samples, dtype=np.int64)
        self.at = np.zeros(samples, dtype=np.int64)  # the block before which each sample stands
        self.aligned = False
        self.measures = measures
        self.measured = {name: torch.zeros(depth, samples, dtype=x.dtype, device=x.device) for name in measures}
        self.closing = any(needs_closing(measure) for measure in measures.values())
        self.first, self.known = torch.zeros_like(x), np.zeros(samples, dtype=bool)  # first stages, where known

    def follow(self, blocks: np.ndarray) -> None:
        """Steps as told: from block m sample i takes one of ``blocks[m, i]``."""
        for m in range(len(self.blocks)):
            here = np.flatnonzero(self.at == m)
            for k in np.unique(blocks[m, here]):
                rows = here[blocks[m, here] == k]
                self._accept(m, int(k), rows, self._take(m, int(k), rows, closing=False))

    def by_error(self, control: Control, estimate: ErrorEstimate, aligned: bool = False) -> None:
        """Steps whose sizes the error chooses; ``aligned`` ones are over 2, 4, 8 blocks from multiples of as many."""
        self.aligned = aligned
        go = self._by_preceding if estimate.way == "preceding" else self._by_trial
        for m in range(len(self.blocks)):
            if len(here := np.flatnonzero(self.at == m)):
                go(m, here, control, estimate)

    def _by_trial(self, m: int, here: Rows, control: Control, estimate: ErrorEstimate) -> None:
        """A step whose error is too large is taken back, and a smaller one taken from the same first stage."""
        spans = self._spans(m, control.size[here])
        while len(here):
            again: list[tuple[Rows, np.ndarray]] = []
            for k in map(int, np.unique(spans)):
                rows = here[spans == k]
                last = k == 1 and m + 1 == len(self.blocks)  # its error would decide nothing
                step = self._take(m, k, rows, closing=not last and estimate.closing(self.flow.tableau))
                if last:
                    self._accept(m, k, rows, step)
                    continue
                stages, following = step.stages, None
                if estimate.way == "next":
                    following = self._velocity_behind(m, k, rows, step)
                    stages = (*step.stages[: self.flow.tableau.interior], following)
                error = combine(torch.zeros_like(step.x1), stages, estimate.weights, step.h)
                good = control.judge(rows, error, step.x1, float(step.h), estimate.order)
                if k == 1:
                    control.go_on(rows)
                    good = np.ones_like(good)
                if good.any():
                    index = _index(good, step.x0)
                    self._accept(m, k, rows[good], step if good.all() else step.select(index))
                    if following is not None and m + k < len(self.blocks):
                        self._remember(rows[good], following[index])
                if not good.all():
                    bad = rows[~good]
                    self.rejected[m, bad] += 1
                    self._remember(bad, step.stages[0][_index(~good, step.x0)])
                    again.append((bad, self._spans(m, control.size[bad], k - 1)))
            here = np.concatenate([rows for rows, _ in again]) if again else here[:0]
            spans = np.concatenate([k for _, k in again]) if again else spans[:0]

    def _velocity_behind(self, m: int, k: int, rows: Rows, step: Step) -> Tensor:
        """The first stage of the block behind a step; at the end of the flow that of its last block."""
        block = min(m + k, len(self.blocks) - 1)
        return self._velocity(block, rows, self.times[m + k], step.x1)

    def _velocity(self, m: int, rows: Rows, t: float, x: Tensor) -> Tensor:
        """The first stage of a block at the states ``x`` of some samples."""
        self.evaluations[rows] += 1
        try:
            return velocity(cast(Any, self._fields(m, 1, rows)[0]), t, x)
        except TypeError:
            check_arguments(self.blocks[m].fields[0], self._args(rows))
            raise

    def _by_preceding(self, m: int, here: Rows, control: Control, estimate: ErrorEstimate) -> None:
        """The size of a step is chosen behind its first stage, which is compared with that of the step before."""
        before = self.first[_index(here, self.x)] if m else None  # of the preceding step
        x = self.x[_index(here, self.x)]
        first = self._velocity(m, here, self.times[m], x)
        if before is not None:
            sizes = self.times[m] - np.array([self.times[i] for i in self._begun[here]])
            shaped = torch.as_tensor(sizes, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
            error = combine(torch.zeros_like(x), (before, first), estimate.weights, 1.0) * shaped
            control.judge(here, error, x, sizes, estimate.order)
            control.go_on(here)
        self._remember(here, first)
        spans = self._spans(m, control.size[here])
        for k in map(int, np.unique(spans)):
            rows = here[spans == k]
            self._accept(m, k, rows, self._take(m, k, rows, closing=False))
            self._remember(rows, first[_index(spans == k, x)])
        self.known[here] = False  # they are those of steps that are done

    @property
    def _begun(self) -> np.ndarray:
        """The block from which the last step of each sample went."""
        blocks = np.arange(len(self.blocks))[:, None]
        return np.where(self.taken > 0, blocks, 0).max(0)

    def _spans(self, m: int, sizes: np.ndarray, most: int | None = None) -> np.ndarray:
        """Numbers of blocks from m on that take no longer than some sizes; 1 at least."""
        ends = np.array(self.times[m + 1 :]) - self.times[m]
        spans = np.searchsorted(ends, sizes * (1 + 1e-9), side="right").clip(1, most)
        if not self.aligned:
            return spans
        powers = np.array([2**i for i in range(spans.max().item().bit_length()) if m % 2**i == 0])
        return powers[np.searchsorted(powers, spans, side="right") - 1]

    def _args(self, rows: Rows) -> tuple[Any, ...]:
        return rows_of(self.args, _index(rows, self.x), len(self.x))

    def _fields(self, m: int, k: int, rows: Rows, closing: bool = False) -> list[Velocity]:
        block, tableau = self.blocks[m], self.flow.tableau
        if self.flow.stage_fields == "untied" and closing:
            check_closing_statistics(block.fields, tableau.interior, m)
        following = self.blocks[m + k] if m + k < len(self.blocks) else None
        return block.velocities(tableau, self.flow.stage_fields, following, self._args(rows))

    def _take(self, m: int, k: int, rows: Rows, closing: bool) -> Step:
        """A step over k blocks with the weights of the first; its evaluations count for the samples."""
        flow, index = self.flow, _index(rows, self.x)
        known, h = bool(self.known[rows].all()), flow.h[m] if k == 1 else math.fsum(flow.h[m : m + k])
        closing = (closing or self.closing) and flow.tableau.interior < flow.tableau.stages
        begin = self.times[m], self.x[index], h, flow.tableau, self.first[index] if known else None
        fields = self._fields(m, k, rows, closing)
        step = take_step(self.blocks[m], self._args(rows), fields, *begin, closing=closing)
        self.evaluations[rows] += len(step.stages) - known
        return step

    def _accept(self, m: int, k: int, rows: Rows, step: Step) -> None:
        index = _index(rows, self.x)
        self.x.index_copy_(0, index, step.x1)
        self.taken[m, rows], self.at[rows] = k, m + k
        for name, measure in self.measures.items():
            self.measured[name][m, index] = check_values(name, measure(step), step.x0).to(self.x.dtype)
        passes_on = self.flow.tableau.fsal and self.flow.passes_on and len(step.stages) == self.flow.tableau.stages
        self.known[rows] = False
        if passes_on:
            self._remember(rows, step.stages[-1])

    def _remember(self, rows: Rows, first: Tensor) -> None:
        self.first.index_copy_(0, _index(rows, self.x), first)
        self.known[rows] = True


def _index(rows: np.ndarray, x: Tensor) -> Tensor:
    """Some samples, indices or a mask, as indices of a tensor."""
    rows = np.flatnonzero(rows) if rows.dtype == bool else rows
    return torch.as_tensor(rows, device=x.device)
