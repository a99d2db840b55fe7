"""The fixed and the adaptive loop on one Runge-Kutta step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from solvers.controllers import Controller, ControllerState, I
from solvers.errors import MaxStepsError, NonFiniteError, SolverError, StepUnderflowError
from solvers.methods import get_tableau
from solvers.solution import Solution, Statistics
from solvers.step import Field, Step, rk_step
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance

__all__ = ["adaptive_steps", "check_state", "fixed_steps", "integrate"]


def check_state(x: object, name: str = "x") -> None:
    """Reject what is not a batch of finite floating states, naming the argument.

    Values are looked at on the CPU only: on another device this would wait for it.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: no feature dimension, no sample, or NaN or infinity.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, *S), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}; convert it with {name}.float()")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *S) with at least one feature dimension, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample and one feature, got shape {tuple(x.shape)}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            torch.ops.aten._assert_async.default(x.detach().isfinite().all())
        except RuntimeError:
            bad = (~x.detach().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"{name} must be finite, got NaN or infinity in sample(s) {bad[:8]}") from None


def fixed_steps(
    field: Field,
    x: Tensor,
    times: list[float],
    tableau: ButcherTableau,
    *,
    closing: bool = False,
    stats: Statistics | None = None,
) -> Iterator[Step]:
    """Steps from each time to the next, reusing the closing stage of FSAL methods; never waits for the device.

    Args:
        field: velocity ``v(t, x)``.
        x: state at ``times[0]``, ``(B, *S)``.
        times: the grid.
        tableau: the method.
        closing: whether each step carries its closing stage.
        stats: counts to add to.
    """
    stats = Statistics() if stats is None else stats
    first = None
    for t, t_next in pairwise(times):
        step = rk_step(field, t, x, t_next - t, tableau, first, closing=closing)
        stats.evaluations += len(step.stages) - (first is not None)
        stats.accepted += 1
        first = step.stages[-1] if tableau.fsal and closing else None
        x = step.x1
        yield step


def _first_bad_stage(step: Step) -> int | None:
    return next((i for i, p in enumerate(step.stages) if not p.isfinite().all()), None)


def adaptive_steps(
    field: Field,
    x: Tensor,
    t0: float,
    t1: float,
    tableau: ButcherTableau,
    tolerance: Tolerance,
    controller: Controller,
    *,
    overshoot: bool = False,
    stops: Sequence[float] = (),
    jumps: Sequence[float] = (),
    observe: Callable[[str, float, Tensor, float], None] | None = None,
    stats: Statistics | None = None,
) -> Iterator[Step]:
    """Accepted steps from t0 to t1 under error control; waits for the device once per attempted step
    (and once to choose the first step, if it is not given).

    The step size is chosen by the detached error: gradients flow through the accepted steps, not through the choice.

    Args:
        field: velocity ``v(t, x)``.
        x: state at t0.
        t0, t1: start and end.
        tableau, tolerance, controller: the method, what it accepts, and how it chooses its steps.
        overshoot: let the last step end where the controller wants, at t1 or past it.
        stops: times at which a step ends.
        jumps: stops at which the field is discontinuous: it is evaluated on either side of them, never across.
        observe: called as ``observe(what, t, x, h)`` with what = "step", "accept" or "reject".
        stats: counts to add to.

    Raises:
        StepUnderflowError, MaxStepsError, NonFiniteError: the solve cannot go on.
    """
    stats = Statistics() if stats is None else stats
    order, direction = tableau.error_order, 1 if t1 >= t0 else -1
    t, first = t0, None
    ahead = sorted({s for s in (*stops, *jumps) if direction * (s - t0) > 0}, key=lambda s: -direction * s)
    discontinuous = set(jumps)
    h = tolerance.first_step
    if h is None and t != t1:
        first = field(t, x)
        with torch.no_grad():
            h = tolerance.choose_first_step(field, t, x.detach(), first.detach(), direction, order)
        stats.evaluations += 2
        if not math.isfinite(h):
            raise NonFiniteError("the field is not finite at the first state", t=t, h=math.nan, stage=0)
    state = ControllerState(h if h is not None else 0.0)
    ratio, bad_stage = math.nan, None
    while direction * (t1 - t) > 0:
        smallest = 10 * abs(math.nextafter(t, math.inf) - t)
        if stats.accepted + stats.rejected >= tolerance.max_steps:
            raise MaxStepsError(
                f"{tolerance.max_steps} attempted steps did not reach t1 = {t1:g}; last error ratio {ratio:.3g}: "
                "raise max_steps, loosen the tolerance, or the problem is stiff",
                t=t, h=direction * state.h, stage=None,
            )  # fmt: skip
        size = min(max(state.h, tolerance.min_step), tolerance.max_step)
        if size < smallest and abs(t1 - t) > smallest:
            if math.isinf(ratio) or math.isnan(ratio):
                raise NonFiniteError(
                    "NaN or infinity, and no smaller step avoids it", t=t, h=direction * size, stage=bad_stage
                )
            raise StepUnderflowError(
                f"the error asks for a step below {smallest:.3g}; last error ratio {ratio:.3g}: "
                "the problem is stiff or discontinuous here, or the tolerance is below rounding",
                t=t, h=direction * size, stage=None,
            )  # fmt: skip
        t_next = t + direction * size
        if not overshoot and direction * (t_next - t1) > 0:
            t_next = t1
        if ahead and direction * (t_next - ahead[-1]) > 0:
            t_next = ahead[-1]
        h = t_next - t
        if observe is not None:
            observe("step", t, x, h)
        v = _one_sided(field, t, t_next, discontinuous, x.dtype) if discontinuous else field
        step = rk_step(v, t, x, h, tableau, first)
        stats.evaluations += len(step.stages) - (first is not None)
        with torch.no_grad():
            ratio = tolerance.ratio(step.error(), x, step.x1)
        if not math.isfinite(ratio):
            bad_stage = _first_bad_stage(step)
            if bad_stage == 0:
                raise NonFiniteError("the field is not finite at an accepted state", t=t, h=h, stage=0)
        state = controller(state._replace(h=abs(h)), ratio, order)
        if not state.accepted and math.isfinite(ratio) and abs(h) <= tolerance.min_step:
            state = state._replace(accepted=True)
        if observe is not None:
            observe("accept" if state.accepted else "reject", t, x, h)
        if not state.accepted:
            stats.rejected += 1
            first = step.stages[0]
            continue
        stats.accepted += 1
        first = step.stages[-1] if tableau.fsal and t_next not in discontinuous else None
        t, x = t_next, step.x1
        if ahead and t == ahead[-1]:
            ahead.pop()
        yield step


