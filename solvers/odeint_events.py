"""Events of ``odeint``: found as torchdiffeq does, from a start and a direction of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from solvers.events import Event, crossing, link, until
from solvers.problem import Problem, error_controlled, inside, over_grid
from solvers.states import real_dtype
from solvers.step import Step

__all__ = ["event_of", "find_event", "link_event"]


def event_of(problem: Problem, event_fn: Callable[[Tensor, Any], Tensor]) -> Event:
    """``event_fn`` as a function of numbers and packed states, positive until its first entry changes sign.

    Raises:
        ValueError: ``t`` does not hold a start and a direction.
    """
    if len(problem.times) != 2:
        raise ValueError(f"t must hold two times with event_fn, a start and a direction, got {len(problem.times)}")
    real = real_dtype(problem.x0)

    def entries(s: Any, x: Tensor) -> Tensor:
        s = s if isinstance(s, Tensor) else torch.tensor(s, dtype=real, device=x.device)
        return event_fn(s.to(real), problem.packing.unpack(x))

    return until(entries, problem.times[0], problem.x0)


def find_event(problem: Problem, event: Event) -> tuple[float, Tensor]:
    """The time of the event and the state there, to the absolute tolerance in time.

    Raises:
        ValueError: a fixed method without ``step_size``, or no event within 20000 of its steps.
        SolverError: an adaptive solve cannot go on.
    """
    width = float(torch.as_tensor(problem.tolerance.atol).min())
    with torch.no_grad():
        if float(event(problem.times[0], problem.x0)) == 0:
            return problem.times[0], problem.x0
    for step in _steps_without_end(problem):
        with torch.no_grad():
            if float(event(step.t + step.h, step.x1)) > 0:
                continue
            theta = crossing(step, inside(problem, step), event, width)
        return float(step.t + theta * step.h), inside(problem, step)(theta)
    raise ValueError("no event within 20000 steps: raise step_size or check event_fn")


def link_event(problem: Problem, event: Event, time: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Event time and state with gradients, to the state and to ``t[0]``."""
    s = problem.t[0].double() + (time - problem.times[0])
    return link(problem.field, event, s, x)


def _steps_without_end(problem: Problem) -> Iterator[Step]:
    if problem.adaptive:
        open_ended = problem._replace(times=problem.times[:1] if problem.tableau.dense is None else problem.times)
        yield from error_controlled(open_ended, problem.direction * math.inf)
        return
    if problem.options.get("step_size") is None:
        raise ValueError("options: event_fn with a fixed method needs step_size")
    h, k = problem.direction * float(problem.options["step_size"]), 0
    x = problem.x0
    while k < 20_000:
        part = problem._replace(x0=x)
        (step,) = over_grid(part, [problem.times[0] + k * h, problem.times[0] + (k + 1) * h])
        x, k = step.x1, k + 1
        yield step
