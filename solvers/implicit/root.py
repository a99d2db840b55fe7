"""A stage as a root, with the gradient of the implicit function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from solvers.field_calls import Field, velocity
from solvers.implicit.linear import LinearSystem, conjugate_residuals

__all__ = ["CALLED_AGAIN", "stage_with_gradient"]

_ITERATIONS = 200

CALLED_AGAIN: ContextVar[Callable[[], AbstractContextManager[Any]] | None] = ContextVar("called_again", default=None)
"""In which context a backward pass may call the field; None where the graph of a stage is kept until then."""


def stage_with_gradient(
    field: Field, i: int, t: Any, y: Tensor, p: Tensor, scale: Any, system: LinearSystem
) -> tuple[Tensor, int]:
    """The root p of ``p = v(y)`` with ``y = x + h a p``, with its gradient, ``dp = (I - h a J)^-1 dv``, and the calls.

    J is the derivative at the root, of which only products are taken, so that samples may depend on each other: by the
    graph of v, or, where that is computed again, by one of its own, lest each product compute it again. What converges
    poorly raises in the backward pass. There are no second derivatives.

    Args:
        field: velocity.
        i: number of the stage.
        t: its time.
        y: the argument, as a function of what gets gradients, in which p is constant, ``(B, *S)``.
        p: the root, ``(B, *S)``.
        scale: ``h a``.
        system: near ``I - h a J``.
    """
    v, calls = velocity(field, t, y, i), 1
    if not v.requires_grad:
        return p, calls
    if not y.requires_grad:  # by parameters of the field alone
        y = y.detach().requires_grad_()
        v, calls = velocity(field, t, y, i), 2
    again = CALLED_AGAIN.get()
    scale, t = (s.detach() if isinstance(s, Tensor) else s for s in (scale, t))
    call = None if again is None else (again, lambda y: velocity(field, t, y, i))
    return _Root.apply(v, y, p, scale, system, call, *system.tensors), calls  # type: ignore[return-value] - untyped


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, y: Tensor, p: Tensor, scale: Any, system: Any, call: Any, *tensors: Tensor) -> Any:
        ctx.scale, ctx.kind, ctx.call = scale, type(system), call
        ctx.save_for_backward(*([v, y] if call is None else [y]), *tensors)  # what is computed again is not kept
        return p.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override] - torch's has *grads
        if torch.is_grad_enabled():
            raise RuntimeError(
                "implicit stages have no second derivatives (create_graph=True): take an explicit method, or leave the "
                "derivative of the solve out of the loss"
            )
        unused = [None] * (len(ctx.needs_input_grad) - 1)
        if not bool((grads[0] != 0).any()):
            return grads[0], *unused
        if ctx.call is None:
            v, y, *tensors = ctx.saved_tensors
        else:
            y, *tensors = ctx.saved_tensors
            again, field = ctx.call
            with again(), torch.enable_grad():
                y = y.detach().requires_grad_()
                v = field(y)
        return _solved(v, y, grads[0], ctx.scale, ctx.kind.of(tensors)), *unused


def _solved(v: Tensor, y: Tensor, grad: Tensor, scale: Any, system: LinearSystem) -> Tensor:
    """The solution w of ``(I - h a J)' w = grad``."""

    def product(w: Tensor) -> Tensor:
        if not v.requires_grad:
            return w
        (pulled,) = torch.autograd.grad(v, y, w, retain_graph=True, allow_unused=True)
        return w if pulled is None else w - scale * pulled

    eps = torch.finfo(y.dtype).eps
    w, r, largest, residual = torch.zeros_like(y), grad, grad.abs().max(), 0.0
    for together in (False, False, True, True):  # and refined; where samples depend on each other, all at once
        d, _ = conjugate_residuals(
            product, r, system.solve_transposed, tolerance=eps**0.75, iterations=_ITERATIONS, together=together
        )
        w = w + d
        r = grad - product(w)
        residual = (r.abs().max() / largest).item()
        if residual <= max(eps**0.5, 10 * eps * system.size * (w.abs().max() / largest).item()):
            return w
    raise RuntimeError(
        "the gradient of an implicit stage cannot be found: its linear system, I - h a dv/dx, is singular or "
        f"too ill-conditioned (residual {residual:.2g}): take smaller steps, float64, or another RootFinder"
    )
