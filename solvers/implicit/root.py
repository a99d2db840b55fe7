"""A stage as a root, with the gradient of the implicit function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solvers.implicit.linear import LinearSystem, conjugate_residuals

__all__ = ["attach_gradient"]

_ITERATIONS = 200


def attach_gradient(v: Tensor, y: Tensor, p: Tensor, scale: Any, system: LinearSystem) -> Tensor:
    """The root p of ``p = v(y)`` with ``y = x + h a p``, with its gradient: ``dp = (I - h a J)^-1 dv``.

    ``v`` is the velocity at the root, computed with a graph from ``y``, in which p itself is constant; J is its
    derivative there, of which only products are taken, so that samples may depend on each other. What converges poorly
    raises in the backward pass. There are no second derivatives.

    Args:
        v, y, p: velocity, its argument, and the root, ``(B, *S)``.
        scale: ``h a``.
        system: near ``I - h a J``.
    """
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    return _Root.apply(v, y, p, scale, system)  # type: ignore[return-value] - apply is untyped


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, y: Tensor, p: Tensor, scale: Any, system: LinearSystem) -> Tensor:
        ctx.scale, ctx.system = scale, system
        ctx.save_for_backward(v, y)
        return p.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override] - torch's has *grads
        v, y = ctx.saved_tensors

        def product(w: Tensor) -> Tensor:
            (pulled,) = torch.autograd.grad(v, y, w, retain_graph=True, allow_unused=True)
            return w if pulled is None else w - ctx.scale * pulled

        eps = torch.finfo(y.dtype).eps
        if not bool(grads[0].any()):
            return grads[0], None, None, None, None
        w, r, largest = torch.zeros_like(y), grads[0], grads[0].abs().max()
        for together in (False, False, True, True):  # and refined; where samples depend on each other, all at once
            d, _ = conjugate_residuals(
                product, r, ctx.system.solve_transposed, tolerance=eps**0.75, iterations=_ITERATIONS, together=together
            )
            w = w + d
            r = grads[0] - product(w)
            residual = (r.abs().max() / largest).item()
            if residual <= max(eps**0.5, 10 * eps * ctx.system.size * (w.abs().max() / largest).item()):
                break
        else:
            raise RuntimeError(
                "the gradient of an implicit stage cannot be found: its linear system, I - h a dv/dx, is singular or "
                f"too ill-conditioned (residual {residual:.2g}): take smaller steps, float64, or another RootFinder"
            )
        return w, None, None, None, None
