"""Steps of diagonally implicit methods, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling

from solvers.errors import failure
from solvers.field_calls import Field, countable, counting, velocity
from solvers.implicit.linear import Dense, Identity, LinearSystem, conjugate_residuals, jacobian, rows
from solvers.implicit.root import attach_gradient
from solvers.reductions import combine
from solvers.step import Step
from solvers.tableaus import ButcherTableau

__all__ = ["ImplicitSteps", "check_found", "check_implicit"]

_DENSE = 200
"""Features of a sample up to which "auto" makes matrices."""
_SLOW = 0.05
"""Rate of convergence beyond which a Jacobian is not kept for the next step."""
_SHARE = 0.05
"""How far the linear systems of "newton_krylov" are solved."""


class _Measure(NamedTuple):
    """What the change of a stage by an iteration is measured with."""

    weight: Any
    limit: float
    relative: bool = False


class ImplicitSteps:
    """Takes steps of an implicit method, and keeps the Jacobian from one to the next while it serves.

    A sample of which a stage is not found has NaN from there on, and says so in ``step.unsolved``.

    Args:
        tableau: the method.
        rtol, atol: what an error is divided by, as of :class:`~solvers.Tolerance`; None to iterate to rounding.
        each: whether samples are accepted one by one, so that one whose iteration fails does not end the others'.

    Attributes:
        calls: field calls so far.
        jacobians: Jacobians computed so far.
        factorizations: matrices factorized so far, one for all samples.
    """

    def __init__(self, tableau: ButcherTableau, rtol: Any = None, atol: Any = None, *, each: bool = False) -> None:
        self.tableau, self.rtol, self.atol, self.each = tableau, rtol, atol, each
        self.calls = self.jacobians = self.factorizations = 0
        self._kept: Tensor | None = None
        self._fresh = False
        self._eta, self._slowest = 1.0, 0.0

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """The last step is taken, by all samples or some; the next one begins elsewhere."""
        if self._slowest > _SLOW:
            self._kept = None
        self._fresh = False

    def __call__(
        self, field: Field | Sequence[Field], t: Any, x: Tensor, h: Any, first: Tensor | None = None, *,
        closing: bool = True
    ) -> Step:  # fmt: skip
        """One step, as :func:`~solvers.rk_step` takes it."""
        if is_inference_mode_enabled():
            with counting():
                return self(field, t, countable(x), h, None if first is None else countable(first), closing=closing)
        check_implicit(self.tableau, x)
        method = self._method(x)
        step = self._attempt(field, t, x, h, first, method)
        if step.unsolved is not None and method == "newton" and not self._fresh:
            self._kept = None
            first = step.stages[0] if not self.tableau.a[0] else first
            step = self._attempt(field, t, x, h, first, method)
        if step.unsolved is not None and self.rtol is None:  # no smaller step will be tried
            first = step.stages[0] if not self.tableau.a[0] else first
            step = self._attempt(field, t, x, h, first, "full" if method == "newton" else method, afresh=True)
        return step

    def _method(self, x: Tensor) -> str:
        chosen = self.tableau.roots.method
        if chosen != "auto":
            return chosen
        return "newton" if rows(x).shape[1] <= _DENSE else "newton_krylov"

    def _attempt(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None, method: str, *, afresh: bool = False
    ) -> Step:
        tableau, several = self.tableau, isinstance(field, (list, tuple))
        if several and len(field) != tableau.stages:
            raise ValueError(f"field must be one callable or one per stage of {tableau.name}, got {len(field)}")
        stages: tuple[Tensor, ...] = ()
        systems: dict[Any, LinearSystem] = {}
        unsolved: np.ndarray | None = None
        measure, self._slowest = None, 0.0
        for i, weights in enumerate(tableau.a):
            v = field[i] if several else field
            time = t + tableau.c[i] * h
            if len(weights) == i:
                p = first if i == 0 and first is not None else None
                if p is None:
                    p = velocity(v, time, combine(x, stages, weights, h) if i else x, i)
                    self.calls += 1
                stages = (*stages, p)
                continue
            scale = h * weights[i]
            key = weights[i], id(v) if several else 0
            if key not in systems:
                systems[key] = self._system(v, t, x, scale, method, keep=not several)
            start = combine(x, stages, weights[:i], h) if any(weights[:i]) else x
            with torch.no_grad():
                if afresh:  # from the state at the start, lest an explicit guess lead away
                    guess = (x - start) / scale
                else:
                    guess = _extrapolated(stages, tableau, i) if stages else torch.zeros_like(x)
                measure = measure or self._measure(x, h)
                p, failed = self._root(v, i, time, start.detach(), scale, guess, systems[key], measure, method)
            if failed is not None:
                unsolved = np.full(len(failed), -1) if unsolved is None else unsolved
                unsolved = np.where((unsolved < 0) & failed, i, unsolved)
                if not self.each or failed.all():
                    stages = (*stages, *[torch.full_like(x, math.nan)] * (tableau.stages - i))
                    break
                p = torch.where(_mask(failed, x), math.nan, p)
            elif torch.is_grad_enabled():
                p = self._with_gradient(v, i, time, start, scale, p, systems[key])
            stages = (*stages, p)
        x1 = combine(x, stages, tableau.b, h)
        return Step(t, h, x, x1, stages, tableau, None, unsolved)

    def _system(self, v: Field, t: Any, x: Tensor, scale: Any, method: str, *, keep: bool) -> LinearSystem:
        if method not in ("newton", "full"):
            return Identity()
        matrix = self._kept if keep else None
        if matrix is None:
            matrix = jacobian(v, t, x)
            self.calls, self.jacobians = self.calls + 1, self.jacobians + 1
            self._kept, self._fresh = (matrix if keep else None), True
        self.factorizations += 1
        with torch.no_grad():
            return Dense(matrix, scale)

    def _system_at(self, v: Field, t: Any, y: Tensor, scale: Any) -> Dense:
        self.calls, self.jacobians, self.factorizations = self.calls + 1, self.jacobians + 1, self.factorizations + 1
        return Dense(jacobian(v, t, y), scale)

    def _measure(self, x: Tensor, h: Any) -> _Measure:
        """The weight ``h / tolerance`` of changes of a stage, and the limit on their root mean square."""
        x, eps = x.detach(), torch.finfo(x.dtype).eps
        h = h.detach() if isinstance(h, Tensor) else h
        if self.rtol is None:
            return _Measure(h, eps**0.75, relative=True)
        scale = x.abs() * self.rtol + self.atol
        rtol = float(torch.as_tensor(self.rtol).min())
        share = self.tableau.roots.tolerance
        return _Measure(h / (scale + torch.finfo(x.dtype).tiny), max(10 * eps / rtol if rtol else 0.0, share))

    def _root(
        self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor, system: LinearSystem, measure: _Measure,
        method: str
    ) -> tuple[Tensor, np.ndarray | None]:  # fmt: skip
        """The stage, and the samples whose iteration does not converge, ``(B,)``, or None."""
        most, weight, limit = self.tableau.roots.max_iterations, measure.weight, measure.limit
        eta = max(self._eta, 1e-16) ** 0.8 if method == "newton" else 1.0
        last, sizes = None, None
        features, worst, before = rows(start).shape[1] ** 0.5, 0.0, math.nan
        if method != "newton":
            most *= 5
        for k in range(most):
            y = start + scale * p
            value = velocity(v, t, y, i)
            self.calls += 1
            change = value - p
            if method == "newton_krylov":
                change = self._corrected(v, i, t, y, value, change, scale)
            else:
                change = (self._system_at(v, t, y, scale) if method == "full" else system).solve(change)
            p = p + change
            last, sizes = sizes, torch.linalg.vector_norm(rows(change * weight), dim=1)
            if measure.relative:
                sizes = sizes / (rows(y).abs().amax(1) + torch.finfo(y.dtype).tiny)
            among = torch.where(sizes.isfinite(), sizes, 0.0) if self.each else sizes
            before, worst = worst, among.max().item() / features
            if worst == 0.0 and not self.each:
                return p, None
            if k:
                rate = worst / before if before else 0.0
                self._slowest = max(self._slowest, rate)
                rate_next = max(rate, _SHARE) if method == "newton_krylov" else rate  # which a lucky iteration hides
                eta = rate_next / (1 - rate_next) if rate < 1 else math.inf
                hopeless = not rate < 2 or (rate < 1 and rate ** (most - 1 - k) * eta * worst > limit)
            else:
                hopeless = not math.isfinite(worst)
            if eta * worst <= limit:
                self._eta = eta
                if self.each and not bool(sizes.isfinite().all()):
                    return p, ~sizes.isfinite().cpu().numpy()
                return p, None
            if hopeless and not self.each and (method != "full" or not math.isfinite(worst)):
                break
        self._slowest = math.inf
        assert sizes is not None
        if not self.each:
            return p, np.ones(len(sizes), dtype=bool)
        rates = (sizes / last).cpu().numpy() if last is not None else np.full(len(sizes), np.inf)
        sizes = sizes.cpu().numpy() / features
        with np.errstate(all="ignore"):
            found = (sizes == 0) | ((rates < 1) & (rates / (1 - rates) * sizes <= limit))
        return p, None if found.all() else ~found

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

    def _with_gradient(
        self, v: Field, i: int, t: Any, start: Tensor, scale: Any, p: Tensor, system: LinearSystem
    ) -> Tensor:
        """The stage as a function of what its equation depends on; one field call, with a graph."""
        y = start + scale * p
        value = velocity(v, t, y, i)
        self.calls += 1
        if value.requires_grad and not y.requires_grad:  # by parameters of the field alone
            y.requires_grad_()
            value = velocity(v, t, y, i)
            self.calls += 1
        return attach_gradient(value, y, p, scale, system) if value.requires_grad else p


def check_found(step: Step) -> None:
    """Refuse a step of which a stage is not found.

    Raises:
        NewtonError: with where.
    """
    if step.unsolved is None:
        return
    sample = int((step.unsolved >= 0).argmax())
    t, h = (v.flatten()[min(sample, v.numel() - 1)].item() if isinstance(v, Tensor) else v for v in (step.t, step.h))
    raise failure("newton", t=t, h=h, stage=int(step.unsolved[sample]), sample=sample if step.x0.ndim > 1 else None)


def check_implicit(tableau: ButcherTableau, x: Tensor) -> None:
    """Refuse states in which no root is found, and what cannot see an iteration.

    Raises:
        TypeError: a narrow or complex dtype.
        RuntimeError: in a graph, or under a transform of torch.func.
    """
    if x.dtype not in (torch.float32, torch.float64):
        remedy = "view_as_real" if x.is_complex() else "x0.float()"
        raise TypeError(f"{tableau.name} finds its stages in float32 or float64, got {x.dtype}: take {remedy}")
    if is_compiling():
        raise RuntimeError(
            f"{tableau.name} iterates until its stages are found, by numbers that a graph of torch.compile or "
            "torch.export does not have: leave this solve out of it (torch.compiler.disable), or take an explicit one"
        )
    if maybe_current_level() is not None:
        raise RuntimeError(
            f"{tableau.name} iterates until its stages are found, which transforms of torch.func do not see: take "
            "torch.autograd.grad, give samples as one batch, or take an explicit method"
        )


@lru_cache(maxsize=64)
def _weights(tableau: ButcherTableau, i: int) -> tuple[float, ...]:
    """Weights of the stages before i whose sum extrapolates their velocities to the node of stage i, of least norm."""
    nodes = np.array(tableau.c[:i])
    degree = min(len(set(nodes.tolist())) - 1, 2)
    powers = np.arange(degree + 1)[:, None]
    return tuple(np.linalg.lstsq(nodes[None, :] ** powers, np.float64(tableau.c[i]) ** powers[:, 0], rcond=None)[0])


def _extrapolated(stages: Sequence[Tensor], tableau: ButcherTableau, i: int) -> Tensor:
    guess = None
    for p, weight in zip(stages, _weights(tableau, i), strict=True):
        if weight:
            guess = p.detach() * weight if guess is None else torch.add(guess, p.detach(), alpha=weight)
    assert guess is not None
    return guess


def _norms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows(x), dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1)) if x.ndim > 1 else norms.view(())


def _mask(samples: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(samples).to(x.device).view(-1, *[1] * (x.ndim - 1))
