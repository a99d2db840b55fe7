"""States at output times, read off the accepted steps inside a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from solvers.graph.clock import spread
from solvers.step import Field, Step
from solvers.tableaus import ButcherTableau

__all__ = ["Outputs"]

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

        return while_loop(goes, one, (met.clone(),))[0]

    def _inside(self, at: Tensor, met: Tensor, t: Tensor, size: Tensor, took: Tensor) -> tuple[Tensor, Tensor]:
        """The next time as a fraction of the step, and whether it lies within it."""
        theta = (_pick(at, met.clamp(max=len(at) - 1)) - t) / torch.where(took, size, 1.0)
        inside = took & (met < len(at)) & (theta <= 1 + ROUNDING)
        return torch.where((theta - 1).abs() <= ROUNDING, 1.0, theta), inside

    def state(self, theta: Tensor, x0: Tensor, x1: Tensor, stages: Sequence[Tensor], h: Any) -> Tensor:
        """The state at a fraction of a step."""
        x = x0
        for p, weight in zip(stages, self.tableau.weights_at(theta), strict=True):
            x = x + (spread(weight, x) * h).to(p.dtype) * p
        return x if self.shifts else torch.where(spread(theta == 1, x), x1, x)

    @staticmethod
    def _write(outputs: Tensor, met: Tensor, inside: Tensor, state: Tensor) -> None:
        row = torch.where(inside, met, len(outputs) - 1)  # the last row is read by none
        if row.ndim:
            outputs.index_put_((row, torch.arange(len(row), device=row.device)), state)
        else:
            outputs.index_copy_(0, row.view(1), state.unsqueeze(0))


def _pick(values: Tensor, row: Tensor) -> Tensor:
    """The row of each sample, or that of the batch."""
    if row.ndim:
        return values.gather(0, row.unsqueeze(0)).squeeze(0)
    return values.index_select(0, row.view(1)).squeeze(0)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values of several times, ``(n,)`` or ``(n, B)``, as they broadcast against ``(n, *x.shape)``."""
    return values.view(*values.shape, *[1] * (1 + x.ndim - values.ndim))
