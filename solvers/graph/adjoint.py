"""The discrete adjoint of the accepted steps, from the last to the first, as a loop of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from solvers.field_calls import Field
from solvers.graph.loop import History, Rule
from solvers.graph.outputs import pick
from solvers.graph.repeats import at_least_once, plain
from solvers.validation import in_state_shape

__all__ = ["Adjoint"]


@dataclass(frozen=True, eq=False)
class Adjoint:
    """The gradient of a solve, by the chain rule through its steps.

    Attributes:
        rule: how the steps were taken.
        field: makes the velocity ``v(t, x)`` of what else it is computed from.
        tensors: what that is; each gets a gradient.
        history: what was kept of the steps.
        steps: their number, a scalar, at least 1: of a solve without a step there is a row of size 0.
        x0, x1: the first and the last state.
        t0: the start, a scalar or ``(B,)``.
        at, met: output times, and how many of them are met at the start; or None.
    """

    rule: Rule
    field: Callable[[Sequence[Tensor]], Field]
    tensors: Sequence[Tensor]
    history: History
    steps: Tensor
    x0: Tensor
    x1: Tensor
    t0: Tensor
    at: Tensor | None
    met: Tensor | None

    def pull(self, t: Tensor, x: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What a gradient of the velocity at x is for x and for the tensors."""

        def velocity(x: Tensor, *tensors: Tensor) -> Tensor:
            return self.field(tensors)(in_state_shape(t, x), x)

        pulled: Any = torch.func.vjp(velocity, x, *self.tensors)[1]
        of_x, *of_tensors = pulled(gradient)
        return of_x, tuple(of_tensors)

    def solve(self, g1: Tensor, of_outputs: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Gradients of the first state, of the tensors and of the output times.

        Args:
            g1: that of the last state.
            of_outputs: those of the states at the output times, ``(n, *x0.shape)``.
        """
        history, steps, slots = self.history, self.steps, len(self.history.states)
        replays = len(history.marks) > 0
        again = History.empty(self.x0, self.t0, 1, slots, len(history.stages), None) if replays else None
        of_at = torch.zeros((), device=g1.device) if self.at is None else torch.zeros_like(self.at)
        sums = tuple(plain(torch.zeros_like(x)) for x in self.tensors)
        g1, x1 = plain(g1), plain(self.x1)
        begun = (steps.clone(), g1, torch.zeros_like(g1), x1, *sums)

        def goes(n: Tensor, *_: Any) -> Tensor:
            return n > 0

        def window(n: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            assert again is not None
            first = (n - slots).clamp(min=0)
            row = first // history.width
            start = torch.where(n < steps, row * history.width, n)  # the last ones are in the history as they are
            x = self._replay(start, n, pick(history.marks, row), again)
            carried = (carried[0], carried[1], torch.where(n < steps, x, carried[2]), *carried[3:])
            return self._steps(first, n, carried, again, of_outputs, of_at)

        if replays:
            _, gx, gk, _, *sums = while_loop(goes, window, begun)
        else:
            none = torch.zeros_like(steps)
            _, gx, gk, _, *sums = self._steps(none, steps, begun[1:], None, of_outputs, of_at)
        if self.deferred(of_outputs):
            of_x, of_tensors = self.pull(self.t0, self.x0, gk)
            gx, sums = gx + of_x, [a + b for a, b in zip(sums, of_tensors, strict=True)]
        return gx, list(sums), of_at

    def deferred(self, of_outputs: Tensor | None) -> bool:
        """Whether the pull of a step's first stage waits for the outputs of the step before, which read it."""
        return self.rule.tableau.fsal and of_outputs is not None

    def _replay(self, n: Tensor, end: Tensor, x: Tensor, again: History) -> Tensor:
        """Take the steps from row n to the ``end`` anew, from x, and keep them; the state behind them."""
        rule, field, slots = self.rule, self.field(self.tensors), len(again.states)
        fsal = rule.tableau.fsal

        def goes(n: Tensor, x: Tensor, first: Tensor) -> Tensor:
            return n < end

        def one(n: Tensor, x: Tensor, first: Tensor) -> tuple[Tensor, ...]:
            t, h = (v.clone() for v in pick(self.history.times, n.clamp(max=len(self.history.times) - 1)).unbind())
            step = rule.step(field, t, x, h, first if fsal else None)
            again.write(n.remainder(slots), x, [step.stages[j] for j in rule.read])
            took = in_state_shape(h != 0, x)
            first = torch.where(took, step.stages[-1], step.stages[0]) if fsal else first.clone()
            return n + 1, plain(torch.where(took, step.x1, x)), plain(first)

        first = plain(x)
        if fsal:
            t = pick(self.history.times, n.clamp(max=len(self.history.times) - 1)).unbind()[0]
            first = field(in_state_shape(torch.where(n < end, t, self.t0), x), x)
        return at_least_once(goes, one, (n.clone(), plain(x), plain(first)))[1]

    def _steps(
        self, first: Tensor, n: Tensor, carried: tuple[Tensor, ...], again: History | None, of_outputs: Tensor | None,
        of_at: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Back through the steps from row n to the ``first``."""

        def goes(n: Tensor, *_: Any) -> Tensor:
            return n > first

        def one(n: Tensor, gx: Tensor, gk: Tensor, x_next: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
            gx, gk, x, sums = self._step(n - 1, gx, gk, x_next, sums, again, of_outputs, of_at)
            return (n - 1, *(plain(v) for v in (gx, gk, x, *sums)))

        return while_loop(goes, one, (n.clone(), *(x.clone() for x in carried)))

    def _step(
        self, n: Tensor, g1: Tensor, gk: Tensor, x1: Tensor, sums: tuple[Tensor, ...],
        again: History | None,
        of_outputs: Tensor | None, of_at: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Back through the step of row n.

        Args:
            n: the row.
            g1: gradient of the state behind it.
            gk: that of the velocity there, which is the first stage of the next step.
            x1: the state behind it.
            sums: gradients of the tensors so far.
            again: steps that were taken anew, if any may be.
            of_outputs, of_at: gradients of the outputs; those of the output times are written.

        Returns:
            The same before the step: gradients of the state and of its velocity, the state, and those of the tensors.
        """
        rule, tableau, history, slots = self.rule, self.rule.tableau, self.history, len(self.history.states)
        t, h = (v.clone() for v in pick(history.times, n).unbind())
        recent, row = n >= self.steps - slots, n % slots
        x, *kept = (pick(a, row) for a in (history.states, *history.stages))
        if again is not None:
            others = (pick(a, row) for a in (again.states, *again.stages))
            x, *kept = (torch.where(recent, a, b) for a, b in zip((x, *kept), others, strict=True))
        p = dict(zip(rule.read, kept, strict=True))
        took, size = in_state_shape(h != 0, x), in_state_shape(h, x).to(x.real.dtype)
        a: list[list[Any]] = [[w * size for w in row] for row in tableau.a]
        gp: list[Tensor | None] = [None] * tableau.stages
        gx = torch.zeros_like(g1)

        def add(gradient: Tensor, t: Tensor, x: Tensor) -> Tensor:
            nonlocal sums
            of_x, of_tensors = self.pull(t, x, gradient)
            sums = tuple(s + g for s, g in zip(sums, of_tensors, strict=True))
            return of_x

        def point(i: int) -> Tensor:
            y = x
            for j in range(i):
                if tableau.a[i][j]:
                    y = y + p[j] * a[i][j]
            return y

        if of_outputs is not None and rule.outputs is not None and self.at is not None and self.met is not None:
            begun = torch.where(n > 0, pick(history.outputs, (n - 1).clamp(min=0)), self.met)
            stages: list[Tensor] | None = None
            if rule.outputs.shifts:
                field = self.field(self.tensors)
                stages = [*rule.step(field, t, x, h, None).stages]
            gx, g1, gp = rule.outputs.pull(
                self.at, begun, pick(history.outputs, n), t, h, g1, stages, of_outputs, of_at
            )  # fmt: skip
        deferred = self.deferred(of_outputs)
        if deferred:
            closing = gk if gp[-1] is None else gk + gp[-1]
            g1 = g1 + torch.where(took, add(torch.where(took, closing, 0), t + h, x1), 0)
        for i, b in enumerate(tableau.b):
            if b:
                g = g1 * (b * size)
                gp[i] = g if gp[i] is None else gp[i] + g  # type: ignore[operator]
        for i in reversed(range(1, tableau.stages - tableau.fsal)):
            g = gp[i]
            if g is None:
                continue
            gy = add(torch.where(took, g, 0), t + tableau.c[i] * h, point(i))
            gx = gx + gy
            for j in range(i):
                if tableau.a[i][j]:
                    g = gy * a[i][j]
                    gp[j] = g if gp[j] is None else gp[j] + g  # type: ignore[operator]
        first = gp[0]
        assert first is not None
        first = torch.where(took, first, 0)
        if deferred:
            return g1 + torch.where(took, gx, 0), first + torch.where(took, 0, gk), x, sums
        gx = gx + add(first, t, x)
        return g1 + torch.where(took, gx, 0), gk.clone(), x, sums
