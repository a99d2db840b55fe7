"""The iteration that finds a stage: Newton's simplified, Newton's with fresh or no matrices, a fixed point's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.field_calls import Field, velocity
from solvers.implicit.anderson import Anderson
from solvers.implicit.linear import conjugate_residuals, rows
from solvers.roots import RootFinder

__all__ = ["Iteration", "Measure", "Root", "refuse_forward_mode"]

_SHARE = 0.05
"""How far the linear systems of "newton_krylov" are solved."""
_LEAST = {"newton_krylov": _SHARE, "damped_krylov": _SHARE, "anderson": 0.5}
"""Rates of convergence below which one that is seen is not believed."""
_DAMPED = ("full", "damped_krylov")
"""Newton's iterations whose corrections are halved until the residual falls."""
_WANDERING = (*_DAMPED, "anderson")
"""Iterations that may go astray before they converge."""
_FACTOR = 5
"""How many more iterations others than the simplified Newton's may take."""
_HALVINGS = 12
"""How often a correction is halved at most."""
_ROUNDING = 8
"""How many units of the last digit of the largest component are rounding."""
_IDLE = 3
"""After how many iterations without progress what moves in the last digit of the largest component is rounding."""

_TINY = np.finfo(np.float64).tiny

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
        return torch.linalg.vector_norm(moved, dim=1).cpu().numpy() * moved.shape[1] ** -0.5

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


class _Batch:
    """How the iteration of a batch goes whose samples fail together: by its largest change.

    Args:
        eta: of the stage before, by which the first change is judged.
        measure: what changes are measured with.
        method: which iteration.
    """

    def __init__(self, eta: Any, measure: Measure, method: str) -> None:
        self.measure, self.method = measure, method
        self.eta = max(eta, 1e-16) ** 0.8 if method == "newton" else 1.0
        self.sizes, self.rate, self.slowest = np.zeros(0), 0.0, 0.0
        self._worst, self._first = 0.0, True
        self._best, self._idle, self._rounding = math.inf, 0, False

    def found(self, change: Tensor, y: Tensor, increment: Tensor | None) -> bool:
        """Whether the stage is found, by its last change."""
        self.sizes, last = self.measure.sizes(change, y), self._worst
        self._worst = float(self.sizes.max(initial=0.0))
        if not self._first:
            self.rate = self._worst / last if last else 0.0
            self.slowest = max(self.slowest, self.rate)
            rate = max(self.rate, _LEAST.get(self.method, 0.0))  # which luck may hide
            self.eta = rate / (1 - rate) if rate < 1 else math.inf
        self._first = False
        self._rounding = increment is not None and self._worst <= _ROUNDING * torch.finfo(y.dtype).eps
        small = self._worst == 0 or self._rounding or self.eta * self._worst <= self.measure.limit
        if increment is None or not small:
            return small
        share = float(self.measure.shares(change, y, increment).max(initial=0.0))
        self._idle = self._idle + 1 if share > 0.9 * self._best else 0
        self._best = min(self._best, share)
        return share == 0 or self.eta * share <= self.measure.limit or (self._rounding and self._idle >= _IDLE)

    def hopeless(self, left: int) -> bool:
        """Whether it will not be found in as many more iterations."""
        if not math.isfinite(self._worst):
            return True
        if self._rounding or self.rate == 0.0 or self.method in _WANDERING:  # of which 0 is the first
            return False
        return not self.rate < 2 or (self.rate < 1 and self.rate**left * self.eta * self._worst > self.measure.limit)

    @property
    def memory(self) -> float:
        """What the first change of the next stage is judged by."""
        return self.eta if math.isfinite(self.eta) else 1.0

    @property
    def failed(self) -> Array:
        """The samples that have gone the farthest astray."""
        return ~(self.sizes < 0.5 * self._worst)


