"""A checked solve: its steps taken and collected, with one step size for the batch or one per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.batch_loop import adaptive_steps, fixed_steps, span
from solvers.errors import SolverError
from solvers.events import Event, change, crossing, crossings, link, until, values
from solvers.interpolation import interpolant
from solvers.sample_loop import SampleLoop
from solvers.solution import SampleSolution, Solution, Statistics, Status
from solvers.step import Field, Step, advance, beside, check_unchanged, versions_of
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import exact

__all__ = ["Task", "follow"]


class Task(NamedTuple):
    """What is to be solved, checked.

    Attributes:
        field: velocity ``v(t, x)`` of a state that is one tensor; of :func:`~solvers.sample_loop.within` per sample.
        x0: the first state.
        t0, t1: numbers, or with a step size per sample arrays ``(B,)`` float64.
        tableau: the method.
        steps: the number of equal steps, or None for error control.
        tolerance, controller: of error control.
        keep: "last", "states" or "steps".
        event: ``(t, x)`` to a tensor, or None.
        raises: whether a solve that cannot go on raises.
        unpack: a state as the caller gave it.
        per_sample: whether every sample has its own time and step size.
    """

    field: Field
    x0: Tensor
    t0: Any
    t1: Any
    tableau: ButcherTableau
    steps: int | None
    tolerance: Tolerance
    controller: Any
    keep: str
    event: Event | None
    raises: bool
    unpack: Callable[[Tensor], Any]
    per_sample: bool = False

    def solve(self) -> Solution:
        """Solve it."""
        return _solve_samples(self) if self.per_sample else _solve_batch(self)

    @property
    def grid(self) -> list[float]:
        """The times of equal steps; no steps in no time."""
        assert self.steps is not None
        if self.t0 == self.t1:
            return [self.t0]
        return [self.t0 + (self.t1 - self.t0) * i / self.steps for i in range(self.steps)] + [self.t1]


def _solve_batch(task: Task) -> Solution:
    """With one time and one step size for the batch."""
    stats, x, t = Statistics(), task.x0, task.t0
    watched = task.event is not None
    if task.steps is not None:
        grid = task.grid
        if task.keep == "last" and not watched:
            for start, end in pairwise(grid):
                x = advance(task.field, start, x, span(start, end), task.tableau)
            stats = Statistics((len(grid) - 1) * task.tableau.interior, len(grid) - 1)
            return Solution((task.t1,), (task.unpack(x),), (), stats)
        loop = fixed_steps(task.field, x, grid, task.tableau, closing=watched or task.keep == "steps", stats=stats)
    else:
        loop = adaptive_steps(task.field, x, t, task.t1, task.tableau, task.tolerance, task.controller, stats=stats)
    kept, costs = _Kept(task, [t], [x]), task.tableau.dense is None
    try:
        event = until(task.event, t, x) if task.event is not None else None
        value = 1.0 if event is None else values(event, t, x)
        if value <= 0:
            return kept.solution(stats, "event", exact(t, x.device))
        for step in loop:
            t, x = float(step.t + step.h), step.x1
            if event is not None:
                before, value = value, values(event, t, x)
                found = change(step, partial(interpolant, step, task.field), event, before, value, costs=costs)
                if found is not None:
                    inside, _, low, high = found
                    t = step.t + crossing(step, inside, event, _width(step), low, high) * step.h
                    time, x = link(task.field, event, exact(t, x.device), inside((t - step.t) / step.h))
                    kept.add(t, x, step)
                    return kept.solution(stats, "event", time)
            kept.add(t, x, step)
    except SolverError as error:
        error.solution = kept.solution(replace(stats), error.status)
        if task.raises:
            raise
        return error.solution
    kept.times[-1] = task.t1
    return kept.solution(stats)


@dataclass
class _Kept:
    """What is kept of a solve on its way."""

    task: Task
    times: list[Any]
    states: list[Tensor]

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self.versions: list[list[int] | None] = []
        self.samples: list[Tensor] = []

    def add(self, t: Any, x: Tensor, step: Step) -> None:
        """A step, and where it leads."""
        if self.task.keep == "last":
            self.times[-1], self.states[-1] = t, x
            return
        self.times.append(t)
        self.states.append(x)
        if self.task.keep == "steps":
            self.steps.append(step)
            self.versions.append(versions_of(step.stages))

    def solution(self, stats: Statistics, status: Status = "finished", event_time: Tensor | None = None) -> Solution:
        """As the caller sees it."""
        return Solution(*self._common(stats, status, event_time))

    def sample_solution(self, loop: SampleLoop, status: Any, event_time: Tensor | None) -> SampleSolution:
        """The same, with control per sample."""
        counts = loop.stats
        stats = Statistics(loop.calls, int(counts.accepted.sum()), int(counts.rejected.sum()))
        _, *common = self._common(stats, status, event_time)
        times = tuple(exact(t, torch.device("cpu")) for t in self.times)
        return SampleSolution(
            times,
            *common,
            samples=tuple(self.samples),
            sample_stats=counts,
        )

    def _common(self, stats: Statistics, status: Any, event_time: Tensor | None) -> tuple[Any, ...]:
        for step, versions in zip(self.steps, self.versions, strict=True):
            check_unchanged(step.stages, versions)
        dense = self.task.field if self.task.keep == "steps" else None
        states = tuple(self.task.unpack(x) for x in self.states)
        common = (tuple(self.times), states, tuple(self.steps), stats, status, event_time)
        return *common, dense, self.task.unpack, self.task.x0


def _width(step: Step) -> float:
    """How close in time an event in a step is found: the resolution of time there, or that of a part of the step."""
    span = max(float(torch.as_tensor(t).detach().abs().max()) for t in (step.t, step.t + step.h))
    size, kind = torch.as_tensor(step.h).detach(), step.h.dtype if isinstance(step.h, Tensor) else torch.float64
    return max(torch.finfo(kind).eps * float(size.abs().max()), torch.finfo(torch.float64).eps * span, 1e-300)


def _solve_samples(task: Task) -> SampleSolution:
    """With a time and a step size per sample."""
    loop = SampleLoop(
        task.field, task.x0, task.t0, task.t1, task.tableau, task.tolerance, task.controller, raises=task.raises
    )
    kept, costs = _Kept(task, [loop.t], [loop.states]), task.tableau.dense is None
    event, times, value = None, None, np.ones_like(loop.t)
    met = np.zeros_like(loop.moving)
    if task.event is not None:
        event, begin = until(task.event, beside(loop.t, task.x0), task.x0, each=True), beside(loop.t, task.x0)
        value = values(event, begin, task.x0)
        met = value <= 0
        times = exact(np.where(met, loop.t, np.nan), task.x0.device)
        loop.stop(met)
    before = loop.t
    try:
        for step, accepted, t, x in loop.rounds():
            if event is not None and times is not None:
                end = values(event, beside(t, x), x, accepted)
                found = change(step, partial(interpolant, step, loop.field), event, value, end, accepted, costs=costs)
                value = np.where(accepted, end, value)
                if found is not None:
                    now, times, t, x = _at_events(loop, step, event, found, before, times, (t, x))
                    loop.move(now, t, x)
                    met = met | now
            before = t
            if task.keep == "steps":
                samples = torch.from_numpy(accepted).nonzero().flatten()
                kept.samples.append(samples)
                step = step if len(samples) == len(x) else step.of_samples(samples.to(x.device))
            kept.add(t, x, step)
    except SolverError as error:
        error.solution = kept.sample_solution(loop, _status(loop, met, error), times)
        raise
    return kept.sample_solution(loop, _status(loop, met), times)


def _status(loop: SampleLoop, met: np.ndarray, error: SolverError | None = None) -> tuple[Status, ...]:
    found: list[Status] = ["event" if m else "finished" for m in met.tolist()]
    for i, failure in {**loop.failures, **({error.sample: error} if error else {})}.items():
        if i is not None:
            found[i] = failure.status
    return tuple(found)


def _at_events(
    loop: SampleLoop,
    step: Step,
    event: Event,
    found: tuple[Callable[[Any], Tensor], Any, Any, Any],
    before: np.ndarray,
    times: Tensor,
    after: tuple[np.ndarray, Tensor],
) -> tuple[np.ndarray, Tensor, np.ndarray, Tensor]:
    """The samples that meet their event inside the step, the event times, and times and states with those moved there.

    Args:
        loop: the solve.
        step: the step.
        event: positive until the event, ``(B,)``.
        found: the result of :func:`~solvers.events.change`.
        before: times at the start of the step, ``(B,)``.
        times: event times so far, ``(B,)``.
        after: times and states at the end of the step.
    """
    inside, now, low, high = found
    t, x = after
    theta = crossings(step, inside, event, _width(step), low, high, now)
    at = np.where(now, before + theta * (t - before), t)
    mask = torch.from_numpy(now).to(x.device)
    s = exact(at, x.device).view_as(step.h)  # type: ignore[arg-type]
    s, end = link(loop.field, event, s, inside(beside(theta, x)), mask)
    return now, torch.where(mask, s.flatten(), times), at, torch.where(beside(now, x), end, x)


def follow(task: Task, found: Solution, x: Tensor) -> Solution:
    """``found`` with its last state replaced by ``x``, which carries the gradient, and so its event time."""
    time = found.event_time
    if time is not None and task.event is not None:
        if isinstance(found, SampleSolution):
            event = until(task.event, beside(task.t0, task.x0), task.x0, each=True)
            ends = found.times[-1].numpy().astype(np.float64)
            moved = ~time.isnan() & torch.from_numpy(ends != task.t0).to(time.device)
            s = exact(ends, x.device).view(-1, *[1] * (x.ndim - 1))
            s, x = link(task.field, event, s, x, moved)
            time = torch.where(moved, s.flatten(), time)
        elif found.times[-1] != task.t0:
            time, x = link(task.field, until(task.event, task.t0, task.x0), time, x)
    return replace(found, times=found.times[-1:], states=(task.unpack(x),), event_time=time)
