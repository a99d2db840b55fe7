"""The iteration that finds a stage: Newton's simplified, Newton's with fresh or no matrices, or a fixed point's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field, velocity
from solvers.implicit.linear import conjugate_residuals, rows
from solvers.roots import RootFinder

__all__ = ["Iteration", "Measure", "Root"]

_SHARE = 0.05
"""How far the linear systems of "newton_krylov" are solved."""
_FACTOR = 5
"""How many more iterations others than the simplified Newton's may take."""

Array = np.ndarray


class Measure(NamedTuple):
    """What the change of a stage by an iteration is measured with.

    Attributes:
        weight: of a change, ``h / tolerance``.
        limit: on the root mean square of the error that is left.
        relative: whether it is one over the state.
    """

    weight: Any
    limit: float
    relative: bool = False


class Root(NamedTuple):
    """A stage found, or not.

    Attributes:
        p: the velocity.
        failed: the samples whose iteration does not converge, ``(B,)``, or None.
        differentiable: whether the field depended on what requires a gradient.
    """

    p: Tensor
    failed: Array | None
    differentiable: bool


class Iteration:
    """Finds stages, and remembers how fast, as the first change of the next is judged by it.

    Args:
        roots: which iteration, and its limits.
        each: whether samples fail one by one.

    Attributes:
        calls: field calls so far.
        slowest: the largest rate of convergence since it was last set to 0; infinite where a stage was not found.
    """

    def __init__(self, roots: RootFinder, *, each: bool) -> None:
        self.roots, self.each = roots, each
        self.calls, self.slowest = 0, 0.0
        self._eta: Array | float = 1.0

    def __call__(
        self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor, measure: Measure, method: str,
        solve: Callable[[Tensor, Tensor], Tensor],
    ) -> Root:  # fmt: skip
        """The root of ``p = v(t, start + scale p)``, stage i of a step, from a guess.

        ``solve``: the solution of the linear system for a right side, at a state.
        """
        most = self.roots.max_iterations * (1 if method == "newton" else _FACTOR)
        features, last, differentiable = rows(start).shape[1] ** 0.5, None, False
        done = np.zeros(len(rows(start)), dtype=bool)
        eta = np.maximum(self._eta, 1e-16) ** 0.8 if method == "newton" else 1.0
        with np.errstate(all="ignore"):
            for k in range(most):
                y = start + scale * p
                with torch.set_grad_enabled(k == 0 and torch.is_grad_enabled()):
                    value = velocity(v, t, y, i)
                self.calls += 1
                if value.requires_grad:
                    differentiable, value = True, value.detach()
                with torch.no_grad():
                    if method == "newton_krylov":
                        change = self._corrected(v, i, t, y, value, value - p, scale)
                    else:
                        change = solve(value - p, y)
                    p = p + change
                    sizes = torch.linalg.vector_norm(rows(change * measure.weight), dim=1)
                    if measure.relative:
                        sizes = sizes / (rows(y).abs().amax(1) + torch.finfo(y.dtype).tiny)
                sizes = sizes.cpu().numpy() / features
                if last is not None:
                    rate = sizes / last
                    self.slowest = max(self.slowest, rate.max(initial=0.0, where=~done & ~np.isnan(rate)))
                    if method == "newton_krylov":  # of which a lucky iteration hides the rate
                        rate = np.maximum(rate, _SHARE)
                    eta = np.where(rate < 1, rate / (1 - rate), np.inf)
                done |= (sizes == 0) | (eta * sizes <= measure.limit)
                if done.all() and np.isfinite(sizes).all():
                    self._eta = np.where(np.isfinite(eta), eta, 1.0)
                    return Root(p, None, differentiable)
                hopeless = ~np.isfinite(sizes)
                if last is not None and method != "full":  # which may wander before it converges
                    hopeless |= ~(rate < 2) | (rate ** (most - 1 - k) * np.minimum(eta, 1e3) * sizes > measure.limit)
                lost = hopeless & ~done
                if lost.any() if not self.each else (lost | done).all():
                    break
                last = sizes
        self.slowest = np.inf
        done &= np.isfinite(sizes)
        return Root(p, ~done if self.each else np.ones_like(done), differentiable)

    def _corrected(self, v: Field, i: int, t: Any, y: Tensor, value: Tensor, r: Tensor, scale: Any) -> Tensor:
        """Newton's correction, by products with the Jacobian that are differences of velocities."""
        eps = torch.finfo(y.dtype).eps ** 0.5
        size = _norms(y) + 1e-3

        def product(d: Tensor) -> Tensor:
            length = _norms(d)
            small = eps * size / torch.where(length > 0, length, 1.0)
            self.calls += 1
            return d - scale * (velocity(v, t, y + small * d, i) - value) / small

        return conjugate_residuals(product, r, lambda r: r, tolerance=_SHARE, iterations=30)[0]


def _norms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows(x), dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else norms.view(())
