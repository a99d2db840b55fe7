"""The fixed and the adaptive loop on one Runge-Kutta step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from solvers.controllers import Controller, ControllerState
from solvers.errors import MaxStepsError, NonFiniteError, StepUnderflowError
from solvers.solution import Statistics
from solvers.step import Field, Step, check_unchanged, rk_step, velocity, versions_of
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype

__all__ = ["adaptive_steps", "fixed_steps", "span"]


def span(t: float, t_next: float) -> float:
    """The step size from t to t_next, rounded so that ``t + h``, where a field is asked, does not lie beyond t_next."""
    h = t_next - t
    if (h > 0 and t + h > t_next) or (h < 0 and t + h < t_next):
        h = math.nextafter(h, 0.0)
    return h


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
        step = rk_step(field, t, x, span(t, t_next), tableau, first, closing=closing)
        stats.evaluations += len(step.stages) - (first is not None)
        stats.accepted += 1
        first = step.stages[-1] if tableau.fsal and closing else None
        x = step.x1
        yield step


def _first_not_finite(step: Step) -> tuple[int | None, int | None]:
    """The first stage that holds NaN or infinity, and its first such sample where the state is a batch."""
    for i, p in enumerate(step.stages):
        bad = ~p.detach().isfinite()
        if bad.any():
            return i, int(bad.flatten(1).any(1).nonzero()[0]) if p.ndim > 1 else None
    return None, None


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
    largest = torch.finfo(torch.promote_types(real_dtype(x), torch.float32)).max
    h = tolerance.first_step
    if h is None and t != t1:
        first = velocity(field, t, x)
        version = versions_of([first])
        h = tolerance.choose_first_step(field, t, x, first, direction, order, abs(t1 - t))
        check_unchanged([first], version)
        stats.evaluations += 2
        if not math.isfinite(h):
            bad = _first_not_finite(Step(t, math.nan, x, x, (first,), tableau))[1]
            raise NonFiniteError("the field is not finite at the first state", t=t, h=math.nan, stage=0, sample=bad)
    state = ControllerState(h if h is not None else 0.0)
    ratio, finite, bad_stage, bad_sample = math.nan, True, None, None
    while direction * (t1 - t) > 0:
        smallest, left = 10 * math.ulp(t), abs(t1 - t)
        if stats.accepted + stats.rejected >= tolerance.max_steps:
            raise MaxStepsError(
                f"{tolerance.max_steps} attempted steps did not reach t1 = {t1:g}; last error ratio {ratio:.3g}: "
                "raise max_steps, loosen the tolerance, or the problem is stiff",
                t=t, h=direction * state.h, stage=None,
            )  # fmt: skip
        size = min(max(state.h, tolerance.min_step), tolerance.max_step)
        if left <= smallest:
            size = left  # the end is within the resolution of time
        elif size < smallest:
            if not finite:
                raise _no_smaller_step(t, direction * size, bad_stage, bad_sample)
            raise StepUnderflowError(
                f"the error asks for a step below {smallest:.3g}; last error ratio {ratio:.3g}: "
                "the problem is stiff or discontinuous here, or the tolerance is below rounding",
                t=t, h=direction * size, stage=None,
            )  # fmt: skip
        if size > largest:
            if left > largest:
                raise NonFiniteError(
                    f"steps grow beyond {largest:.3g}: the velocity vanishes and nothing ends the solve before "
                    f"t1 = {t1:g}; give max_step or another t1",
                    t=t, h=direction * size, stage=None,
                )  # fmt: skip
            size = largest
        t_next = t + direction * size
        if left <= size and not overshoot:
            t_next = t1
        clipped = bool(ahead) and direction * (t_next - ahead[-1]) > 0
        if clipped:
            t_next = ahead[-1]
        h = span(t, t_next)
        if observe is not None:
            observe("step", t, x, h)
        v = _one_sided(field, t, t_next, discontinuous, x.dtype) if discontinuous else field
        step = rk_step(v, t, x, h, tableau, first)
        stats.evaluations += len(step.stages) - (first is not None)
        with torch.no_grad():
            ratio = tolerance.ratio(step)
        finite = math.isfinite(ratio)
        if not finite:
            bad_stage, bad_sample = _first_not_finite(step)
            if bad_stage == 0:
                raise NonFiniteError(
                    "the field is not finite at an accepted state", t=t, h=h, stage=0, sample=bad_sample
                )
        state = _checked(controller(state._replace(h=abs(h)), ratio, order), controller)
        if state.accepted or min(size, abs(h)) <= tolerance.min_step or left <= smallest:
            if not finite:
                raise _no_smaller_step(t, h, bad_stage, bad_sample)
            state = state._replace(accepted=True)
        if observe is not None:
            observe("accept" if state.accepted else "reject", t, x, h)
        if not state.accepted:
            stats.rejected += 1
            first = step.stages[0]
            continue
        stats.accepted += 1
        if clipped:  # by a stop, not by the error: what comes behind it may be as large as before
            state = state._replace(h=max(state.h, size))
        first = step.stages[-1] if tableau.fsal and t_next not in discontinuous else None
        t, x = t_next, step.x1
        if ahead and t == ahead[-1]:
            ahead.pop()
        yield step


def _checked(state: ControllerState, controller: Controller) -> ControllerState:
    """What a controller returned.

    Raises:
        TypeError, ValueError: it is no state, or its step size is negative or NaN.
    """
    if not isinstance(state, ControllerState):
        raise TypeError(f"controller must return a ControllerState, got {type(state).__name__} from {controller!r:.80}")
    if not state.h >= 0:
        raise ValueError(f"controller must return a step size h >= 0, got {state.h} from {controller!r:.80}")
    return state


def _no_smaller_step(t: float, h: float, stage: int | None, sample: int | None) -> NonFiniteError:
    return NonFiniteError("NaN or infinity, and no smaller step avoids it", t=t, h=h, stage=stage, sample=sample)


def _one_sided(field: Field, t: float, t_next: float, jumps: set[float], dtype: torch.dtype) -> Field:
    """The field at times strictly inside a step where the step begins or ends at a jump, in the state's precision."""
    real = torch.promote_types(dtype.to_real(), torch.float32)

    def beside(time: float, towards: float) -> float:
        return torch.nextafter(torch.tensor(time, dtype=real), torch.tensor(towards, dtype=real)).item()

    low, high = sorted((beside(t, t_next) if t in jumps else t, beside(t_next, t) if t_next in jumps else t_next))
    return lambda s, x: field(min(max(s, low), high), x)  # type: ignore[type-var]
