"""Gradients by solving backwards: the continuous adjoint, with memory that does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solvers.field_calls import Field
from solvers.gradients.captured import Captured
from solvers.packing import Packing
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype

__all__ = ["adjoint_rates", "backsolved", "restored", "seminorm", "stored"]

Solve = Callable[[Field, Tensor, float, float], Tensor]


def adjoint_rates(
    field: Field, t: Any, y: Tensor, a: Tensor, params: Sequence[Tensor], *, needs_t: bool = False, graph: bool = False
) -> tuple[Tensor, ...]:
    """Velocity at y and the rates of the adjoint, ``-a^T dv/dy``, ``-a^T dv/dparams`` and, if needed, ``-a^T dv/dt``.

    Args:
        field: velocity ``v(t, y)``.
        t, y, a: time, state and adjoint, whose own history is left out.
        params: what else gets a rate, zero where the field does not read it.
        needs_t, graph: whether t, a tensor, gets one, and whether the rates depend on y, on a and on the params.
    """
    with torch.enable_grad():
        y = y.requires_grad_() if graph else y.detach().requires_grad_()
        inputs = [y, *params]
        if needs_t:
            t = t.detach().requires_grad_()
            inputs.append(t)
        v = field(t, y)
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if v.requires_grad:
            grads = torch.autograd.grad(v, inputs, -a, allow_unused=True, create_graph=graph)
    rates = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))
    return (v if graph else v.detach(), *rates)


class _Rates(torch.autograd.Function):
    """:func:`adjoint_rates` that can be differentiated once: for the gradient of a gradient."""

    @staticmethod
    def forward(
        ctx: Any, captured: Captured, field: Field, t: Any, current: Sequence[Tensor], y: Tensor, a: Tensor, *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.captured, ctx.field, ctx.t = captured, field, t
        ctx.save_for_backward(y, a)
        return adjoint_rates(field, t, y, a, current)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override] - torch's has *grads
        y, a = ctx.saved_tensors
        y, a = y.detach(), a.detach().requires_grad_()
        with ctx.captured.again(cut=True) as params:
            rates = adjoint_rates(ctx.field, ctx.t, y, a, params, graph=True)
            moved, pulls = zip(*((r, g) for r, g in zip(rates, grads, strict=True) if r.requires_grad), strict=True)
            gradients = torch.autograd.grad(moved, (y, a, *params), pulls, allow_unused=True)
        return (None, None, None, None, *gradients)


def backsolved(
    captured: Captured, field: Field, x0: Tensor, states: Tensor, times: Sequence[float], backward: Solve
) -> Tensor:
    """``states`` of the solution from x0, with the gradients of the ODE, by the adjoint system as one vector.

    ``da/dt = -a^T dv/dx``, ``dL/dtheta = -int a^T dv/dtheta dt``; the state is solved backwards along with them and set
    right at each of the times, where the adjoint gets the gradient of the state there (Chen et al., 2018, Neural
    ordinary differential equations). A gradient of this gradient goes through the backward solve.

    Args:
        captured: what the field calls.
        field, x0: the velocity and the first state.
        states: at ``times[1:]``, ``(n, *x0.shape)``.
        times: ``times[0]`` is that of x0.
        backward: solves a vector ``(x, a, *params)`` from a time to another, where these differ.
    """
    return _Backsolve.apply(captured, field, backward, times, states, x0, *captured.tensors)  # type: ignore[return-value]


def seminorm(tolerance: Tolerance, x: Tensor, params: Sequence[Tensor]) -> Tolerance:
    """The tolerance of the backward solve: its error is that of the state and of the adjoint; the integrals over the
    parameters, which nothing feeds back on, are left out (Kidger, Chen, Lyons, 2021, Hey, that's not an ODE)."""
    like = x.to(torch.promote_types(x.dtype, torch.float32))
    packing = Packing((like, like, *(torch.zeros_like(stored(p, like)) for p in params)), "x0")

    def norm(scaled: Tensor) -> Tensor:
        parts = packing.unpack(scaled)[:2]
        return torch.stack([tolerance.size(part) for part in parts]).max()

    def expand(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return packing.expand((value, value, *[1.0] * len(params)), real_dtype(like))

    return replace(tolerance, rtol=expand(tolerance.rtol), atol=expand(tolerance.atol), norm=norm)


def stored(rate: Tensor, like: Tensor) -> Tensor:
    """A rate of change of a tensor as a part of a state with the dtype of ``like``."""
    if rate.dtype == like.dtype and rate.device == like.device:
        return rate
    return (torch.view_as_real(rate) if rate.is_complex() and not like.is_complex() else rate).to(like)


def restored(x: Tensor, like: Tensor) -> Tensor:
    """A gradient from such a part, in the dtype of the tensor ``like``."""
    if like.is_complex() and not x.is_complex():
        x = torch.complex(x[..., 0].contiguous(), x[..., 1].contiguous())
    return (x if like.is_complex() else x.real).to(like)


class _Backsolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, captured: Captured, field: Field, backward: Solve, times: Sequence[float], states: Tensor, x0: Tensor,
        *params: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.captured, ctx.field, ctx.solve, ctx.times, ctx.params = captured, field, backward, times, params
        states = states.clone()
        ctx.save_for_backward(states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with ctx.captured.again(cut=True) as params:
            return _solved_backwards(ctx, grads[0], params)


def _solved_backwards(ctx: Any, grads: Tensor, params: Sequence[Tensor]) -> Any:
    (states,) = ctx.saved_tensors
    dtype, times = torch.promote_types(states.dtype, torch.float32), ctx.times
    a = grads[-1].to(dtype)
    sums: Sequence[Tensor] = [torch.zeros_like(stored(p, a)) for p in params]
    packing = Packing((states[-1].to(dtype), a, *sums), "x1")

    def system(t: Any, z: Tensor) -> Tensor:
        y, a = (part.to(states.dtype) for part in packing.unpack(z)[:2])
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            rates: tuple[Tensor, ...] = _Rates.apply(ctx.captured, ctx.field, t, params, y, a, *ctx.params)  # type: ignore[assignment]
        else:
            rates = adjoint_rates(ctx.field, t, y, a, params)
        return packing.pack(tuple(stored(rate, z) for rate in rates), "field")

    for i in range(len(states) - 1, -1, -1):
        if times[i] != times[i + 1]:
            z = ctx.solve(system, packing.pack((states[i].to(dtype), a, *sums)), times[i + 1], times[i])
            _, a, *sums = packing.unpack(z)
        if i > 0:
            a = a + grads[i - 1].to(dtype)
    return (None, None, None, None, None, a.to(states.dtype), *map(restored, sums, ctx.params))
