"""A checked solve: its steps taken and collected, with one step size for the batch or one per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.batch_loop import Observer, adaptive_steps, fixed_steps, span
from solvers.errors import SolverError, Status
from solvers.events import Event, attach_event_gradient, crossing, first_crossing_fn, values
from solvers.field_calls import Field, check_unchanged, versions_of
from solvers.interpolation import Interpolant, SampleInterpolant, interpolant
from solvers.outputs import BatchOutputs, SampleOutputs
from solvers.runge_kutta import step_state
from solvers.sample_loop import SampleLoop
from solvers.solution import SampleSolution, Solution, Statistics
from solvers.step import Step
from solvers.steppers import Stepper
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import exact, to_state_shape

__all__ = ["Grid", "Task", "even_grid", "with_gradient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Fixed steps.

    Attributes:
        times: the ends of the steps, numbers or scalar tensors that gradients flow to.
        numbers: these tensors as numbers, where outputs or events lie between them.
        inward: whether the field is evaluated just inside a step, at its first and last instant.
        linear: whether the state is linear inside a step.
    """

    times: Iterable[Any]
    numbers: Sequence[float] | None = None
    inward: bool = False
    linear: bool = False


def even_grid(t0: float, t1: float, steps: int) -> Grid:
    """Equal steps; none in no time."""
    if t0 == t1:
        return Grid(times=[t0])
    return Grid(times=[t0 + (t1 - t0) * i / steps for i in range(steps)] + [t1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What is to be solved, checked.

    Attributes:
        field: velocity ``v(t, x)`` of a state that is one tensor; of :func:`~solvers.sample_loop.within` per sample.
        x0: the first state.
        t0, t1: numbers, or with a step size per sample arrays ``(B,)`` float64.
        tableau: the method.
        grid: fixed steps, or None for error control.
        tolerance, controller: of error control.
        stops, jumps, observe: of :func:`~solvers.batch_loop.adaptive_steps`.
        keep: "last", "times" (of every state, of which the last is kept), "states" or "steps".
        outputs: whether the states are those at the times ``at``.
        at: these times, from t0 on, numbers; per sample an array ``(B, n)``.
        t: the same as a tensor, which gradients may flow to; ``(n,)`` where they are those of every sample.
        origin: t0 as a tensor that gradients may flow to, from which times are counted, or None.
        closing: whether fixed steps carry their closing stage.
        event: ``(t, x)`` to a tensor, or None.
        width: how close in time an event is found; as close as time resolves, if None.
        raises: whether a solve that cannot go on raises.
        unpack: a state as the caller gave it.
        per_sample: whether every sample has its own time and step size.
        take: what takes the steps, if not what the method is taken by.
    """

    field: Field
    x0: Tensor
    t0: Any
    t1: Any
    tableau: ButcherTableau
    grid: Grid | None
    tolerance: Tolerance
    controller: Any
    stops: Sequence[float] = ()
    jumps: Sequence[float] = ()
    observe: Observer | None = None
    keep: str = "last"
    outputs: bool = False
    at: Any = ()
    t: Any = None
    origin: Tensor | None = None
    closing: bool = False
    event: Event | None = None
    width: float | None = None
    raises: bool = True
    unpack: Callable[[Tensor], Any] = lambda x: x
    per_sample: bool = False
    take: Stepper | None = None

    def solve(self) -> Solution:
        """Solve it."""
        return _solve_samples(self) if self.per_sample else _solve_batch(self)

    def time(self, t: Any) -> Tensor:
        """A number as a tensor, to which gradients flow as to the origin."""
        return exact(t, self.x0.device) if self.origin is None else self.origin + (t - self.t0)

    def batch_outputs(self) -> BatchOutputs:
        """What collects the states at the output times."""
        return BatchOutputs(self.at, self.t, self.x0, self.t0, origin=self.origin, adaptive=self.grid is None)

    def state_in(self, step: Step) -> Callable[[Any], Tensor]:
        """The state at a fraction of a step."""
        if self.grid is not None and self.grid.linear:
            return lambda theta: step.x0 + theta * (step.x1 - step.x0)
        return interpolant(step, self.field)

    @property
    def stopping_outputs(self) -> Sequence[Any]:
        """The output times at which steps end: of stiff methods, whose steps grow beyond what is to be seen inside."""
        return self.at if self.outputs and self.grid is None and self.tableau.implicit else ()

    @property
    def state_costs(self) -> int:
        """How many field evaluations :meth:`state_in` takes."""
        return 0 if self.grid is not None and self.grid.linear else self.tableau.inside_calls


def _solve_batch(task: Task) -> Solution:
    """With one time and one step size for the batch."""
    stats, x, grid, event = Statistics(), task.x0, task.grid, task.event
    plain = task.keep == "last" and event is None and task.origin is None and not task.outputs
    if grid is not None and plain and task.take is None and task.tableau.explicit:
        for start, end in pairwise(grid.times):
            x = step_state(task.field, start, x, span(start, end), task.tableau)
            stats.accepted += 1
        stats.evaluations = stats.accepted * task.tableau.interior
        return Solution(times=(task.t1,), states=(task.unpack(x),), stats=stats)
    collector, numbers, value = _Collector(task, task.batch_outputs() if task.outputs else None), None, 1.0
    try:
        if event is not None:
            event = first_crossing_fn(event, task.t0, x)
            value = values(event, task.t0, x)
            if value <= 0:
                return collector.solution(stats, "event", task.time(task.t0))
        if grid is not None:
            numbers = None if grid.numbers is None else iter(grid.numbers[1:])
            loop = fixed_steps(
                task.field, x, grid.times, task.tableau, inward=grid.inward, observe=task.observe, stats=stats,
                closing=task.closing or event is not None or task.keep == "steps", take=task.take,
            )  # fmt: skip
        else:
            loop = adaptive_steps(
                task.field, x, t0=task.t0, t1=task.t1, tableau=task.tableau, tolerance=task.tolerance,
                controller=task.controller, stops=(*task.stops, *task.stopping_outputs), jumps=task.jumps,
                observe=task.observe, stats=stats, take=task.take,
            )  # fmt: skip
        for step in loop:
            t: Any = step.t + step.h if numbers is None else next(numbers)
            if event is not None:
                before, value = value, values(event, t, step.x1)
                ahead = task.state_costs > 0 and not task.tableau.structure  # whose first stage is no velocity
                met = crossing(step, partial(task.state_in, step), event, before, value, costs=ahead, width=task.width)
                stats.evaluations += task.state_costs if task.tableau.structure else 0
                if met is not None:
                    state_at, _, theta = met
                    t = step.t + theta * step.h
                    x = state_at((t - step.t) / step.h)
                    time, x = attach_event_gradient(task.field, event, task.time(t), x)
                    collector.add(t, x, step, stats, end=step.t + step.h)
                    return collector.solution(stats, "event", time)
            collector.add(t, step.x1, step, stats)
    except SolverError as error:
        error.solution = collector.solution(replace(stats), error.status)
        if task.raises:
            raise
        return error.solution
    if task.origin is None:
        collector.times[-1] = task.t1
    return collector.solution(stats)


class _Collector:
    """What is kept of a solve on its way."""

    def __init__(self, task: Task, outputs: BatchOutputs | SampleOutputs | None) -> None:
        self.task, self.outputs = task, outputs
        self.times: list[Any] = [task.t0]
        self.states: list[Tensor] = [task.x0]
        self.steps: list[Step] = []
        self.versions: list[list[int] | None] = []
        self.samples: list[Tensor] = []

    def add(self, t: Any, x: Tensor, step: Step, stats: Statistics | None = None, end: Any = None) -> None:
        """A step, and where it leads; ``end``: of a step that goes on behind its event at t."""
        keep = self.task.keep
        if isinstance(self.outputs, BatchOutputs) and stats is not None:
            start, size = step.t, step.h
            if isinstance(size, Tensor):  # in numbers
                start, size = self.times[-1], (t if end is None else end) - self.times[-1]
            reading = self.outputs.reading(start, size, None if end is None else t, step)  # type: ignore[arg-type]
            self.outputs.states += reading(step, self.task.state_in)
            stats.evaluations += self.task.state_costs * reading.inside
        if keep in ("last", "times"):
            self.states[-1] = x
        else:
            self.states.append(x)
        if keep == "last":
            self.times[-1] = t
        else:
            self.times.append(t)
        if keep == "steps":
            self.steps.append(step)
            self.versions.append(versions_of(step.stages))

    def solution(self, stats: Statistics, status: Any = "finished", event_time: Tensor | None = None) -> Solution:
        """As the caller sees it."""
        task, times, steps, dense = self.task, tuple(self.times), tuple(self.steps), None
        if task.keep == "steps":
            for step, versions in zip(steps, self.versions, strict=True):
                check_unchanged(step.stages, versions)
            dense = Interpolant(field=task.field, x0=task.x0, times=times, steps=steps, unpack=task.unpack)
        common: Any = {"steps": steps, "stats": stats, "status": status, "event_time": event_time, "interpolant": dense}
        if task.keep != "last":
            common["step_times"] = times
        if self.outputs is not None:
            end = (times[-1], task.unpack(self.states[-1]))
            return Solution(times=task.t, states=task.unpack(self.outputs.stacked()), end=end, **common)
        return Solution(times=times, states=tuple([task.unpack(x) for x in self.states]), **common)

    def sample_solution(self, loop: SampleLoop, status: Any, event_time: Tensor | None) -> SampleSolution:
        """The same, with control per sample."""
        task, counts, samples = self.task, loop.stats, tuple(self.samples)
        stats = Statistics(loop.calls, int(counts.accepted.sum()), int(counts.rejected.sum()))
        self.times = [exact(t, torch.device("cpu")) for t in self.times]
        whole = self.solution(stats, status, event_time)
        dense = whole.interpolant and SampleInterpolant(
            field=task.field, x0=task.x0, times=whole.step_times, steps=whole.steps, unpack=task.unpack, samples=samples
        )
        return SampleSolution(
            times=whole.times, states=whole.states, steps=whole.steps, stats=stats, status=status,
            event_time=event_time, step_times=whole.step_times, end=whole.end, interpolant=dense, samples=samples,
            sample_stats=counts,
        )  # fmt: skip


def _solve_samples(task: Task) -> SampleSolution:
    """With a time and a step size per sample."""
    loop = SampleLoop(
        field=task.field, x=task.x0, t=task.t0, t1=task.t1, tableau=task.tableau, tolerance=task.tolerance,
        controller=task.controller, raises=task.raises, take=task.take,
        stops=task.at if len(task.stopping_outputs) else None,
    )  # fmt: skip
    outputs = SampleOutputs(task.at, task.t, task.x0, task.t0, loop.t == loop.t1) if task.outputs else None
    collector = _Collector(task, outputs)
    collector.times = [loop.t]
    event, times, value = None, None, np.ones_like(loop.t)
    met = np.zeros_like(loop.moving)
    if task.event is not None:
        begin = to_state_shape(loop.t, task.x0)
        event = first_crossing_fn(task.event, begin, task.x0, each=True)
        value = values(event, begin, task.x0)
        met = value <= 0
        times = task.time(np.where(met, loop.t, np.nan))
        loop.stop(met)
    before = loop.t
    try:
        for step, accepted, t, x in loop.rounds():
            size = t - before
            if event is not None and times is not None:
                end = values(event, to_state_shape(t, x), x, accepted)
                change = crossing(
                    step, partial(task.state_in, step), event, value, end, accepted, costs=task.state_costs > 0
                )
                value = np.where(accepted, end, value)
                if change is not None:
                    state_at, now, theta = change
                    mask, t = torch.from_numpy(now).to(x.device), np.where(now, before + theta * (t - before), t)
                    s, there = task.time(t).view_as(step.h), state_at(to_state_shape(theta, x))  # type: ignore[arg-type]
                    s, there = attach_event_gradient(task.field, event, s, there, mask)
                    times, x = torch.where(mask, s.flatten(), times), torch.where(to_state_shape(now, x), there, x)
                    loop.move(now, t, x)
                    met = met | now
            if outputs is not None:
                reading = outputs.reading(before, size, accepted, None if event is None else t)
                if reading is not None:
                    outputs.states += reading(step, task.field)
                    loop.count(task.state_costs > 0 and reading.inside, reading.samples)
            before = t
            if task.keep == "steps":
                samples = torch.from_numpy(accepted).nonzero().flatten()
                collector.samples.append(samples)
                step = step if len(samples) == len(x) else step.select(samples.to(x.device))
            collector.add(t, x, step)
    except SolverError as error:
        error.solution = collector.sample_solution(loop, _status(loop, met, error), times)
        raise
    return collector.sample_solution(loop, _status(loop, met), times)


def _status(loop: SampleLoop, met: np.ndarray, error: SolverError | None = None) -> tuple[Status, ...]:
    status: list[Status] = ["event" if m else "finished" for m in met.tolist()]
    for i, failure in {**loop.failures, **({error.sample: error} if error else {})}.items():
        if i is not None:
            status[i] = failure.status
    return tuple(status)


def with_gradient(task: Task, solution: Solution, x: Tensor, outputs: Tensor | None = None) -> Solution:
    """The solution with ``x`` as its last state, which carries the gradient, and its event time with that gradient.

    ``outputs``: the states at the output times, where there are such.
    """
    time = solution.event_time
    if time is not None and task.event is not None:
        if isinstance(solution, SampleSolution):
            start = to_state_shape(task.t0, task.x0)
            event = first_crossing_fn(task.event, start, task.x0, each=True)
            ends = solution.t1.numpy().astype(np.float64)
            moved = ~time.isnan() & torch.from_numpy(ends != task.t0).to(time.device)
            s = exact(ends, x.device).view_as(start)
            s, x = attach_event_gradient(task.field, event, s, x, moved)
            time = torch.where(moved, s.flatten(), time)
        elif solution.t1 != task.t0:
            event = first_crossing_fn(task.event, task.t0, task.x0)
            time, x = attach_event_gradient(task.field, event, time, x)
    if outputs is not None:
        end = (solution.t1, task.unpack(x))
        return replace(solution, states=task.unpack(outputs), end=end, event_time=time, step_times=())
    return replace(solution, times=solution.times[-1:], states=(task.unpack(x),), event_time=time, step_times=())
