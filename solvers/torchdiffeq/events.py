"""Events of ``odeint``: found as torchdiffeq does, from a start and a direction of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from solvers.errors import MaxStepsError
from solvers.events import Event, change, crossing, link, until
from solvers.step import Step
from solvers.torchdiffeq.problem import Problem, error_controlled, inside, linear, over_grid
from solvers.validation import real_dtype

__all__ = ["ended", "event_of", "find_event", "link_event"]

MAX_NUM_STEPS = 20_000


def event_of(problem: Problem, event_fn: Callable[[Tensor, Any], Tensor]) -> Event:
    """``event_fn`` as a function of numbers and packed states, positive until its first entry changes sign.

    Raises:
        ValueError: ``t`` does not hold a start and a direction.
    """
    if len(problem.times) != 2:
        raise ValueError(f"t must hold two times with event_fn, a start and a direction, got {len(problem.times)}")

    def entries(s: Any, x: Tensor) -> Tensor:
        s = s if isinstance(s, Tensor) else torch.tensor(s, dtype=problem.time_dtype, device=x.device)
        return event_fn(s.to(problem.time_dtype), problem.packing.unpack(x))

    return until(entries, problem.times[0], problem.x0)


def find_event(problem: Problem, event: Event) -> tuple[float, Tensor]:
    """The time of the event and the state there, to the absolute tolerance in time; the first change, also in a step.

    Raises:
        ValueError: a fixed method without ``step_size``, no event within 20000 of its steps, or an event function that
            is NaN.
        SolverError: an adaptive solve cannot go on, or meets no event in its ``max_num_steps``.
    """
    width = float(torch.as_tensor(problem.tolerance.atol).min())
    latest = 1e-3 * torch.finfo(torch.promote_types(real_dtype(problem.x0), torch.float32)).max
    value = _value(event, problem.times[0], problem.x0)
    if value == 0:
        return problem.times[0], problem.x0
    costs = problem.tableau.dense is None and not linear(problem)
    for step in _steps_without_end(problem):
        time = float(step.t + step.h)
        if not abs(time) < latest:
            raise ValueError("no event before time overflows: check event_fn, or the direction of t")
        before, value = value, _value(event, time, step.x1)
        with torch.no_grad():
            met = change(step, partial(inside, problem, step), event, before, value, costs=costs)
            if met is None:
                continue
            at, _, low, high = met
            theta = crossing(step, at, event, width, low, high)
        return float(step.t + theta * step.h), inside(problem, step)(theta)
    raise ValueError(f"no event within {MAX_NUM_STEPS} steps: raise step_size or check event_fn")


def _value(event: Event, t: float, x: Tensor) -> float:
    with torch.no_grad():
        value = float(event(t, x))
    if math.isnan(value):
        raise ValueError(f"event_fn must not be NaN, as it is at t = {t:.6g}")
    return value


def ended(problem: Problem, time: float) -> Problem:
    """The problem with the time of its event as its end."""
    t = problem.t.to(problem.time_dtype)
    return problem._replace(t=torch.stack([t[0], t.new_tensor(time)]), times=[problem.times[0], time])


def link_event(problem: Problem, event: Event, time: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Event time and state with gradients, to the state and to ``t[0]``."""
    s = problem.t[0].to(problem.time_dtype) + (time - problem.times[0])
    return link(problem.field, event, s, x)


def _steps_without_end(problem: Problem) -> Iterator[Step]:
    if problem.adaptive:
        limit = int(problem.options.get("max_num_steps", MAX_NUM_STEPS))
        tolerance = replace(problem.tolerance, max_steps=limit)
        open_ended = problem._replace(times=problem.times[:1], tolerance=tolerance)
        try:
            yield from error_controlled(open_ended, problem.direction * math.inf)
        except MaxStepsError as error:
            error.args = (f"no event within {limit} attempted steps: raise max_num_steps, or check event_fn",)
            raise
        return
    if problem.options.get("step_size") is None:
        raise ValueError("options: event_fn with a fixed method needs step_size")
    h, k = problem.direction * float(problem.options["step_size"]), 0
    x = problem.x0
    while k < MAX_NUM_STEPS:
        part = problem._replace(x0=x)
        (step,) = over_grid(part, [problem.times[0] + k * h, problem.times[0] + (k + 1) * h])
        x, k = step.x1, k + 1
        yield step
