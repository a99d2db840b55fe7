"""States at output times, read off the accepted steps inside a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.graph.repeats import at_least_once
from solvers.step import Step
from solvers.tableaus import ButcherTableau
from solvers.validation import in_state_shape

__all__ = ["Outputs", "pick"]

ROUNDING = 1e-12
"""How far behind a step's end, in parts of it, a time is at the end."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """How states at output times are read off the steps.

    Attributes:
        tableau: a method with an interpolant.
        shifts: whether gradients flow to the times, and so through the interpolant at the ends of steps too.
    """

    tableau: ButcherTableau
    shifts: bool

    def begin(self, at: Tensor, x0: Tensor, t0: Tensor, t1: Tensor, outputs: Tensor) -> Tensor:
        """Write the first state where the solve is there; how many times that are, a scalar or ``(B,)``."""
        here = (at == t0) & ((t0 == t1) | torch.full_like(t0, not self.shifts, dtype=torch.bool))
        outputs[:-1].copy_(torch.where(_spread(here, x0), x0, torch.nan))
        return here.to(torch.int64).sum(0)

    def read(
        self, at: Tensor, met: Tensor, step: Step, field: Field, t: Tensor, t_next: Tensor, took: Tensor,
        outputs: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write what lies within an accepted step; how many times are met then."""
        size = t_next - t

        def goes(met: Tensor) -> Tensor:
            return self._inside(at, met, t, size, took)[1].any()

        def one(met: Tensor) -> tuple[Tensor]:
            theta, inside = self._inside(at, met, t, size, took)
            state = self.state(theta, step.x0, step.x1, step.stages, step.h)
            self._write(outputs, met, inside, state)
            return (met + inside.to(torch.int64),)

        return at_least_once(goes, one, (met.clone(),))[0]

    def pull(
        self, at: Tensor, begun: Tensor, end: Tensor, t: Tensor, h: Tensor, g1: Tensor,
        stages: Sequence[Tensor] | None, of_outputs: Tensor, of_at: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
        """Gradients of the state before a step, of that behind it and of its stages, from those of the outputs in it.

        Args:
            at: the output times.
            begun, end: the first of them in the step, and the first behind it.
            t, h: start and signed size of the step, 0 where a sample took none.
            g1: gradient of the state behind it so far.
            stages: of the step, where gradients flow to the times.
            of_outputs: gradients of the outputs.
            of_at: gradients of the times, into which those of these are written.
        """
        n = len(self.tableau.b)
        size = torch.where(h == 0, 1.0, h)

        def goes(j: Tensor, *_: Any) -> Tensor:
            return (j < end).any()

        def one(j: Tensor, g0: Tensor, g1: Tensor, *gp: Tensor) -> tuple[Tensor, ...]:
            here = j < end
            row = j.clamp(max=len(at) - 1)
            theta = (pick(at, row) - t) / size
            theta = torch.where((theta - 1).abs() <= ROUNDING, 1.0, theta)
            g = torch.where(in_state_shape(here, g1), pick(of_outputs, row), 0)
            inside = g
            if not self.shifts:
                ends = in_state_shape(theta == 1, g)
                inside, g1 = torch.where(ends, 0, g), g1 + torch.where(ends, g, 0)
            else:
                g1 = g1.clone()
            weights = self.tableau.weights_at(theta)
            factors = (in_state_shape(w * h, g).to(g.real.dtype) for w in weights)
            if stages is not None:
                slopes = self._slopes(theta)
                rate = sum(
                    ((in_state_shape(w, g).to(g.real.dtype) * p) * g.conj()).real
                    for w, p in zip(slopes, stages, strict=True)
                )
                rate = rate.flatten(1).sum(1) if j.ndim else rate.sum()  # type: ignore[union-attr]
                place = torch.where(here, j, len(at) - 1)  # where nothing is here, what is there stays
                _put(of_at, place, torch.where(here, rate.to(of_at.dtype), pick(of_at, place)))
            return (j + here, g0 + inside, g1, *(a + f * inside for a, f in zip(gp, factors, strict=True)))

        zero = torch.zeros_like(g1)
        carried = begun.clone(), zero, g1.clone(), *(zero.clone() for _ in range(n))
        _, g0, g1, *gp = at_least_once(goes, one, carried)
        return g0, g1, list(gp)

    def _slopes(self, theta: Tensor) -> list[Tensor]:
        """Derivatives of the weights of the interpolant."""
        assert self.tableau.dense is not None
        slopes = []
        for row in self.tableau.dense:
            value = torch.zeros_like(theta)
            for k in reversed(range(len(row))):
                value = value * theta + (k + 1) * row[k]
            slopes.append(value)
        return slopes

    def _inside(self, at: Tensor, met: Tensor, t: Tensor, size: Tensor, took: Tensor) -> tuple[Tensor, Tensor]:
        """The next time as a fraction of the step, and whether it lies within it."""
        theta = (pick(at, met.clamp(max=len(at) - 1)) - t) / torch.where(took, size, 1.0)
        inside = took & (met < len(at)) & (theta <= 1 + ROUNDING)
        return torch.where((theta - 1).abs() <= ROUNDING, 1.0, theta), inside

    def state(self, theta: Tensor, x0: Tensor, x1: Tensor, stages: Sequence[Tensor], h: Any) -> Tensor:
        """The state at a fraction of a step."""
        x = x0
        for p, weight in zip(stages, self.tableau.weights_at(theta), strict=True):
            x = x + (in_state_shape(weight, x) * h).to(p.dtype) * p
        return x if self.shifts else torch.where(in_state_shape(theta == 1, x), x1, x)

    @staticmethod
    def _write(outputs: Tensor, met: Tensor, inside: Tensor, state: Tensor) -> None:
        _put(outputs, torch.where(inside, met, len(outputs) - 1), state)  # the last row is read by none


def _put(values: Tensor, row: Tensor, value: Tensor) -> None:
    """Write the row of each sample, or that of the batch."""
    if row.ndim:
        values.index_put_((row, torch.arange(row.shape[0], device=row.device)), value)
    else:
        values.index_copy_(0, row.view(1), value.unsqueeze(0))


def pick(values: Tensor, row: Tensor) -> Tensor:
    """The row of each sample, or that of the batch."""
    if row.ndim:
        return values[row, torch.arange(row.shape[0], device=row.device)]
    return values.index_select(0, row.view(1)).squeeze(0)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values of several times, ``(n,)`` or ``(n, B)``, as they broadcast against ``(n, *x.shape)``."""
    return values.view(*values.shape, *[1] * (1 + x.ndim - values.ndim))
