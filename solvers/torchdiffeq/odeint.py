"""``odeint`` with torchdiffeq's signature and semantics, for Runge-Kutta methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers.errors import SolverError
from solvers.packing import Packing
from solvers.solution import Solution
from solvers.solve import Task
from solvers.torchdiffeq.problem import MAX_STEPS_TO_EVENT, METHODS, check_options, make_task

__all__ = ["METHODS", "find_event", "odeint", "odeint_event", "solve"]

_STEPPED_OVER = "give options={'max_step': h} where steps may pass over it"


def odeint(
    func: Callable[[Tensor, Any], Any], y0: Any, t: Tensor, *, rtol: Any = 1e-7, atol: Any = 1e-9,
    method: str | None = None, options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None
) -> Any:  # fmt: skip
    """Solve ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, as ``torchdiffeq.odeint`` does.

    ``rk4`` is the classic method of Kutta; torchdiffeq's ``rk4`` is the 3/8 rule and is called ``rk4_38`` here.
    ``adaptive_heun`` and ``fehlberg2`` evaluate the field at every state they accept, where torchdiffeq takes the last
    stage for it. The embedded error of ``dopri5`` is that of Dormand and Prince (and SciPy), 1.5 times torchdiffeq's,
    whose fourth-order weights are Shampine's: a few more steps at equal tolerance. ``func`` is asked at times between
    the first and the last of ``t`` only, where torchdiffeq's adaptive methods step past the last; with ``event_fn`` up
    to the end of the step that meets the event, and with kvaerno5 a quarter of a step behind. Time is kept in float64;
    ``func`` gets it in the precision of the state, float32 at least.

    Args:
        func: ``(t, y)`` to the velocity, with ``t`` a scalar tensor and ``y`` as ``y0``. May have the callbacks
            ``callback_step``, ``callback_accept_step`` and ``callback_reject_step``, called as ``(t, y, h)``; fixed
            methods call the first only, and warn about the others.
        y0: a tensor, or a tuple or dictionary of tensors, of any shape, floating or complex.
        t: times ``(n,)``, strictly increasing or decreasing; gradients flow to it.
        rtol, atol: numbers, tensors that broadcast against y0, or one of these per part of a tuple; as in
            :class:`~solvers.Tolerance`.
        method: with error control bosh3, dopri5, tsit5, dopri8, fehlberg2, adaptive_heun or, for stiff problems,
            kvaerno5; with fixed steps euler, midpoint, heun2, heun3, rk4, rk4_38, implicit_euler, implicit_midpoint or
            trapezoid. dopri5 if not given.
        options: adaptive methods: norm, first_step, min_step, max_step, safety, ifactor, dfactor, max_num_steps,
            jump_t, step_t, dtype, graph; fixed ones: step_size, grid_constructor, perturb, interp. ``max_num_steps``
            counts the attempts of the whole solve, 100000 if not given, or 20000 until an event. ``dtype`` is that of
            tensors which hold a time or a time's gradient: with torch.float32 a solve in float32 makes no tensor in
            float64. ``graph``, True or "auto", solves as ``integrate(graph=True)`` does,
            and has its gradient.
            ``grid_constructor`` gets ``t`` as it is and returns times from the first of them to the last.
        event_fn: ``(t, y)`` to a tensor; the solve ends where one of its entries changes sign. ``t`` is then the start
            and a time that shows the direction.

    Returns:
        ``y`` at the times, with a new first dimension; with ``event_fn``, the event time and ``y`` at the start and
        at the event, with gradients through the event time.

    Raises:
        ValueError, TypeError: an argument is out of range or not supported; the message says what is.
        SolverError: the solve cannot go on.

    >>> t = torch.tensor([0.0, 0.5, 1.0])
    >>> y = odeint(lambda t, y: -y, torch.ones(3, 2), t, rtol=1e-5)
    >>> y.shape, round(y[-1, 0, 0].item(), 4)
    (torch.Size([3, 3, 2]), 0.3679)
    >>> time, y = odeint(lambda t, y: -y, torch.ones(1), t[:2], event_fn=lambda t, y: y - 0.5)
    >>> round(time.item(), 4), y.shape
    (0.6931, torch.Size([2, 1]))
    """
    packing = Packing(y0)
    if (options or {}).get("graph"):
        check_options(method or "dopri5", options or {})
        if event_fn is not None:
            raise ValueError("options: graph finds no event: leave out event_fn, or graph")
        from solvers.torchdiffeq.graph import graph_states  # the compiler takes seconds to load

        states = graph_states(func, packing, y0, t, rtol, atol, method or "dopri5", options or {})
        if states is not None:
            return states
    task = make_task(func, packing, y0, t, rtol, atol, method, options, event_fn)
    if event_fn is None:
        return packing.unpack(solve(task))
    solution = find_event(task)
    assert solution.event_time is not None
    return solution.event_time.to(t.dtype), packing.unpack(torch.stack([task.x0, solution.x1]))


def odeint_event(
    func: Callable[[Tensor, Any], Any], y0: Any, t0: Tensor | float, *, event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False, odeint_interface: Callable[..., Any] = odeint, **kwargs: Any
) -> Any:  # fmt: skip
    """Solve from t0 on until an event, as torchdiffeq's function of this name.

    Args:
        func, y0, event_fn: as in :func:`~solvers.torchdiffeq.odeint`.
        t0: where the solve begins; gradients flow to it.
        reverse_time: solve backwards in time.
        odeint_interface: ``odeint``, or :func:`~solvers.torchdiffeq.odeint_adjoint` for gradients by the adjoint.
        kwargs: what else that takes: tolerances, method and options.

    Returns:
        The event time, a scalar tensor, and ``y`` at the start and at the event, in a new first dimension.

    Raises:
        ValueError: no event before time overflows or within the steps of a fixed method, or as ``odeint_interface``.
        SolverError: the solve cannot go on, or meets no event in its ``max_num_steps``.

    >>> time, y = odeint_event(lambda t, y: -y, torch.ones(1), 0.0, event_fn=lambda t, y: y - 0.5)
    >>> round(time.item(), 4), round(y[-1].item(), 4)
    (0.6931, 0.5)
    """
    t0 = torch.as_tensor(t0).reshape(())
    t0 = t0 if t0.is_floating_point() else t0.to(torch.get_default_dtype())
    t = torch.stack([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def solve(task: Task) -> Tensor:
    """The packed states at the output times, ``(n, N)``.

    Raises:
        SolverError: the solve cannot go on.
    """
    try:
        states = task.solve().states
        return states if isinstance(states, Tensor) else torch.stack(states)
    except SolverError as error:
        error.args = (str(error).replace("max_steps", "max_num_steps"),)
        error.solution = None  # whose states are packed
        raise


def find_event(task: Task) -> Solution:
    """The solve up to its event: the first change, also in a step, to the absolute tolerance in time.

    Raises:
        ValueError: no event within the steps of a fixed method, or before time overflows, or one that is NaN.
        SolverError: an adaptive solve cannot go on, or meets no event in its ``max_num_steps``.
    """
    try:
        solution = task.solve()
    except SolverError as error:
        limit, error.solution = task.tolerance.max_steps, None
        if error.status == "max_steps":
            error.args = (
                f"no event within {limit} attempted steps: {_STEPPED_OVER}, raise max_num_steps, or check event_fn",
            )
        raise
    except ValueError as error:
        error.args = (str(error).replace("event must return numbers, got NaN", "event_fn must not be NaN, as it is"),)
        raise
    if solution.event_time is None and task.grid is None:
        raise ValueError(f"no event before time overflows: {_STEPPED_OVER}, or check event_fn and the direction of t")
    if solution.event_time is None:
        raise ValueError(f"no event within {MAX_STEPS_TO_EVENT} steps: raise step_size or check event_fn")
    return solution
