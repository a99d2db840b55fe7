"""The gradient of the ODE, by its adjoint solved backwards in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from solvers.graph.clock import GOING
from solvers.graph.loop import solve
from solvers.graph.outputs import pick
from solvers.graph.repeats import at_least_once
from solvers.tolerance import Tolerance

__all__ = ["Backsolve"]


@dataclass(frozen=True, eq=False)
class _Seminorm:
    """A tolerance for vectors of state, adjoint and integrals: the error is that of state and adjoint, the larger.

    The integrals over the parameters, which nothing feeds back on, are left out (Kidger, Chen, Lyons, 2021, Hey, that's
    not an ODE).

    Attributes:
        of: the tolerance of the state.
        shape: of the state.
        integrals: their number.
    """

    of: Tolerance
    shape: Sequence[int]
    integrals: int
    first_step: float | None
    min_step: float
    max_step: float
    max_steps: int

    @property
    def rtol(self) -> Any:
        """Of the state, the adjoint and the integrals."""
        return self._whole(self.of.rtol)

    @property
    def atol(self) -> Any:
        """Likewise."""
        return self._whole(self.of.atol)

    def scaled(self, error: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        """The errors of state and adjoint over their tolerances, ``(2, *shape)``."""
        return self.of.scaled(*(self._parts(z) for z in (error, z0, z1)))

    def size(self, scaled: Tensor, *, each: bool = False) -> Tensor:
        """Their larger norm."""
        return torch.maximum(self.of.size(scaled[0]), self.of.size(scaled[1]))

    def size_in_graph(self, value: Tensor, scale: Tensor, *, each: bool = False) -> Tensor:
        """The same of ``value / scale``, float64."""
        return self.size(self._parts(self.of._over(value, scale))).to(torch.float64)

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.expand(self.shape).reshape(-1)
        return torch.cat([value, value, value.new_ones(self.integrals)])

    def _parts(self, z: Tensor) -> Tensor:
        return z[: 2 * math.prod(self.shape)].view(2, *self.shape)


class Backsolve(torch.autograd.Function):
    """The solve, and its adjoint ``da/dt = -a^T dv/dx``, ``dL/dtheta = -int a^T dv/dtheta dt``, solved backwards.

    The state is solved backwards along with them, and set right at each output time, where the adjoint gets the
    gradient of the state there (Chen et al., 2018). Gradients are NaN where that solve cannot go on.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Any, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Solve."""
        ending, end, _ = call.solve(x0, t0, t1, at, tensors, None)
        ctx.call, ctx.outputs = call, at is not None
        ended = end.times.t.clone(), end.x.clone(), end.met.clone()
        ctx.save_for_backward(t0, *ended, *((at, ending[1]) if at is not None else ()), *tensors)
        ctx.mark_non_differentiable(*ending[2:])
        return ending

    @staticmethod
    def backward(ctx: Any, g1: Tensor, of_outputs: Tensor, *_: Any) -> Any:  # type: ignore[override]
        """Solve backwards."""
        t0, ended, x1, met, *rest = ctx.saved_tensors
        (at, outputs), tensors = (rest[:2], rest[2:]) if ctx.outputs else ((None, None), rest)
        call, size = ctx.call, x1.numel()
        tolerance = call.setting.tolerance
        limits = tolerance.first_step, tolerance.min_step, tolerance.max_step, tolerance.max_steps
        rule = call.rule(x1, t0, False)
        clock = replace(rule.clock, tolerance=_Seminorm(tolerance, x1.shape, sum(x.numel() for x in tensors), *limits))
        rule = replace(rule, clock=clock, outputs=None, raises=True)

        def system(t: Any, z: Tensor) -> Tensor:
            y, a = z[:size].view(x1.shape), z[size : 2 * size].view(x1.shape)
            v, pull, *_ = torch.func.vjp(lambda y, *tensors: call.field(tensors)(t, y), y, *tensors)
            return _vector([v, *pull(-a)])

        def back(z: Tensor, start: Tensor, end: Tensor) -> Tensor:
            solved = solve(rule, system, z, start, end)
            return torch.where(solved.times.status == GOING, solved.x, torch.nan)

        z, start = _vector([x1, g1, *(torch.zeros_like(x) for x in tensors)]), ended
        if at is not None and outputs is not None:
            outputs, of_outputs = outputs.clone(), of_outputs.clone()  # which the compiler takes for views of one

            def goes(i: Tensor, z: Tensor, start: Tensor) -> Tensor:
                return i > 0

            def one(i: Tensor, z: Tensor, start: Tensor) -> tuple[Tensor, ...]:
                row, there = (i - 1).clamp(min=0), i > 0
                time = torch.where(there, pick(at, row), start)
                z = back(z, start, time)
                a = z[size : 2 * size] + torch.where(there, pick(of_outputs, row), 0).reshape(-1)
                y = torch.where(there, pick(outputs, row).reshape(-1), z[:size])
                return i - 1, torch.cat([y, a, z[2 * size :]]), time

            _, z, start = at_least_once(goes, one, (met.clone(), z, start.clone()))
        z = back(z, start, t0)
        parts = z[size:].split([size, *(x.numel() for x in tensors)])
        gradients = [part.view(x.shape) for part, x in zip(parts, (x1, *tensors), strict=True)]
        return (None, gradients[0], None, None, None, *gradients[1:])


def _vector(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
