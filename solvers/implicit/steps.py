"""Steps of diagonally implicit methods, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling

from solvers.errors import failure
from solvers.field_calls import Field, countable, counting, velocity
from solvers.implicit.banded import Banded, banded_jacobian
from solvers.implicit.iteration import Iteration, Measure, refuse_forward_mode
from solvers.implicit.linear import Dense, Identity, LinearSystem, jacobian, rows
from solvers.implicit.root import stage_with_gradient
from solvers.reductions import combine
from solvers.step import Step
from solvers.tableaus import ButcherTableau

__all__ = ["DENSE", "ImplicitSteps", "check_found", "check_implicit"]

DENSE = 200
"""Features of a sample up to which "auto" makes matrices."""

_SLOW = 0.05
"""Rate of convergence beyond which a Jacobian is not kept for the next step."""


class ImplicitSteps:
    """Takes steps of an implicit method, and keeps the Jacobian from one to the next while it serves.

    A sample of which a stage is not found has NaN from there on, and says so in ``step.unsolved``.

    Args:
        tableau: the method.
        rtol, atol: what an error is divided by, as of :class:`~solvers.Tolerance`; None to iterate to rounding.
        each: whether samples are accepted one by one, so that one whose iteration fails does not end the others'.

    Attributes:
        iteration: what finds the stages.
        jacobians: Jacobians computed so far.
        factorizations: matrices factorized so far, one for all samples.
    """

    def __init__(self, tableau: ButcherTableau, rtol: Any = None, atol: Any = None, *, each: bool = False) -> None:
        self.tableau, self.rtol, self.atol, self.each = tableau, rtol, atol, each
        self.iteration = Iteration(tableau.roots, each=each)
        self.jacobians = self.factorizations = self._calls = 0
        self._kept: Tensor | None = None
        self._fresh = False

    @property
    def calls(self) -> int:
        """Field calls so far."""
        return self._calls + self.iteration.calls

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """The last step is taken, by all samples or some; the next one begins elsewhere."""
        if self.iteration.slowest > _SLOW:
            self._kept = None
        self._fresh = False

    def __call__(
        self, field: Field | Sequence[Field], t: Any, x: Tensor, h: Any, first: Tensor | None = None, *,
        closing: bool = True
    ) -> Step:  # fmt: skip
        """One step, as :func:`~solvers.rk_step` takes it."""
        check_implicit(self.tableau, x)
        if is_inference_mode_enabled():
            with counting():
                return self(field, t, countable(x), h, None if first is None else countable(first), closing=closing)
        refuse_forward_mode(x)
        if torch.is_autocast_enabled(x.device.type):  # in whose dtypes no iteration comes near a root
            with torch.autocast(x.device.type, enabled=False):
                return self(field, t, x, h, first, closing=closing)
        method = self._method(x)
        step = self._attempt(field, t, x, h, first, method)
        if step.unsolved is not None and method == "newton" and not self._fresh:
            self._kept = None
            first = step.stages[0] if not len(self.tableau.a[0]) else first
            step = self._attempt(field, t, x, h, first, method)
        if step.unsolved is not None and self.rtol is None:  # no smaller step will be tried
            first = step.stages[0] if not len(self.tableau.a[0]) else first
            method = {"newton": "full", "newton_krylov": "damped_krylov"}.get(method, method)
            step = self._attempt(field, t, x, h, first, method, afresh=True)
        return step

    def _method(self, x: Tensor) -> str:
        chosen = self.tableau.roots.method
        if chosen != "auto":
            return chosen
        return "newton" if self.tableau.roots.band is not None or rows(x).shape[1] <= DENSE else "newton_krylov"

    def _attempt(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None, method: str, *, afresh: bool = False
    ) -> Step:
        tableau, several = self.tableau, isinstance(field, (list, tuple))
        if several and len(field) != tableau.stages:
            raise ValueError(f"field must be one callable or one per stage of {tableau.name}, got {len(field)}")
        stages: tuple[Tensor, ...] = ()
        systems: dict[Any, LinearSystem] = {}
        unsolved: np.ndarray | None = None
        measure, self.iteration.slowest = None, 0.0
        for i, weights in enumerate(tableau.a):
            v = field[i] if several else field
            time = t + tableau.c[i] * h
            if len(weights) == i:
                p = first if i == 0 and first is not None else None
                if p is None:
                    p = velocity(v, time, combine(x, stages, weights, h) if i else x, i)
                    self._calls += 1
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
            solve = partial(self._solved, v, time, scale, None if method == "full" else systems[key])
            p, failed, differentiable = self.iteration(v, i, time, start.detach(), scale, guess, measure, method, solve)
            if failed is not None and (not self.each or failed.all()):
                unsolved = _first_failed(unsolved, failed, i)
                stages = (*stages, *[torch.full_like(x, math.nan)] * (tableau.stages - i))
                break
            if torch.is_grad_enabled() and (differentiable or start.requires_grad):
                p, calls = stage_with_gradient(v, i, time, start + scale * p, p, scale, systems[key])
                self._calls += calls
            if failed is not None:
                unsolved = _first_failed(unsolved, failed, i)
                p = torch.where(_mask(failed, x), math.nan, p)
            stages = (*stages, p)
        x1 = combine(x, stages, tableau.b, h)
        return Step(t, h, x, x1, stages, tableau, None, unsolved)

    def _system(self, v: Field, t: Any, x: Tensor, scale: Any, method: str, *, keep: bool) -> LinearSystem:
        if method not in ("newton", "full"):
            return Identity()
        matrix = self._kept if keep else None
        if matrix is None:
            matrix = self._jacobian(v, t, x)
            self._kept, self._fresh = (matrix if keep else None), True
        return self._factorized(matrix, scale)

    def _jacobian(self, v: Field, t: Any, x: Tensor) -> Tensor:
        self._calls, self.jacobians = self._calls + 1, self.jacobians + 1
        band = self.tableau.roots.band
        return jacobian(v, t, x) if band is None else banded_jacobian(v, t, x, band)

    def _factorized(self, matrix: Tensor, scale: Any) -> LinearSystem:
        self.factorizations += 1
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        with torch.no_grad():
            return Dense(matrix, scale) if self.tableau.roots.band is None else Banded(matrix, scale)

    def _solved(self, v: Field, t: Any, scale: Any, system: LinearSystem | None, r: Tensor, y: Tensor) -> Tensor:
        """The solution for r, with a matrix of its own at y where there is none."""
        return (system or self._factorized(self._jacobian(v, t, y), scale)).solve(r)

    def _measure(self, x: Tensor, h: Any) -> Measure:
        """The weight ``h / tolerance`` of changes of a stage, and the limit on their root mean square."""
        x, eps = x.detach(), torch.finfo(x.dtype).eps
        h = h.detach() if isinstance(h, Tensor) else h
        if self.rtol is None:
            return Measure(h, eps**0.75, relative=True)
        scale = x.abs() * self.rtol + self.atol
        rtol = float(torch.as_tensor(self.rtol).min())
        share = self.tableau.roots.tolerance
        return Measure(h / (scale + torch.finfo(x.dtype).tiny), max(10 * eps / rtol if rtol else 0.0, share))


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
def _weights(*c: float) -> tuple[float, ...]:
    """Weights of stages whose sum extrapolates their velocities from their nodes to the last one, of least norm."""
    nodes = np.array(c[:-1])
    degree = min(len(set(nodes.tolist())) - 1, 2)
    powers = np.arange(degree + 1)[:, None]
    return tuple(np.linalg.lstsq(nodes[None, :] ** powers, np.float64(c[-1]) ** powers[:, 0], rcond=None)[0])


def _extrapolated(stages: Sequence[Tensor], tableau: ButcherTableau, i: int) -> Tensor:
    guess = None
    for p, weight in zip(stages, _weights(*map(float, tableau.c[: i + 1])), strict=True):
        if weight:
            guess = p.detach() * weight if guess is None else torch.add(guess, p.detach(), alpha=weight)
    assert guess is not None
    return guess


def _first_failed(unsolved: np.ndarray | None, failed: np.ndarray, i: int) -> np.ndarray:
    unsolved = np.full(len(failed), -1) if unsolved is None else unsolved
    return np.where((unsolved < 0) & failed, i, unsolved)


def _mask(samples: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(samples).to(x.device).view(-1, *[1] * (x.ndim - 1))