class _Samples:
    """The same where samples fail one by one."""

    def __init__(self, eta: Any, measure: Measure, method: str) -> None:
        self.measure, self.method = measure, method
        self.eta: Any = np.maximum(eta, 1e-16) ** 0.8 if method == "newton" else 1.0
        self.sizes, self.rate, self.slowest = np.zeros(0), np.zeros(0), 0.0
        self._first = True
        self._done: Any = np.False_

    def found(self, change: Tensor, y: Tensor, increment: Tensor | None) -> bool:
        """Whether the stages of all are found, by their last changes."""
        sizes, last, before = self.measure.sizes(change, y), self.sizes, self._done
        self.sizes = sizes
        if not self._first:
            self.rate = sizes / np.maximum(last, _TINY)
            rate = np.maximum(self.rate, _LEAST.get(self.method, 0.0))
            self.eta = np.where(rate < 1, rate / (1 - rate), np.inf)
        small = self.eta * sizes <= self.measure.limit
        if increment is not None:
            small &= self.eta * self.measure.shares(change, y, increment) <= self.measure.limit
        self._done = self._done | (sizes == 0) | small
        if not (self._done.all() and np.isfinite(sizes).all()):
            self._first = False
            return False
        if not self._first:
            self.slowest = self.rate.max(initial=0.0, where=~before)
        return True

    def hopeless(self, left: int) -> bool:
        """Whether those that are not found will not be in as many more iterations."""
        lost = ~np.isfinite(self.sizes)
        if self.rate.size and self.method not in _WANDERING:
            rest = self.rate**left * np.minimum(self.eta, 1e3) * self.sizes
            lost |= ~(self.rate < 2) | (rest > self.measure.limit)
        return bool((lost | self._done).all())

    @property
    def memory(self) -> Array:
        """What the first change of the next stage is judged by."""
        return np.where(np.isfinite(self.eta), self.eta, 1.0)

    @property
    def failed(self) -> Array:
        """The samples whose stages are not found."""
        return ~(self._done & np.isfinite(self.sizes))


class Iteration:
    """Finds stages, and remembers how fast, as the first change of the next is judged by it.

    Args:
        roots: which iteration, and its limits.
        each: whether samples fail one by one.

    Attributes:
        calls: field calls so far.
        slowest: the largest rate of convergence since it was last set to 0; infinite where a stage was not found.
        residual: of the last stage that was not found, the largest of a sample, over the norm of its state.
    """

    def __init__(self, roots: RootFinder, *, each: bool) -> None:
        self.roots, self.each = roots, each
        self.calls, self.slowest, self.residual = 0, 0.0, math.nan
        self._eta: Array | float = 1.0

    def __call__(
        self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor, measure: Measure, method: str,
        solve: Callable[[Tensor, Tensor], Tensor],
    ) -> Root:  # fmt: skip
        """The root of ``p = v(t, start + scale p)``, stage i of a step, from a guess.

        ``solve``: the solution of the linear system for a right side, at a state.
        """
        most = self.roots.max_iterations * (1 if method == "newton" else _FACTOR)
        value, differentiable = self._first_value(v, i, t, start, scale, p)
        kind = _Samples if self.each else _Batch
        progress, anderson = kind(self._eta if method == "newton" else 1.0, measure, method), Anderson()
        with torch.no_grad(), np.errstate(all="ignore"):
            first = value
            for k in range(most):
                y = start + scale * p if isinstance(scale, Tensor) else torch.add(start, p, alpha=scale)
                if k and method not in _DAMPED:
                    value = self._value(v, i, t, y)
                r = value - p
                if method in ("newton_krylov", "damped_krylov"):
                    change = self._corrected(v, i, t, y, value, r, scale)
                elif method == "anderson":
                    change = anderson.correction(p, r)
                else:
                    change = solve(r, y)
                if method in _DAMPED:
                    change, value = self._damped(v, i, t, start, scale, p, r, change)
                p = p + change
                if progress.found(change, y, scale * p if measure.relative else None):
                    if method == "damped_krylov" and not bool(_is_root(p, value, first, start / scale).all()):
                        break
                    self.slowest, self._eta = max(self.slowest, progress.slowest), progress.memory
                    return Root(p, None, differentiable)
                if progress.hopeless(most - 1 - k):
                    break
            self.residual = float((_norms(scale * r) / _norms(y)).max())  # type: ignore[possibly-undefined] - one at least
        self.slowest = np.inf
        return Root(p, progress.failed, differentiable)

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


def _is_root(p: Tensor, value: Tensor, first: Tensor, start: Tensor) -> Tensor:
    """Where p, at which the velocity is ``value``, is one by its residual, and not so far that this is rounding alone.

    ``first`` is the velocity at the guess, and ``start`` the state there, both in the unit of p.
    """
    small, size, residual = torch.finfo(p.dtype).eps ** 0.5, _norms(p), _norms(value - p)
    near = residual <= torch.maximum(1e-3 * _norms(first), small * (size + _norms(start)))
    return near & (small * size <= _norms(first) + _norms(start))


def _norms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows(x), dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else norms.view(())
