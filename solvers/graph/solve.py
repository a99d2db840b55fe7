"""A solve in a graph with its gradient, as a function of tensors that a compiler takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from solvers.field_calls import Field
from solvers.graph.adjoint import Adjoint
from solvers.graph.backsolve import Backsolve
from solvers.graph.clock import Clock
from solvers.graph.fields import GraphField
from solvers.graph.loop import History, Rule, Solved, solve
from solvers.graph.outputs import Outputs
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype

__all__ = ["SLOTS", "Ending", "Numbers", "Setting", "solved"]

SLOTS = 100
"""Accepted steps whose states are kept for the gradient; where there are more they are taken anew from some."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What is solved and how, but for the tensors.

    Attributes:
        field: the velocity.
        tableau, tolerance, controller: the method, what it accepts and how it chooses its steps.
        raises: whether a sample that cannot go on ends the solve.
        backsolves: whether the gradient is that of the ODE, solved backwards.
        replays: whether steps may be more than those whose states are kept for the gradient, so that it takes some
            anew; otherwise it is that of a solve with no more steps.
    """

    field: GraphField
    tableau: ButcherTableau
    tolerance: Tolerance
    controller: Any
    raises: bool
    backsolves: bool
    replays: bool


class Ending(NamedTuple):
    """How a solve ended, in tensors.

    Attributes:
        x: the last states, ``(B, *S)``; gradients flow to them.
        outputs: the states at the output times, ``(n, B, *S)``; gradients flow to them; one row of no meaning if there
            are none.
        numbers: rows of numbers, float64, ``(11,)`` or ``(11, B)``, as :class:`Numbers` has them.
    """

    x: Tensor
    outputs: Tensor
    numbers: Tensor


class Numbers(NamedTuple):
    """The numbers of a solve: of each sample, or of the batch.

    Attributes:
        t, size, ratio: the time, the next step size and the error ratio of the last attempt.
        tried: signed size of the step that is tried next, or that of the last one where it was not finite.
        status: GOING if it is over, or why it cannot go on.
        taken, rejected, calls: accepted and rejected steps, and field calls made.
        attempts, all_calls: of the solve as a whole.
        steps: those that any sample took.
    """

    t: Any
    size: Any
    ratio: Any
    tried: Any
    status: Any
    taken: Any
    rejected: Any
    calls: Any
    attempts: Any
    all_calls: Any
    steps: Any


def solved(setting: Setting, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None, args: Sequence[Any]) -> Ending:
    """Solve from t0 to t1.

    Args:
        setting: what and how.
        x0: the first state, packed.
        t0, t1: scalars float64, or ``(B,)`` with a step size per sample.
        at: output times float64, ``(n,)``, or ``(n, B)`` with a step size per sample; or None.
        args: further arguments of the field.
    """
    leaves, spec = tree_flatten(tuple(args))
    places = [i for i, leaf in enumerate(leaves) if _may_need(leaf)]
    tensors = [*(leaves[i] for i in places), *setting.field.parameters]
    needs = any(x is not None and x.requires_grad for x in (x0, at, *tensors))
    shifts = at is not None and at.requires_grad and torch.is_grad_enabled()
    call = _Call(setting, leaves, spec, places, shifts)
    if not (torch.is_grad_enabled() and needs):
        with torch.no_grad():
            return Ending(*call.solve(x0, t0, t1, at, tensors, None)[0])
    way = Backsolve if setting.backsolves else _Solve
    return Ending(*way.apply(call, x0, t0, t1, at, *tensors))  # type: ignore[misc]


def _may_need(leaf: Any) -> bool:
    """Whether it may get a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


@dataclass(frozen=True, eq=False)
class _Call:
    """A solve as a function of its tensors: the first state, times, tensors among the arguments, and parameters."""

    setting: Setting
    leaves: list[Any]
    spec: Any
    places: list[int]
    shifts: bool

    def field(self, tensors: Sequence[Tensor], own: bool = False) -> Field:
        """The velocity, of the tensors, or with the ``own`` parameters of its modules."""
        leaves = [*self.leaves]
        for i, tensor in zip(self.places, tensors[: len(self.places)], strict=True):
            leaves[i] = tensor
        args = tree_unflatten(leaves, self.spec)
        return self.setting.field.velocity(args, None if own else tensors[len(self.places) :])

    def rule(self, x: Tensor, t0: Tensor, gradient: bool) -> Rule:
        """How the steps are taken."""
        setting, each = self.setting, t0.ndim > 0
        largest = torch.finfo(real_dtype(x) if each else torch.promote_types(real_dtype(x), torch.float32)).max
        clock = Clock(setting.tolerance, setting.controller, setting.tableau.error_order, largest, each, gradient)
        outputs = None if setting.tableau.dense is None else Outputs(setting.tableau, self.shifts)
        return Rule(setting.tableau, clock, outputs, setting.raises)

    def solve(
        self, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None, tensors: Sequence[Tensor], slots: int | None
    ) -> tuple[tuple[Tensor, ...], Solved, History | None]:
        """Solve, and keep a history with room for the states of so many steps."""
        rule, history = self.rule(x0, t0, slots is not None), None
        if slots is not None:
            most = self.setting.tolerance.max_steps
            rows = max(most, slots + 1) if self.setting.replays and most > slots else slots
            history = History.empty(x0, t0, rows, slots, len(rule.read), at is not None)
        end = solve(rule, self.field(tensors, own=True), x0, t0, t1, at, history)
        times = end.times
        numbers = Numbers(
            times.t, times.size, times.ratio, times.h, times.status, times.taken, times.rejected, end.calls,
            *(count.expand_as(t0) for count in (end.attempts, end.all_calls, end.steps)),
        )  # fmt: skip
        return (end.x, end.outputs[:-1], torch.stack([v.to(torch.float64) for v in numbers])), end, history


class _Solve(torch.autograd.Function):
    """The solve, and the discrete adjoint of its steps."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ending, end, history = call.solve(x0, t0, t1, at, tensors, SLOTS)
        assert history is not None
        ctx.call, ctx.stages, ctx.outputs = call, len(history.stages), at is not None
        times = () if at is None else (at,)
        ctx.save_for_backward(
            x0, t0, t1, end.x.clone(), end.steps.clamp(min=1), history.times, history.outputs, history.states,
            history.marks, *history.stages, *times, *tensors,
        )  # fmt: skip
        ctx.width = history.width
        ctx.mark_non_differentiable(*ending[2:])
        return ending

    @staticmethod
    def backward(ctx: Any, g1: Tensor, of_outputs: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x0, t0, t1, x1, steps, times, outputs, states, marks, *rest = ctx.saved_tensors
        stages, rest = rest[: ctx.stages], rest[ctx.stages :]
        at, tensors = (rest[0], rest[1:]) if ctx.outputs else (None, rest)
        call = ctx.call
        rule = call.rule(x0, t0, True)
        met = here = None
        if at is not None:
            here = (at == t0) & ((t0 == t1) | torch.full_like(t0, not call.shifts, dtype=torch.bool))
            met = here.to(torch.int64).sum(0)
        history = History(times, outputs, states, tuple(stages), marks, ctx.width)
        adjoint = Adjoint(rule, call.field, tensors, history, steps, x0, x1, t0, at, met)
        gx, of_tensors, of_at = adjoint.solve(g1, of_outputs if at is not None else None)
        if at is not None and here is not None:
            mask = here.view(*here.shape, *[1] * (1 + x0.ndim - here.ndim))
            gx = gx + torch.where(mask, of_outputs, 0).sum(0)
        return (None, gx, None, None, of_at if call.shifts else None, *of_tensors)