def _one_sided(field: Field, t: float, t_next: float, jumps: set[float], dtype: torch.dtype) -> Field:
    """The field at times strictly inside a step where the step begins or ends at a jump, in the state's precision."""
    real = torch.promote_types(dtype.to_real(), torch.float32)

    def beside(time: float, towards: float) -> float:
        return torch.nextafter(torch.tensor(time, dtype=real), torch.tensor(towards, dtype=real)).item()

    low, high = sorted((beside(t, t_next) if t in jumps else t, beside(t_next, t) if t_next in jumps else t_next))
    return lambda s, x: field(min(max(s, low), high), x)  # type: ignore[type-var]


def integrate(
    field: Field,
    x0: Tensor,
    t0: float,
    t1: float,
    *,
    solver: str | ButcherTableau = "bs23",
    steps: int | None = None,
    tolerance: Tolerance | None = None,
    controller: Controller | None = None,
    keep: Literal["last", "states", "steps"] = "states",
) -> Solution:
    """Integrate ``dx/dt = v(t, x)`` from t0 to t1, which may lie before t0.

    Args:
        field: velocity ``v(t, x)``, returning the shape, dtype and device of ``x``.
        x0: state at t0, ``(B, *S)``, floating.
        t0, t1: start and end time.
        solver: name of a method or a tableau.
        steps: that many equal steps, without error control and without waiting for the device; a state that becomes
            non-finite on the way is then returned as it is.
        tolerance: error control, when ``steps`` is None; :class:`Tolerance` with its defaults if not given.
        controller: the step-size rule of error control; :class:`~solvers.controllers.I` if not given.
        keep: only the last state, every state, or every step with its stages.

    Returns:
        A :class:`Solution`.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
        SolverError: the solve cannot go on; its ``solution`` is the part that stands.

    >>> import torch
    >>> solution = integrate(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, solver="rk4", steps=10)
    >>> round(solution.x1.item(), 5), solution.stats.evaluations
    (0.36788, 40)
    """
    tableau = get_tableau(solver)
    check_state(x0, "x0")
    for name, time in (("t0", t0), ("t1", t1)):
        if not math.isfinite(time):
            raise ValueError(f"{name} must be finite, got {time}")
    if keep not in ("last", "states", "steps"):
        raise ValueError(f"keep must be 'last', 'states' or 'steps', got {keep!r}")
    stats = Statistics()
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if tolerance is not None or controller is not None:
            raise ValueError("steps excludes tolerance and controller: a solve is fixed or adaptive")
        grid = [t0 + (t1 - t0) * i / steps for i in range(steps)] + [t1]
        loop = fixed_steps(field, x0, grid, tableau, closing=keep == "steps", stats=stats)
    else:
        loop = adaptive_steps(field, x0, t0, t1, tableau, tolerance or Tolerance(), controller or I(), stats=stats)
    times, states, kept = [float(t0)], [x0], []
    try:
        for step in loop:
            if keep == "last":
                times, states = [], []
            times.append(float(step.t + step.h))
            states.append(step.x1)
            if keep == "steps":
                kept.append(step)
    except SolverError as error:
        error.solution = Solution(tuple(times), tuple(states), tuple(kept), replace(stats))
        raise
    if stats.accepted:
        times[-1] = float(t1)
    return Solution(tuple(times), tuple(states), tuple(kept), stats)
