"""Times, step sizes and the end of a solve as tensors: what the loops on the host do with numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.controllers import SampleController, SampleStates
from solvers.tolerance import Tolerance

__all__ = ["FAILED_FIRST", "GOING", "MAX_STEPS", "NOT_FINITE", "TOO_LONG", "UNDERFLOW", "Clock", "Times"]

GOING, MAX_STEPS, UNDERFLOW, NOT_FINITE, FAILED_FIRST, TOO_LONG = range(6)
"""How a solve stands: it goes on or is over; it cannot go on, as the errors of :mod:`solvers.errors` name it; the field
is not finite where a step begins; steps grow beyond the numbers of the state."""


class Times(NamedTuple):
    """Where a solve stands; each entry is a scalar, or ``(B,)`` with a step size per sample.

    Attributes:
        t: the time, float64.
        size: wanted of the step that is tried next, a magnitude, float64.
        h: its signed size, that it ends at the end; 0 of samples that are over, and of those that are not finite that
            of the last attempt.
        errors: error ratios of the last two accepted steps, newest first.
        ratio: of the last attempt.
        accepted: whether the last attempt was.
        status: GOING, or why it cannot go on.
        taken: accepted steps.
        rejected: rejected ones.
    """

    t: Tensor
    size: Tensor
    h: Tensor
    errors: tuple[Tensor, Tensor]
    ratio: Tensor
    accepted: Tensor
    status: Tensor
    taken: Tensor
    rejected: Tensor


@dataclass(frozen=True, eq=False)
class Clock:
    """The step sizes of a solve.

    Attributes:
        tolerance, controller: what it accepts and how it chooses its steps.
        order: of the lower solution.
        largest: step that the numbers of the state hold.
        each: whether samples have their own.
        gradient: whether an attempt that is not finite sends all samples back, whose gradients it would reach.
    """

    tolerance: Tolerance
    controller: SampleController
    order: int
    largest: float
    each: bool
    gradient: bool

    def begin(self, t0: Tensor, t1: Tensor, direction: Tensor, h: Tensor) -> Times:
        """At the start, with the size ``h`` of the first attempt, which is NaN where the field is not finite there."""
        ones, none = torch.ones_like(t0), torch.zeros_like(t0, dtype=torch.int64)
        status = torch.where(h.isfinite() | (t0 == t1), GOING, FAILED_FIRST)
        times = Times(
            t0.clone(),
            h,
            h,
            (ones, ones.clone()),
            torch.full_like(t0, torch.nan),
            ones.bool(),
            status,
            none,
            none.clone(),
        )
        attempts = torch.zeros((), dtype=torch.int64, device=t0.device)
        return self._sized(times, h, t1, direction, attempts, status != GOING)

    def moving(self, times: Times, t1: Tensor) -> Tensor:
        """Which samples go on."""
        return (times.t != t1) & (times.status == GOING)

    def next(self, times: Times, t1: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Signed size of the step that is tried, and the time at its end."""
        left = (t1 - times.t).abs()
        if not self.each:
            t_next = torch.where(left <= times.size, t1, times.t + direction * times.size)
            return _span(times.t, t_next), t_next
        last = times.size >= left
        h = direction * torch.where(self.moving(times, t1), torch.where(last, left, times.size), 0.0)
        return h, torch.where(last, t1, times.t + h)

    def judge(
        self, times: Times, t1: Tensor, direction: Tensor, ratio: Tensor, attempts: Tensor,
        first_finite: Callable[[], Tensor],
    ) -> tuple[Times, Tensor, Tensor]:  # fmt: skip
        """The times behind an attempt with an error ratio, which samples took it, and its end."""
        moving, tolerance, h = self.moving(times, t1), self.tolerance, times.h
        t_next = self.next(times, t1, direction)[1]
        finite = ratio.isfinite() | ~moving
        before: Any = SampleStates(h.abs(), times.accepted, times.errors)  # type: ignore[arg-type] - of tensors
        states: Any = self.controller.each(before, ratio, self.order)  # type: ignore[arg-type]
        near = (t1 - times.t).abs() <= 10 * _spacing(times.t)
        if tolerance.min_step:
            near = near | (torch.minimum(times.size, h.abs()) <= tolerance.min_step)
        wanted = moving & (states.accepted | near)
        took, size, (last, former) = wanted & finite, states.h, states.errors
        if self.each and self.gradient:
            again = ~finite.all()
            size = torch.where(again & took, h.abs(), size)
            last, former = torch.where(again, times.errors[0], last), torch.where(again, times.errors[1], former)
            took = took & ~again
        hopeless = wanted & ~finite
        if not self.each:
            hopeless = hopeless | ~(size >= 0)
        status = torch.where(hopeless, NOT_FINITE, times.status)
        if not self.each:
            status = torch.where(finite | first_finite(), status, FAILED_FIRST)
        status = torch.where(moving, status, times.status)
        counted = moving.to(torch.int64)
        # clones, for a rule may return what it was given, which a loop does not
        after = Times(
            torch.where(took, t_next, times.t), times.size, h, (last.clone(), former.clone()),
            torch.where(moving, ratio, times.ratio), states.accepted | near, status, times.taken + took,
            times.rejected + counted - took.to(torch.int64),
        )  # fmt: skip
        return self._sized(after, size, t1, direction, attempts, ~ratio.isfinite()), took, t_next

    def _sized(
        self, times: Times, h: Tensor, t1: Tensor, direction: Tensor, attempts: Tensor, bad: Tensor
    ) -> Times:  # fmt: skip
        """The times with the size of the next attempt where ``h`` is wanted, or why there is none."""
        tolerance, smallest, left = self.tolerance, 10 * _spacing(times.t), (t1 - times.t).abs()
        longest = min(tolerance.max_step, self.largest) if self.each else tolerance.max_step
        size = h.clamp(tolerance.min_step, longest)
        near = left <= smallest
        stuck = ~(near | (size >= smallest))
        status = torch.where(stuck, torch.where(bad, NOT_FINITE, UNDERFLOW), GOING)
        size = torch.where(near, left, size)
        if not self.each:
            beyond = size > self.largest
            status = torch.where(beyond & (left > self.largest), TOO_LONG, status)
            size = size.clamp(max=self.largest)
        status = torch.where(attempts >= tolerance.max_steps, MAX_STEPS, status)
        status = torch.where(times.status == GOING, torch.where(times.t == t1, GOING, status), times.status)
        times = times._replace(size=size, status=status)
        h = torch.where(status == NOT_FINITE, times.h, self.next(times, t1, direction)[0])
        return times._replace(h=h)


def _spacing(t: Tensor) -> Tensor:
    """How far the next number is from ``|t|``, as :func:`math.ulp`."""
    t = t.abs()
    return torch.nextafter(t, torch.full_like(t, torch.inf)) - t


def _span(t: Tensor, t_next: Tensor) -> Tensor:
    """:func:`solvers.batch_loop.span` of tensors."""
    h = t_next - t
    beyond = ((h > 0) & (t + h > t_next)) | ((h < 0) & (t + h < t_next))
    return torch.where(beyond, torch.nextafter(h, torch.zeros_like(h)), h)
