"""Gradients by solving backwards: the continuous adjoint, with memory that does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.states import Packing
from solvers.step import Field
from solvers.tolerance import Tolerance

__all__ = ["adjoint_rates", "backsolved", "seminorm"]

Solve = Callable[[Field, Tensor], Tensor]


def adjoint_rates(
    field: Field, t: Any, y: Tensor, a: Tensor, params: Sequence[Tensor], needs_t: bool = False
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Velocity at y and the rates of the adjoint, ``-a^T dv/dy``, ``-a^T dv/dparams`` and, if needed, ``-a^T dv/dt``.

    They carry a graph where gradients are enabled, that is where the gradient is to be differentiated itself.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = y if again and y.requires_grad else y.detach().requires_grad_()
        if needs_t:
            t = t.detach().requires_grad_()
        v = field(t, y)
        wanted = (y, *params, *[t] * needs_t)
        if v.requires_grad:
            grads = torch.autograd.grad(v, wanted, -a, allow_unused=True, create_graph=again)
        else:
            grads = (None,) * len(wanted)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]
    rate_t = filled.pop() if needs_t else None
    return (v if again else v.detach()), filled[0], filled[1:], rate_t


def backsolved(field: Field, x0: Tensor, x1: Tensor, params: Sequence[Tensor], backward: Solve) -> Tensor:
    """``x1``, the solution from x0, with the gradients of the ODE, by ``backward`` on the adjoint system as one vector.

    ``da/dt = -a^T dv/dx``, ``dL/dtheta = -int a^T dv/dtheta dt``; the state is solved backwards along with them (Chen
    et al., 2018, Neural ordinary differential equations). A gradient of this gradient goes through the backward solve.

    Args:
        field: velocity ``v(t, x)``.
        x0: state at the start.
        x1: state at the end.
        params: what else gets gradients.
        backward: solves from the end to the start, a vector ``(x, a, *params)``.
    """
    return _Backsolve.apply(field, backward, x1, x0, *params)  # type: ignore[return-value]


def seminorm(tolerance: Tolerance, x: Tensor, params: Sequence[Tensor]) -> Tolerance:
    """The tolerance of the backward solve: its error is that of the state and of the adjoint; the integrals over the
    parameters, which nothing feeds back on, are left out (Kidger, Chen, Lyons, 2021, Hey, that's not an ODE)."""
    packing = Packing((x, x, *params), "x0")

    def norm(scaled: Tensor) -> Tensor:
        parts = packing.unpack(scaled)[:2]
        return torch.stack([tolerance.size(part) for part in parts]).max()

    def expand(value: Any) -> Any:
        return packing.expand((value, value, *[1.0] * len(params))) if isinstance(value, Tensor) else value

    return Tolerance(
        expand(tolerance.rtol),
        expand(tolerance.atol),
        norm,
        tolerance.first_step,
        tolerance.min_step,
        tolerance.max_step,
        tolerance.max_steps,
    )


class _Backsolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, field: Field, backward: Solve, x1: Tensor, x0: Tensor, *params: Tensor) -> Tensor:
        ctx.field, ctx.solve = field, backward
        x1 = x1.clone()
        ctx.save_for_backward(x1, *params)
        return x1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x1, *params = ctx.saved_tensors
        start = (x1, grads[0], *(torch.zeros_like(p, dtype=x1.dtype) for p in params))
        packing = Packing(start, "x1")

        def system(t: Any, z: Tensor) -> Tensor:
            y, a, *_ = packing.unpack(z)
            v, rate, rates, _ = adjoint_rates(ctx.field, t, y, a, params)
            return packing.pack((v, rate, *(r.to(a.dtype) for r in rates)), "field")

        _, a, *sums = packing.unpack(ctx.solve(system, packing.pack(start)))
        return (None, None, None, a, *(s.to(p.dtype) for s, p in zip(sums, params, strict=True)))
