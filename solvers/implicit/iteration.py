"""The iteration that finds a stage: Newton's simplified, Newton's with fresh or no matrices, or a fixed point's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.field_calls import Field, velocity
from solvers.implicit.linear import conjugate_residuals, rows
from solvers.roots import RootFinder

__all__ = ["Iteration", "Measure", "Root", "refuse_forward_mode"]

_SHARE = 0.05
"""How far the linear systems of "newton_krylov" are solved."""
_FACTOR = 5
"""How many more iterations others than the simplified Newton's may take."""
_HALVINGS = 12
"""How often a correction is halved at most."""
_IDLE = 3
"""After how many iterations without progress what moves in the last digit of the largest component is rounding."""

Array = np.ndarray


class Measure(NamedTuple):
    """What the change of a stage by an iteration is measured with.

    Attributes:
        weight: of a change, ``h / tolerance``; where it is relative, ``h``.
        limit: on the error that is left.
        relative: whether it is a share of the state, of each component, else a root mean square.
    """

    weight: Any
    limit: float
    relative: bool = False

    def sizes(self, change: Tensor, y: Tensor) -> Array:
        """The size of each sample's change, ``(B,)``."""
        moved = rows(change * self.weight)
        if self.relative:
            return (moved.abs().amax(1) / (rows(y).abs().amax(1) + torch.finfo(y.dtype).tiny)).cpu().numpy()
        return (torch.linalg.vector_norm(moved, dim=1) / moved.shape[1] ** 0.5).cpu().numpy()

    def shares(self, change: Tensor, y: Tensor, increment: Tensor) -> Array:
        """The largest share of a component that its change is, ``(B,)``."""
        scale = rows(y).abs() + rows(increment).abs() + torch.finfo(y.dtype).tiny
        return (rows(change * self.weight).abs() / scale).amax(1).cpu().numpy()


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
        last: Array | None = None
        value, differentiable = self._first_value(v, i, t, start, scale, p)
        done, sizes = np.zeros(len(rows(start)), dtype=bool), np.zeros(0)
        best, idle = np.full(len(done), np.inf), np.zeros(len(done))
        rounding = 8 * torch.finfo(start.dtype).eps
        eta: Any = np.maximum(self._eta, 1e-16) ** 0.8 if method == "newton" else 1.0
        with torch.no_grad(), np.errstate(all="ignore"):
            for k in range(most):
                y = start + scale * p
                if k and method != "full":
                    value = self._value(v, i, t, y)
                r = value - p
                change = self._corrected(v, i, t, y, value, r, scale) if method == "newton_krylov" else solve(r, y)
                if method == "full":
                    change, value = self._damped(v, i, t, start, scale, p, r, change)
                p = p + change
                sizes = measure.sizes(change, y)
                hopeless = ~np.isfinite(sizes)
                if last is not None:
                    rate = sizes / last
                    self.slowest = max(self.slowest, rate.max(initial=0.0, where=~done & ~np.isnan(rate)))
                    if method == "newton_krylov":  # of which a lucky iteration hides the rate
                        rate = np.maximum(rate, _SHARE)
                    eta = np.where(rate < 1, rate / (1 - rate), np.inf)
                    if method != "full":  # which may wander before it converges
                        left = rate ** (most - 1 - k) * np.minimum(eta, 1e3) * sizes
                        hopeless |= ~(rate < 2) | (left > measure.limit)
                found = eta * sizes <= measure.limit
                if measure.relative and found.any():
                    share = measure.shares(change, y, scale * p)
                    idle = np.where(share > 0.9 * best, idle + 1, 0)
                    best = np.minimum(best, share)
                    found = (found & (eta * share <= measure.limit)) | ((sizes <= rounding) & (idle >= _IDLE))
                done |= (sizes == 0) | found
                if done.all() and np.isfinite(sizes).all():
                    self._eta = np.where(np.isfinite(eta), eta, 1.0)
                    return Root(p, None, differentiable)
                lost = hopeless & ~done
                if (lost | done).all() if self.each else lost.any():
                    done = ~lost
                    break
                last = sizes
        self.slowest = np.inf
        return Root(p, ~(done & np.isfinite(sizes)), differentiable)

    def _value(self, v: Field, i: int, t: Any, y: Tensor) -> Tensor:
        self.calls += 1
        return velocity(v, t, y, i)

    def _first_value(self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor) -> tuple[Tensor, bool]:
        """The velocity at the guess, and whether it depends on what requires a gradient.

        Raises:
            RuntimeError: it has a forward-mode derivative, which would be lost.
        """
        value = self._value(v, i, t, start + scale * p)
        refuse_forward_mode(value)
        return value.detach(), value.requires_grad

    def _damped(
        self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor, r: Tensor, change: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A correction, of each sample halved until its residual falls, and the velocity behind it."""
        before = _norms(r)
        for _ in range(_HALVINGS):
            value = self._value(v, i, t, start + scale * (p + change))
            rises = ~(_norms(value - p - change) <= (1 - 1e-4) * before) & (before > 0)
            if not bool(rises.any()):
                break
            change = torch.where(rises, 0.5 * change, change)
        return change, value  # type: ignore[possibly-undefined] - one halving at least

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


def refuse_forward_mode(x: Tensor) -> None:
    """That x carries a forward-mode derivative, which would be lost.

    Raises:
        RuntimeError: it does.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "implicit stages have no forward-mode derivative: take torch.autograd.grad, or an explicit method"
        )


def _norms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows(x), dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else norms.view(())
