"""``odeint`` with torchdiffeq's signature and semantics, for explicit Runge-Kutta methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.step import Step
from solvers.torchdiffeq.events import event_of, find_event, link_event
from solvers.torchdiffeq.problem import (
    METHODS,
    Problem,
    error_controlled,
    inside,
    make_problem,
    output_times_are_the_grid,
    over_grid,
)

__all__ = ["METHODS", "odeint", "odeint_event", "solve"]

MOST_STEPS = 10_000_000


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """Solve ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, as ``torchdiffeq.odeint`` does.

    ``rk4`` is the classic method of Kutta; torchdiffeq's ``rk4`` is the 3/8 rule and is called ``rk4_38`` here.
    ``adaptive_heun`` and ``fehlberg2`` evaluate the field at every state they accept, where torchdiffeq takes the last
    stage for it. The embedded error of ``dopri5`` is that of Dormand and Prince (and SciPy), 1.5 times torchdiffeq's,
    whose fourth-order weights are Shampine's: a few more steps at equal tolerance. ``func`` is asked at times between
    the first and the last of ``t`` only, where torchdiffeq's adaptive methods step past the last; with ``event_fn`` up
    to the end of the step that meets the event. Time is kept in float64; ``func`` gets it in the precision of the
    state, float32 at least.

    Args:
        func: ``(t, y)`` to the velocity, with ``t`` a scalar tensor and ``y`` as ``y0``. May have the callbacks
            ``callback_step``, ``callback_accept_step`` and ``callback_reject_step``, called as ``(t, y, h)``; fixed
            methods call the first only, and warn about the others.
        y0: a tensor, or a tuple or dictionary of tensors, of any shape, floating or complex.
        t: times ``(n,)``, strictly increasing or decreasing; gradients flow to it.
        rtol, atol: numbers, tensors that broadcast against y0, or one of these per part of a tuple.
        method: one of :data:`METHODS`; dopri5 if not given.
        options: adaptive methods: norm, first_step, min_step, max_step, safety, ifactor, dfactor, max_num_steps,
            jump_t, step_t, dtype; fixed ones: step_size, grid_constructor, perturb, interp. ``max_num_steps`` counts
            the attempts of the whole solve, 100000 if not given, or 20000 until an event. ``dtype`` is that of tensors
            which hold a time or a time's gradient: with torch.float32 a solve in float32 makes no tensor in float64.
            ``grid_constructor`` gets ``t`` as it is and returns times from the first of them to the last.
        event_fn: ``(t, y)`` to a tensor; the solve ends where one of its entries changes sign. ``t`` is then the start
            and a time that shows the direction.

    Returns:
        ``y`` at the times, with a new first dimension; with ``event_fn``, the event time and ``y`` at the start and
        at the event, with gradients through the event time.

    Raises:
        ValueError, TypeError: an argument is out of range or not supported; the message says what is.
        SolverError: the solve cannot go on.
    """
    problem = make_problem(func, y0, t, rtol, atol, method, options)
    if event_fn is None:
        return problem.packing.unpack(solve(problem))
    event = event_of(problem, event_fn)
    time, x = link_event(problem, event, *find_event(problem, event))
    return time.to(problem.t.dtype), problem.packing.unpack(torch.stack([problem.x0, x]))


def solve(problem: Problem) -> Tensor:
    """The packed states at the output times, ``(n, N)``."""
    return torch.stack([problem.x0, *_outputs(problem)])


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor | float,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """The event time and the states at the start and there, from ``t0`` on, as torchdiffeq's function of this name."""
    t0 = torch.as_tensor(t0).reshape(())
    t0 = t0 if t0.is_floating_point() else t0.to(torch.get_default_dtype())
    t = torch.stack([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def _outputs(problem: Problem) -> Iterator[Tensor]:
    """The states at ``times[1:]``."""
    if len(problem.times) == 1:
        return
    if problem.adaptive:
        yield from _interpolated(problem)
        return
    grid = _grid(problem)
    if output_times_are_the_grid(problem.options):
        yield from (step.x1 for step in over_grid(problem, grid))
        return
    ends = [*_numbers(grid)[1:-1], problem.times[-1]]
    i = 1
    for step, end in zip(over_grid(problem, grid), ends, strict=True):
        while i < len(problem.times) and problem.direction * (problem.times[i] - end) <= 0:
            at = problem.t[i].to(problem.time_dtype) if problem.t.requires_grad else problem.times[i]
            yield step.x1 if problem.times[i] == end else inside(problem, step)((at - step.t) / step.h)
            i += 1


def _interpolated(problem: Problem) -> Iterator[Tensor]:
    times, t = problem.times, problem.t.to(problem.time_dtype)
    i = 1
    for step in error_controlled(problem, times[-1]):
        while i < len(times):
            theta: Any = (times[i] - step.t) / step.h
            if theta > 1 + 1e-12:
                break
            if problem.t.requires_grad:
                theta = (t[i] - t[0] - (step.t - times[0])) / step.h
                yield step.at(theta) if problem.tableau.dense else _moved(problem, step, theta)
            else:
                yield step.x1 if abs(theta - 1) <= 1e-12 else step.at(theta)
            i += 1


def _moved(problem: Problem, step: Step, theta: Tensor) -> Tensor:
    """The end of a step with the gradient of its time."""
    velocity = problem.field(float(step.t + step.h), step.x1)
    return step.x1 + ((theta - theta.detach()) * step.h).to(velocity.dtype) * velocity


def _numbers(grid: list[Any]) -> list[float]:
    return [float(s) for s in grid] if not isinstance(grid[0], Tensor) else torch.stack(grid).detach().tolist()


def _grid(problem: Problem) -> list[Any]:
    """The times of the steps: those of the output, or what the options say."""
    options, times = problem.options, problem.times
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    t = problem.t.to(problem.time_dtype)
    if constructor is not None:
        return _constructed(problem, constructor)
    if step_size is not None:
        count = abs(times[-1] - times[0]) / float(step_size)
        if count > MOST_STEPS:
            raise ValueError(
                f"options: step_size {step_size} makes {count:.3g} steps, more than {MOST_STEPS}: raise it"
            )
        grid = [times[0] + problem.direction * k * float(step_size) for k in range(math.ceil(count - 1e-9))]
        if not t.requires_grad:
            return [*grid, times[-1]]
        return [t[0] + (s - times[0]) for s in grid] + [t[-1]]
    return list(t) if t.requires_grad else times


def _constructed(problem: Problem, constructor: Callable[..., Tensor]) -> list[Any]:
    """The grid of the caller, whose ends may differ from the times in the rounding of a narrower dtype."""
    times = problem.times
    grid = constructor(problem.field, problem.x0, problem.t)
    if not isinstance(grid, Tensor) or grid.ndim != 1 or len(grid) < 2 or not grid.is_floating_point():
        what = f"{grid.dtype} {tuple(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__
        raise TypeError(f"options: grid_constructor must return at least two times, floating (n,), got {what}")
    numbers = grid.detach().tolist()
    slack = 2 * max(torch.finfo(x.dtype).eps for x in (grid, problem.t, problem.x0))
    for number, time, name in ((numbers[0], times[0], "begin at t[0]"), (numbers[-1], times[-1], "end at t[-1]")):
        if not abs(number - time) <= slack * max(abs(number), abs(time)):
            raise ValueError(f"options: the grid must {name} = {time:.9g}, got {number:.9g}")
    numbers = [times[0], *numbers[1:-1], times[-1]]
    if not all(problem.direction * (b - a) >= 0 for a, b in pairwise(numbers)):
        raise ValueError("options: the grid must go from t[0] to t[-1] without turning back")
    keep = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1])]
    if grid.requires_grad:
        return list(grid.to(problem.x0.device, problem.time_dtype)[keep])
    return [numbers[i] for i in keep]
