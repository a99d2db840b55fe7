"""Events: the solve ends where a function of time and state changes sign, and gradients flow through that time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from solvers.problem import Problem, error_controlled, inside, over_grid
from solvers.step import Step

__all__ = ["event_of", "find_event", "link_event"]


Event = Callable[[Any, Tensor], Tensor]


def event_of(problem: Problem, event_fn: Callable[[Tensor, Any], Tensor]) -> Event:
    """``event_fn`` as a function of numbers and packed states, positive until its first entry changes sign.

    Raises:
        ValueError: ``t`` does not hold a start and a direction.
    """
    if len(problem.times) != 2:
        raise ValueError(f"t must hold two times with event_fn, a start and a direction, got {len(problem.times)}")
    real = problem.x0.dtype.to_real()

    def entries(s: Any, x: Tensor) -> Tensor:
        s = s if isinstance(s, Tensor) else torch.tensor(s, dtype=real, device=x.device)
        return torch.as_tensor(event_fn(s.to(real), problem.packing.unpack(x))).reshape(-1)

    with torch.no_grad():
        signs = entries(problem.times[0], problem.x0).sign()
    if bool((signs == 0).any()):
        return lambda s, x: entries(s, x).abs().min()  # the event is at the start
    return lambda s, x: (entries(s, x) * signs).min()


def find_event(problem: Problem, event: Event) -> tuple[float, Tensor]:
    """The time of the event and the state there, to the absolute tolerance in time.

    Raises:
        ValueError: a fixed method without ``step_size``, or no event within 20000 of its steps.
        SolverError: an adaptive solve cannot go on.
    """
    with torch.no_grad():
        if float(event(problem.times[0], problem.x0)) == 0:
            return problem.times[0], problem.x0
    for step in _steps_without_end(problem):
        with torch.no_grad():
            if float(event(step.t + step.h, step.x1)) > 0:
                continue
            theta = _bisect(problem, step, event)
        return float(step.t + theta * step.h), inside(problem, step, theta)
    raise ValueError("no event within 20000 steps: raise step_size or check event_fn")


def link_event(problem: Problem, event: Event, time: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Event time and state with the gradient of the implicit function ``event(t, x(t)) = 0``.

    ``t - event / (d event / dt)`` has the value of t, since the event function is constant there but for its gradient;
    the state moves along with the time.
    """
    s = problem.t[0].double() + (time - problem.times[0])
    if not (torch.is_grad_enabled() and (x.requires_grad or s.requires_grad)):
        return s, x
    velocity = problem.field(s, x)
    at, where = s.detach().requires_grad_(), x.detach().requires_grad_()
    slope_t, slope_x = torch.autograd.grad(event(at, where), (at, where), allow_unused=True)
    rate = torch.zeros_like(at) if slope_t is None else slope_t
    if slope_x is not None:
        rate = rate + (slope_x.conj() * velocity.detach()).sum().real
    value = event(s, x)
    moved = s - (value - value.detach()) / rate
    return moved, x + (moved - s).to(x.dtype) * velocity


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


def _bisect(problem: Problem, step: Step, event: Event) -> float:
    """Where in the step the event function changes sign, to the absolute tolerance in time."""
    low, high = 0.0, 1.0
    width = float(torch.as_tensor(problem.tolerance.atol).min())
    for _ in range(max(1, min(60, math.ceil(math.log2(abs(float(step.h)) / max(width, 1e-15)))))):
        middle = (low + high) / 2
        if float(event(step.t + middle * step.h, inside(problem, step, middle))) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
