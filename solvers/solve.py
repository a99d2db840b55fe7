"""A checked solve: its steps taken and collected, with one step size for the batch or one per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.errors import SolverError
from solvers.events import Event, crossing, crossings, link, until
from solvers.interpolation import interpolant
from solvers.samples import SampleLoop
from solvers.solution import SampleSolution, Solution, Statistics, Status
from solvers.states import real_dtype
from solvers.step import Field, Step, advance, beside
from solvers.stepping import adaptive_steps, fixed_steps
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance

__all__ = ["Task", "follow"]


class Task(NamedTuple):
    """What is to be solved, checked.

    Attributes:
        field: velocity ``v(t, x)`` of a state that is one tensor.
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
        """The times of equal steps."""
        assert self.steps is not None
        return [self.t0 + (self.t1 - self.t0) * i / self.steps for i in range(self.steps)] + [self.t1]


def _solve_batch(task: Task) -> Solution:
    """With one time and one step size for the batch."""
    stats, x, t = Statistics(), task.x0, task.t0
    watched = task.event is not None
    if task.steps is not None:
        grid = task.grid
        if task.keep == "last" and not watched:
            for start, end in pairwise(grid):
                x = advance(task.field, start, x, end - start, task.tableau)
            stats = Statistics(task.steps * task.tableau.interior, task.steps)
            return Solution((task.t1,), (task.unpack(x),), (), stats)
        loop = fixed_steps(task.field, x, grid, task.tableau, closing=watched or task.keep == "steps", stats=stats)
    else:
        loop = adaptive_steps(task.field, x, t, task.t1, task.tableau, task.tolerance, task.controller, stats=stats)
    kept = _Kept(task, [t], [x])
    try:
        event = until(task.event, t, x) if task.event is not None else None
        if event is not None and _met(event, t, x):
            return kept.solution(stats, "event", torch.tensor(t, dtype=torch.float64, device=x.device))
        for step in loop:
            t, x = float(step.t + step.h), step.x1
            if event is not None and _met(event, t, x):
                time, x = _at_event(task, step, event)
                kept.add(float(time.detach()), x, step)
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

    def solution(self, stats: Statistics, status: Status = "finished", event_time: Tensor | None = None) -> Solution:
        """As the caller sees it."""
        return Solution(*self._common(stats, status, event_time))

    def sample_solution(self, loop: SampleLoop, status: Any, event_time: Tensor | None) -> SampleSolution:
        """The same, with control per sample."""
        counts = loop.stats
        stats = Statistics(loop.calls, int(counts.accepted.sum()), int(counts.rejected.sum()))
        _, *common = self._common(stats, status, event_time)
        times = tuple(torch.from_numpy(t) for t in self.times)
        return SampleSolution(
            times,
            *common,
            samples=tuple(self.samples),
            sample_stats=counts,
        )

    def _common(self, stats: Statistics, status: Any, event_time: Tensor | None) -> tuple[Any, ...]:
        dense = self.task.field if self.task.keep == "steps" else None
        states = tuple(self.task.unpack(x) for x in self.states)
        common = (tuple(self.times), states, tuple(self.steps), stats, status, event_time)
        return *common, dense, self.task.unpack, self.task.x0


def _met(event: Event, t: Any, x: Tensor) -> bool:
    with torch.no_grad():
        return float(event(t, x)) <= 0


def _width(step: Step) -> float:
    """How close in time an event in a step is found: the resolution of the state's precision there."""
    span = max(float(torch.as_tensor(t).abs().max()) for t in (step.t, step.t + step.h))
    return torch.finfo(step.x0.dtype).eps * max(span, 1e-30)


def _at_event(task: Task, step: Step, event: Event) -> tuple[Tensor, Tensor]:
    inside = interpolant(step, task.field)
    with torch.no_grad():
        theta = crossing(step, inside, event, _width(step))
    time = torch.tensor(step.t + theta * step.h, dtype=torch.float64, device=step.x0.device)
    return link(task.field, event, time, inside(theta))


def _solve_samples(task: Task) -> SampleSolution:
    """With a time and a step size per sample."""
    loop = SampleLoop(
        task.field, task.x0, task.t0, task.t1, task.tableau, task.tolerance, task.controller, raises=task.raises
    )
    kept = _Kept(task, [loop.t], [loop.states])
    event, times = None, None
    met = np.zeros_like(loop.moving)
    if task.event is not None:
        event = until(task.event, beside(loop.t, task.x0), task.x0, each=True)
        met = _met_by(event, loop.t, loop.states)
        times = torch.from_numpy(np.where(met, loop.t, np.nan)).to(task.x0.device)
        loop.stop(met)
    try:
        for step, accepted, t, x in loop.rounds():
            if event is not None and times is not None:
                now = accepted & _met_by(event, t, x)
                if now.any():
                    times, t, x = _at_events(task, loop.field, step, event, now, times, t, x)
                    loop.move(now, t, x)
                    met = met | now
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


def _met_by(event: Event, t: np.ndarray, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.array((event(beside(t, x), x) <= 0).tolist())


def _at_events(
    task: Task, field: Field, step: Step, event: Event, now: np.ndarray, times: Tensor, t: np.ndarray, x: Tensor
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Event times, times and states, where the samples ``now`` are moved to their event inside the step."""
    inside = interpolant(step, field)
    with torch.no_grad():
        theta = crossings(step, inside, event, _width(step))
    mask = torch.from_numpy(now).to(x.device)
    s, x_event = link(field, event, (step.t + theta * step.h).double(), inside(theta), mask)
    times = torch.where(mask, s.flatten(), times)
    at = np.where(now, np.array(s.detach().flatten().tolist()), t)
    return times, at, torch.where(beside(now, x), x_event, x)


def follow(task: Task, found: Solution, x: Tensor) -> Solution:
    """``found`` with its last state replaced by ``x``, which carries the gradient, and so its event time."""
    time = found.event_time
    if time is not None and task.event is not None:
        if isinstance(found, SampleSolution):
            event = until(task.event, beside(task.t0, task.x0), task.x0, each=True)
            ends = found.times[-1].numpy()
            moved = ~time.isnan() & torch.from_numpy(ends != task.t0).to(time.device)
            s = beside(ends, x).double()
            field: Field = lambda t, x: task.field(t.to(real_dtype(x)), x)  # type: ignore[union-attr]  # noqa: E731
            s, x = link(field, event, s, x, moved)
            time = torch.where(moved, s.flatten(), time)
        elif found.times[-1] != task.t0:
            time, x = link(task.field, until(task.event, task.t0, task.x0), time, x)
    return replace(found, times=found.times[-1:], states=(task.unpack(x),), event_time=time)
