"""The fixed and the adaptive loop on one Runge-Kutta step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.controllers import Controller, ControllerState, check_returned
from solvers.errors import NonFiniteError, Status, failure
from solvers.field_calls import Field, velocity
from solvers.first_step import first_step
from solvers.implicit import check_found
from solvers.solution import Statistics
from solvers.step import Step
from solvers.steppers import Stepper, stepper
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance, too_small

__all__ = ["Observer", "adaptive_steps", "fixed_steps", "span"]

Observer = Callable[[str, Any, Tensor, Any], None]


class _Bad(NamedTuple):
    """Where a step is not finite: its first such stage and, of a batch, sample, or what is not found there."""

    stage: int | None
    sample: int | None
    status: Status


def span(t: float, t_next: float) -> float:
    """The step size from t to t_next, rounded so that the field is evaluated at ``t + h``, not beyond t_next."""
    h = t_next - t
    if (h > 0 and t + h > t_next) or (h < 0 and t + h < t_next):
        h = math.nextafter(h, 0.0)
    return h


def fixed_steps(
    field: Field, x: Tensor, times: Iterable[Any], tableau: ButcherTableau, *, closing: bool = False,
    inward: bool = False, observe: Observer | None = None, stats: Statistics | None = None, take: Stepper | None = None
) -> Iterator[Step]:  # fmt: skip
    """Steps from each time to the next, reusing the closing stage of FSAL methods; never waits for the device.

    Args:
        field: velocity ``v(t, x)``.
        x: state at ``times[0]``, ``(B, *S)``.
        times: the grid: numbers, or scalar tensors, which gradients flow to.
        tableau: the method.
        closing: whether each step carries its closing stage.
        inward: evaluate the field just inside each step, at its first and last instant.
        observe: called as ``observe("step", t, x, h)``.
        stats: counts to add to.
        take: what takes the steps, if not what the method is taken by.
    """
    stats = Statistics() if stats is None else stats
    first, take = None, take or stepper(tableau)
    for t, t_next in pairwise(times):
        h: Any = t_next - t if isinstance(t, Tensor) else span(t, t_next)
        if observe is not None:
            observe("step", t, x, h)
        v = _inside(field, t, t_next, x.dtype) if inward else field
        before = take.calls
        step = take(v, t, x, h, first, closing=closing)
        check_found(step)
        take.accept()
        stats.evaluations += take.calls - before
        stats.accepted += 1
        first = step.stages[-1] if tableau.fsal and (closing or tableau.implicit) else None
        x = step.x1
        yield step


def adaptive_steps(
    field: Field, x: Tensor, *, t0: float, t1: float, tableau: ButcherTableau, tolerance: Tolerance,
    controller: Controller, stops: Sequence[float] = (), jumps: Sequence[float] = (), observe: Observer | None = None,
    stats: Statistics | None = None, take: Stepper | None = None
) -> Iterator[Step]:  # fmt: skip
    """Accepted steps from t0 to t1 under error control; waits for the device once per attempted step
    (and three times to choose the first step, if it is not given).

    The step size is chosen by the detached error: gradients flow through the accepted steps, not through the choice.

    Args:
        field: velocity ``v(t, x)``.
        x: state at t0.
        t0, t1: start and end.
        tableau, tolerance, controller: the method, what it accepts, and how it chooses its steps.
        stops: times at which a step ends.
        jumps: stops at which the field is discontinuous: it is evaluated on either side of them, never across.
        observe: called as ``observe(what, t, x, h)`` with what = "step", "accept" or "reject".
        stats: counts to add to.
        take: what takes the steps, if not what the method is taken by.

    Raises:
        StepUnderflowError, MaxStepsError, NonFiniteError: the solve cannot go on.
    """
    stats = Statistics() if stats is None else stats
    order, min_step = tableau.error_order, tolerance.min_step
    bounds = _Bounds(x, t0, t1, stops, jumps, tolerance, tableau)
    t, size, first, ratio, bad = t0, tolerance.first_step, None, math.nan, None
    if size is None:
        size, first = _first(field, x, t0, t1, tableau, tolerance, stats)
    state, take = ControllerState(size), take or stepper(tableau, tolerance)
    while bounds.direction * (t1 - t) > 0:
        if stats.accepted + stats.rejected >= tolerance.max_steps:
            h = bounds.direction * state.h
            raise failure(
                "max_steps", t=t, h=h, attempts=tolerance.max_steps, t1=t1, ratio=ratio, implicit=tableau.implicit
            )
        size, last = bounds.size(t, state.h, ratio, bad)
        t_next, clipped = bounds.end(t, size)
        h = span(t, t_next)
        if observe is not None:
            observe("step", t, x, h)
        v = bounds.one_sided(field, t, t_next) if bounds.jumps else field
        before = take.calls
        step = take(v, t, x, h, first)
        stats.evaluations += take.calls - before
        with torch.no_grad():
            ratio = tolerance.ratio(step)
        bad = None if math.isfinite(ratio) else _first_not_finite(step)
        if bad is not None and bad.stage == 0 and not tableau.a[0] and step.unsolved is None:
            raise NonFiniteError("the field is not finite at an accepted state", t=t, h=h, stage=0, sample=bad.sample)
        state = controller(state._replace(h=abs(h)), ratio, order)
        check_returned(state, ControllerState, controller)
        if not state.h >= 0:
            raise ValueError(f"controller must return a step size h >= 0, got {state.h} from {controller!r:.80}")
        if state.accepted or min(size, abs(h)) <= min_step or last:
            if bad is not None:
                raise failure(bad.status, t=t, h=h, stage=bad.stage, sample=bad.sample)
            state = state._replace(accepted=True)
        if observe is not None:
            observe("accept" if state.accepted else "reject", t, x, h)
        if not state.accepted:
            stats.rejected += 1
            first = step.stages[0]
            continue
        before = take.calls
        take.accept()
        stats.evaluations += take.calls - before
        stats.accepted += 1
        if clipped:  # by a stop, not by the error: what comes behind it may be as large as before
            state = state._replace(h=max(state.h, size))
        first = step.stages[-1] if tableau.fsal and t_next not in bounds.jumps else None
        t, x = t_next, step.x1
        yield step


class _Bounds:
    """What bounds the steps beside their error: the limits, the end of the solve, stops and jumps."""

    def __init__(
        self,
        x: Tensor,
        t0: float,
        t1: float,
        stops: Sequence[float],
        jumps: Sequence[float],
        tolerance: Tolerance,
        tableau: ButcherTableau,
    ) -> None:
        self.t1, self.direction, self.jumps, self.dtype = t1, 1 if t1 >= t0 else -1, set(jumps), x.dtype
        ahead = {s for s in (*stops, *jumps) if self.direction * (s - t0) > 0}
        self.ahead = sorted(ahead, key=lambda s: -self.direction * s)
        self.implicit = tableau.implicit
        self.min_step, self.max_step = tolerance.min_step, tolerance.max_step
        self.largest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max

    def size(self, t: float, h: float, ratio: float, bad: _Bad | None) -> tuple[float, bool]:
        """The size of the next step where the controller asks for h, and whether the end is as near as time resolves.

        The error ratio of the last attempt, and where it was not finite, are for errors.
        """
        smallest, left = 10 * math.ulp(t), abs(self.t1 - t)
        size = min(max(h, self.min_step), self.max_step)
        if left <= smallest:
            size = left
        elif size < smallest:
            if bad is not None:
                raise failure(bad.status, t=t, h=self.direction * size, stage=bad.stage, sample=bad.sample)
            h = self.direction * size
            raise failure("underflow", t=t, h=h, ratio=ratio, smallest=smallest, implicit=self.implicit)
        if size > self.largest:
            if left > self.largest:
                raise NonFiniteError(
                    f"steps grow beyond {self.largest:.3g}: the velocity vanishes and nothing ends the solve before "
                    f"t1 = {self.t1:g}; give max_step or another t1",
                    t=t, h=self.direction * size, stage=None,
                )  # fmt: skip
            size = self.largest
        return size, left <= smallest

    def end(self, t: float, size: float) -> tuple[float, bool]:
        """Where a step of a size ends, and whether a stop clips it."""
        t_next = self.t1 if abs(self.t1 - t) <= size else t + self.direction * size
        ahead = self.ahead
        while ahead and self.direction * (ahead[-1] - t) <= 0:
            ahead.pop()
        if ahead and self.direction * (t_next - ahead[-1]) > 0:
            return ahead[-1], True
        return t_next, False

    def one_sided(self, field: Field, t: float, t_next: float) -> Field:
        """The field of a step, on its side of the jumps at which it begins or ends."""
        return _inside(field, t, t_next, self.dtype, begins=t in self.jumps, ends=t_next in self.jumps)


def _first(
    field: Field, x: Tensor, t0: float, t1: float, tableau: ButcherTableau, tolerance: Tolerance, stats: Statistics
) -> tuple[float, Tensor | None]:
    """The size to attempt first, and the velocity at the start."""
    if t0 == t1:
        return 0.0, None
    first, direction = velocity(field, t0, x), 1 if t1 >= t0 else -1
    h = first_step(field, t0, x, first, direction, tableau.error_order, abs(t1 - t0), tolerance)
    stats.evaluations += 2
    if not math.isfinite(h):
        bad = _first_not_finite(Step(t0, math.nan, x, x, (first,), tableau))
        if bad.stage is None and bool(x.isfinite().all()):
            raise NonFiniteError(too_small(tolerance, x), t=t0, h=math.nan, stage=None)
        raise NonFiniteError("the field is not finite at the first state", t=t0, h=math.nan, stage=0, sample=bad.sample)
    return h, first


def _first_not_finite(step: Step) -> _Bad:
    """The first stage that holds NaN or infinity, and its first such sample where the state is a batch."""
    stages = step.not_finite()
    stage = min((int(i) for i in stages if i >= 0), default=None)
    if stage is None or step.x0.ndim < 2:
        sample, row = None, 0
    else:
        sample = row = int((stages == stage).argmax())
    return _Bad(stage, sample, "newton" if step.unsolved is not None and step.unsolved[row] == stage else "not_finite")


def _inside(field: Field, t: Any, t_next: Any, dtype: torch.dtype, *, begins: bool = True, ends: bool = True) -> Field:
    """The field at times strictly inside a step, in the state's precision, at its first and its last instant."""
    real = torch.promote_types(dtype.to_real(), torch.float32)
    start, end = (torch.as_tensor(time, dtype=real).detach() for time in (t, t_next))
    after, before = torch.nextafter(start, end), torch.nextafter(end, start)
    if isinstance(t, Tensor):
        low, high = torch.minimum(after, before), torch.maximum(after, before)
        return lambda s, x: field(s + (s.clamp(low, high) - s).detach(), x)  # type: ignore[union-attr] - a tensor here
    least, most = sorted((after.item() if begins else t, before.item() if ends else t_next))
    return lambda s, x: field(min(max(s, least), most), x)  # type: ignore[type-var] - a number here
