"""Error control per sample: one batch in which every sample has its own time and step size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.controllers import SampleController, SampleStates, check_returned
from solvers.errors import SolverError, failure
from solvers.field_calls import Field, velocity
from solvers.first_step import first_step
from solvers.solution import SampleStatistics
from solvers.step import Step
from solvers.steppers import Stepper, stepper
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype, to_state_shape

__all__ = ["Round", "SampleLoop", "align", "within"]

Array = np.ndarray

_OF_ONE_NUMBER = ("full", "Boolean value of Tensor", "converted to Scalar", "only one element", "fill_value")
"""What errors of a field say that takes its time for a number."""


class Round(NamedTuple):
    """One attempted step of every sample.

    Attributes:
        step: the step, with ``t`` and ``h`` of shape ``(B, 1, ..., 1)``; of no meaning for samples that finished.
        accepted: the samples that took it, ``(B,)``.
        t: time of each sample after it, ``(B,)`` float64.
        x: state of each sample after it, ``(B, *S)``.
    """

    step: Step
    accepted: Array
    t: Array
    x: Tensor


@dataclass(kw_only=True, eq=False)
class SampleLoop:
    """The adaptive loop with a time and a step size per sample.

    Times and step sizes are float64 arrays on the host, where the controller works on all of them at once; the device
    is waited for once per attempt. A finished sample stays in the batch and takes steps of size 0 until the last has
    finished, so that whatever the field knows of its samples, by position, stays true. The field is evaluated within
    ``[t0, t1]`` of each sample, rounded to the precision of the state. An interval too short for a number of that
    precision is over at once.

    Attributes:
        field: velocity ``v(t, x)``, with ``t`` of shape ``(B, 1, ..., 1)``, as :func:`within` makes it.
        x: the states, ``(B, *S)``.
        t, t1: time and end of each sample, ``(B,)`` float64.
        tableau, tolerance, controller: the method, what it accepts, how it chooses its steps.
        raises: whether a sample that cannot go on ends the solve; else it stays where it is and the others go on.
        take: what takes the steps, if not what the method is taken by.
        stops: times at which a step of a sample ends, ``(B, n)`` in the order of the solve.
    """

    field: Field
    x: Tensor
    t: Array
    t1: Array
    tableau: ButcherTableau
    tolerance: Tolerance
    controller: SampleController
    raises: bool = True
    take: Stepper | None = None
    stops: Array | None = None

    def __post_init__(self) -> None:
        self.tolerance.check_per_sample(self.x)
        self.direction = np.where(self.t1 >= self.t, 1.0, -1.0)
        self.t1 = np.where(_over_at_once(self.t, self.t1, self.x), self.t, self.t1)
        self.moving = self.t != self.t1
        self.calls, self.counts = 0, np.zeros((3, len(self.x)), dtype=np.int64)
        self.failures: dict[int, SolverError] = {}
        self._hopeless: Array | bool = False
        self._unfound: Array | None = None
        self._parked: list[tuple[Tensor, Tensor]] = []
        self._t = self.t

    @property
    def stats(self) -> SampleStatistics:
        """The counts of each sample."""
        return SampleStatistics(*torch.from_numpy(self.counts.copy()))

    @property
    def states(self) -> Tensor:
        """The state of each sample, ``(B, *S)``."""
        x = self.x
        for samples, before in self._parked:
            x = torch.where(samples, before, x)
        return x

    def rounds(self) -> Iterator[Round]:
        """The attempts that took some sample on, until all have finished.

        Raises:
            StepUnderflowError, MaxStepsError, NonFiniteError: a sample cannot go on, where that raises.
        """
        order, take = self.tableau.error_order, self.take or stepper(self.tableau, self.tolerance, each=True)
        if not self.moving.any():
            return
        first = velocity(self.field, to_state_shape(self.t, self.x), self.x)
        self.count(1)
        states = self._first_states(first, order)
        ratio, bad_stage = np.full_like(self.t, np.nan), np.where(np.isfinite(states.h), -1, 0)
        attempts, largest = 0, min(self.tolerance.max_step, torch.finfo(to_state_shape(self.t, self.x).dtype).max)
        while self.moving.any():
            size = np.clip(states.h, self.tolerance.min_step, largest)
            goal = self._goal()
            left = np.abs(goal - self.t)
            smallest = 10 * np.spacing(np.abs(self.t))
            near = left <= smallest
            self._fail_where_stuck(size, smallest, near, ratio, bad_stage, attempts)
            if not self.moving.any():
                return
            last = (size >= left) | near
            h = self.direction * np.where(self.moving, np.where(last, left, size), 0.0)
            calls = take.calls
            step = take(self.field, to_state_shape(self._t, self.x), self.x, to_state_shape(h, self.x), first)
            self.count(take.calls - calls)
            attempts += 1
            with torch.no_grad():
                ratio = self.tolerance.ratios(step)
            finite = np.isfinite(ratio) | ~self.moving
            before, clipped = states, last & (goal != self.t1)
            states = self.controller.each(states._replace(h=np.abs(h)), ratio, order)
            check_returned(states, SampleStates, self.controller)
            if self.tolerance.min_step:
                near = near | (np.minimum(size, np.abs(h)) <= self.tolerance.min_step)
            taken = self.moving & (states.accepted | near)
            accepted = taken & finite
            if not finite.all():
                bad_stage = np.where(finite, bad_stage, step.not_finite())
                self._unfound = step.unsolved
                self._hopeless = taken & ~finite  # no smaller step is allowed, or chosen by the controller
                if torch.is_grad_enabled():  # a NaN beside good samples would reach their gradients: all try again
                    states = states._replace(h=np.where(accepted, np.abs(h), states.h), errors=before.errors)
                    accepted = np.zeros_like(accepted)
            self.counts[1] += accepted
            self.counts[2] += self.moving & ~accepted
            if not accepted.any():
                first = step.stages[0]
                continue
            if clipped.any():  # by a stop, not by the error: what comes behind it may be as large as before
                states = states._replace(h=np.where(clipped & accepted, np.maximum(states.h, before.h), states.h))
            calls = take.calls
            take.accept(accepted)
            self.count(take.calls - calls)
            everyone = bool(accepted.all())  # a sample at rest may have no finite velocity
            took = to_state_shape(accepted, self.x)
            self.x = step.x1 if everyone else torch.where(took, step.x1, self.x)
            first = step.stages[-1] if self.tableau.fsal else None
            if first is not None and not everyone:
                first = torch.where(took, first, step.stages[0])
            self.t = np.where(accepted, np.where(last, goal, self.t + h), self.t)
            self._t = np.where(accepted, self.t, self._t) if self._parked else self.t
            self.moving = self.moving & (self.t != self.t1)
            yield Round(step, accepted, self.t, self.states)

    def _goal(self) -> Array:
        """Where the step of each sample ends at the latest."""
        if self.stops is None:
            return self.t1
        ahead = self.direction[:, None] * (self.stops - self.t[:, None])
        next_one = np.where(ahead > 0, ahead, np.inf).argmin(1)
        stop = np.take_along_axis(self.stops, next_one[:, None], 1)[:, 0]
        return np.where((ahead > 0).any(1), stop, self.t1)

    def stop(self, samples: Array) -> None:
        """Let the samples of a mask ``(B,)`` go no further."""
        self.moving = self.moving & ~samples

    def move(self, samples: Array, t: Array, x: Tensor) -> None:
        """Let the samples of a mask end at the times and states given for them."""
        self.t = self._t = t
        self.x = torch.where(to_state_shape(samples, x), x, self.x)
        self.stop(samples)

    def count(self, calls: int, samples: Array | None = None) -> None:
        """Field calls, made for some samples, by position, or for those that move."""
        self.calls += calls
        if samples is None:
            self.counts[0] += calls * self.moving
        else:
            self.counts[0][np.unique(samples)] += calls

    def _first_states(self, first: Tensor, order: int) -> SampleStates:
        h = np.full_like(self.t, self.tolerance.first_step or 0.0)
        if self.tolerance.first_step is None:
            left = np.abs(self.t1 - self.t)
            h = first_step(self.field, self.t, self.x, first, self.direction, order, left, self.tolerance)
            self.count(1)
        ones = np.ones_like(self.t)
        return SampleStates(h, np.ones_like(self.moving), (ones, ones))

    def _fail_where_stuck(
        self, size: Array, smallest: Array, near: Array, ratio: Array, bad_stage: Array, attempts: int
    ) -> None:
        stuck = self.moving & (~(near | (size >= smallest)) | self._hopeless)
        over = attempts >= self.tolerance.max_steps
        if over:
            stuck = self.moving.copy()
        for i in map(int, stuck.nonzero()[0]):
            finite = bool(np.isfinite(ratio[i]))
            if finite and np.isnan(size[i]) and not over:
                raise ValueError(f"controller must return step sizes h >= 0, got nan from {self.controller!r:.80}")
            newton = self._unfound is not None and self._unfound[i] >= 0
            error = failure(
                "max_steps" if over else "underflow" if finite else "newton" if newton else "not_finite",
                t=float(self.t[i]), h=float(self.direction[i] * size[i]), sample=i, ratio=ratio[i], attempts=attempts,
                stage=int(bad_stage[i]) if bad_stage[i] >= 0 else None, t1=self.t1[i], smallest=smallest[i],
                implicit=self.tableau.implicit,
            )  # fmt: skip
            if self.raises:
                raise error
            self.failures[i] = error
        self.stop(stuck)
        if stuck.any() and self.moving.any():
            self._park(stuck)

    def _park(self, samples: Array) -> None:
        """Put samples beside one that goes on, so that no NaN of theirs reaches a gradient; keep their states."""
        other = int(self.moving.nonzero()[0][0])
        mask = to_state_shape(samples, self.x)
        self._parked.append((mask, self.x))
        self.x = torch.where(mask, self.x[other].detach(), self.x)
        self._t = np.where(samples, self.t[other], self._t)


def align(accepted: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """Starts and sizes of the accepted steps, the k-th of every sample in row k; behind its last a sample has size 0.

    Args:
        accepted, start, end: of each round, ``(rounds, B)``.

    Returns:
        Two arrays ``(n, B)``.
    """
    order = np.argsort(~accepted, axis=0, kind="stable")[: accepted.sum(0).max(initial=0)]
    taken, start, end = (np.take_along_axis(v, order, 0) for v in (accepted, start, end))
    return np.where(taken, start, end), np.where(taken, end - start, 0.0)


def within(field: Field, t0: Array, t1: Array, x: Tensor) -> Field:
    """The field at times in the precision of the state and within the interval of each sample.

    It gets a tensor of its own, so that no write of its own reaches the times of a solve.
    """
    real, (low, high) = real_dtype(x), _inward(np.minimum(t0, t1), np.maximum(t0, t1), x)

    def velocity(t: float | Tensor, x: Tensor) -> Tensor:
        try:
            return field(t.to(real).clamp(low, high), x)  # type: ignore[union-attr] - a tensor here
        except (TypeError, RuntimeError, ValueError) as error:
            if any(what in str(error) for what in _OF_ONE_NUMBER):
                shape = (len(x), *[1] * (x.ndim - 1))
                error.add_note(
                    f"with control='sample' t is a tensor {shape}, a time for each sample, and no number: take "
                    "t.expand_as(x[:, :1]) for torch.full_like(x[:, :1], t), torch.where(t < 0.5, a, b) for an if"
                )
            raise

    return velocity


def _over_at_once(t0: Array, t1: Array, x: Tensor) -> Array:
    """The samples whose interval is 0 in the precision of the step sizes, ``(B,)``."""
    with np.errstate(over="ignore"):
        return np.abs(t1 - t0).astype(np.float64 if real_dtype(x) == torch.float64 else np.float32) == 0


def _inward(low: Array, high: Array, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds in the precision of the state, inside ``[low, high]`` where a number of that precision lies there."""
    real = real_dtype(x)
    if real != torch.float64:
        narrow = [(low, np.inf), (high, -np.inf)]
        low, high = (_rounded(exact, np.float32(end)) for exact, end in narrow)
        low, high = np.minimum(low, high), np.maximum(low, high)
    bounds = (to_state_shape(low, x), to_state_shape(high, x))
    if real.itemsize == 4 or real == torch.float64:
        return bounds
    lows, highs = (b.cpu().to(real) for b in bounds)
    ends = (torch.full_like(lows, torch.inf), torch.full_like(lows, -torch.inf))
    lows = torch.where(lows < bounds[0].cpu(), torch.nextafter(lows, ends[0]), lows)
    highs = torch.where(highs > bounds[1].cpu(), torch.nextafter(highs, ends[1]), highs)
    return torch.minimum(lows, highs).to(x.device), torch.maximum(lows, highs).to(x.device)


def _rounded(exact: Array, towards: np.float32) -> Array:
    """As float32, not on the other side of the exact number than ``towards``, an infinity."""
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    return np.where((near < exact) if towards > 0 else (near > exact), np.nextafter(near, towards), near)
