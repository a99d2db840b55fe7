"""The loop of an adaptive solve as an operator: attempts until all samples are over, and what its gradient needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.first_step import first_step
from solvers.graph.clock import GOING, Clock, Times
from solvers.graph.outputs import Outputs
from solvers.graph.repeats import at_least_once, plain
from solvers.runge_kutta import rk_step
from solvers.step import Step
from solvers.tableaus import ButcherTableau
from solvers.validation import in_state_shape, real_dtype

__all__ = ["History", "Solved", "solve"]


MARKS = 100
"""States that are kept on the way, at most."""


class History(NamedTuple):
    """What is kept of the accepted steps, one row each, for the gradient.

    Attributes:
        times: start and signed size of each, ``(rows, 2)``, or ``(rows, 2, B)``, 0 where a sample took none.
        outputs: how many output times lay behind each, ``(rows,)`` or ``(rows, B)``; one row where there are none.
        states: of the last steps, in row n modulo their number, ``(slots, *x0.shape)``.
        stages: of the same, those that further stages read.
        marks: states before every ``width``-th step, from which steps are taken anew, and a row of no meaning; no rows
            where none are.
        width: a number.
    """

    times: Tensor
    outputs: Tensor
    states: Tensor
    stages: tuple[Tensor, ...]
    marks: Tensor
    width: int

    @classmethod
    def empty(cls, x: Tensor, t: Tensor, rows: int, slots: int, stages: int, outputs: bool | None) -> History:
        """Room for so many steps, and for the states of some.

        Args:
            x, t: a state and a time.
            rows, slots, stages: numbers of steps, of those whose states are kept, and of the stages of each.
            outputs: whether there are output times; None for steps that are taken anew.
        """
        width = max(slots, -(-rows // MARKS))
        return cls(
            t.new_empty(rows, 2, *t.shape),
            torch.empty(rows if outputs else 1, *t.shape, dtype=torch.int64, device=t.device),
            x.new_empty(slots, *x.shape),
            tuple(x.new_empty(slots, *x.shape) for _ in range(stages)),
            x.new_empty(0 if rows <= slots else -(-rows // width) + 1, *x.shape),
            width,
        )

    def note(self, n: Tensor, t: Tensor, h: Tensor, x: Tensor, behind: Tensor) -> None:
        """Write what is kept of every step, in row n, again where a step was rejected."""
        here = (n if len(self.marks) else n % len(self.times)).view(1)
        self.times.index_copy_(0, here, torch.stack([t, h]).unsqueeze(0))
        if len(self.outputs) > 1:
            self.outputs.index_copy_(0, here, behind.unsqueeze(0))
        if len(self.marks):
            row = torch.where(n % self.width == 0, n // self.width, len(self.marks) - 1)
            self.marks.index_copy_(0, row.view(1), x.unsqueeze(0))

    def write(self, row: Tensor, x: Tensor, stages: Sequence[Tensor]) -> None:
        """Write what is kept of the last steps."""
        row = row.view(1)
        self.states.index_copy_(0, row, x.unsqueeze(0))
        for i in range(len(stages)):  # no names, which the compiler would give to several tensors
            self.stages[i].index_copy_(0, row, stages[i].unsqueeze(0))


class Solved(NamedTuple):
    """The end of a loop.

    Attributes:
        times: of the samples at its end.
        x: states there.
        attempts, steps: rows of attempted and of kept steps, scalars.
        calls: of the field, for each sample, a scalar or ``(B,)``.
        all_calls: of the field, a scalar.
        outputs: the states at the output times, ``(n, *x0.shape)``; one row of no meaning where there are none.
        met: how many of them were met; 0 where there are none.
    """

    times: Times
    x: Tensor
    attempts: Tensor
    steps: Tensor
    calls: Tensor
    all_calls: Tensor
    outputs: Tensor
    met: Tensor


@dataclass(frozen=True, eq=False)
class Rule:
    """How a solve takes its steps.

    Attributes:
        tableau: the method.
        clock: its step sizes.
        outputs: what reads states at output times off the steps, or None.
        raises: whether a sample that cannot go on ends the solve.
    """

    tableau: ButcherTableau
    clock: Clock
    outputs: Outputs | None = None
    raises: bool = True

    @property
    def read(self) -> list[int]:
        """The stages that further stages read: these and the state give the points at which the field is called."""
        tableau = self.tableau
        return [j for j in range(tableau.interior) if any(tableau.a[i][j] for i in range(j + 1, tableau.interior))]

    def step(self, field: Field, t: Tensor, x: Tensor, h: Tensor, first: Tensor | None) -> Step:
        """One step; sizes of samples are numbers of the precision of their states."""
        h = in_state_shape(h.to(real_dtype(x)), x) if self.clock.each else h
        return rk_step(field, in_state_shape(t, x), x, h, self.tableau, first)


def solve(
    rule: Rule, field: Field, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None = None,
    history: History | None = None,
) -> Solved:  # fmt: skip
    """Solve from t0 to t1; without gradients.

    Args:
        rule: how.
        field: velocity ``v(t, x)``, t a tensor.
        x0: the first state, ``(B, *S)``.
        t0, t1: scalars float64, or ``(B,)``.
        at: output times, ``(n,)`` or ``(n, B)``, or None.
        history: what to keep of the steps, written in place.
    """
    clock, tableau, tolerance = rule.clock, rule.tableau, rule.clock.tolerance
    direction = torch.where(t1 >= t0, 1.0, -1.0).to(t0.dtype)
    first, calls = field(in_state_shape(t0, x0), x0), 1
    if tolerance.first_step is None:
        h = first_step(field, t0, x0, first, direction, clock.order, (t1 - t0).abs(), tolerance)
        calls += 1
    else:
        h = torch.full_like(t0, tolerance.first_step)
    none = torch.zeros((), dtype=torch.int64, device=t0.device)
    outputs = x0.new_empty(1 if at is None else len(at) + 1, *x0.shape)
    times = clock.begin(t0, t1, direction, h)
    met = (rule.outputs.begin(at, x0, t0, t1, outputs),) if rule.outputs is not None and at is not None else ()
    made = tableau.stages - tableau.fsal  # field calls of an attempt

    def goes(times: Times, x: Tensor, *_: Any) -> Tensor:
        going = clock.moving(times, t1).any()
        return going & (times.status == GOING).all() if rule.raises else going

    def attempt(
        times: Times, x: Tensor, first: Tensor, counts: tuple[Tensor, ...], met: tuple[Tensor, ...]
    ) -> tuple[Any, ...]:
        attempts, steps = counts or (times.taken + times.rejected, times.taken)
        step = rule.step(field, times.t, x, times.h, first if tableau.fsal else None)
        scaled = tolerance.scaled(step.error(), x, step.x1)
        ratio = tolerance.size(scaled, each=clock.each).to(times.t.dtype)
        after, took, t_next = clock.judge(
            times, t1, direction, ratio, attempts + 1, lambda: step.stages[0].isfinite().all()
        )  # fmt: skip
        mask = in_state_shape(took, x)
        if rule.outputs is not None and at is not None:
            met = (rule.outputs.read(at, met[0], step, field, times.t, t_next, took, outputs),)
        if history is not None:
            stages = [step.stages[j] for j in rule.read]
            history.note(steps, times.t, torch.where(took, times.h, 0.0), x, met[0] if met else steps)
            history.write(steps.remainder(len(history.states)), x, stages)
        first = torch.where(mask, step.stages[-1], step.stages[0]) if tableau.fsal else first
        if counts:
            counts = attempts + clock.moving(times, t1).any().to(torch.int64), steps + took.any().to(torch.int64)
        return after, plain(torch.where(mask, step.x1, x)), plain(first), counts, tuple(m.clone() for m in met)

    begun = (times, plain(x0), plain(first), (none, none.clone()) if clock.each else (), met)
    times, x, _, counts, met = at_least_once(goes, attempt, begun)
    tried = times.taken + times.rejected
    attempts, steps = counts or (tried, times.taken)
    begun_calls = calls * (t0 != t1).to(torch.int64)
    return Solved(
        times, x, attempts, steps, made * tried + begun_calls, made * attempts + begun_calls.amax(), outputs,
        met[0] if met else none,
    )  # fmt: skip
