"""Steps of Rosenbrock methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, is_inference_mode_enabled

from solvers.field_calls import Field, countable, counting, velocity
from solvers.implicit.banded import Banded, banded_jacobian
from solvers.implicit.iteration import refuse_forward_mode
from solvers.implicit.linear import Dense, jacobian, rows
from solvers.implicit.steps import DENSE, check_implicit
from solvers.methods.rosenbrock import RosenbrockTableau
from solvers.reductions import combine
from solvers.step import Step

__all__ = ["RosenbrockSteps"]


class _Start(NamedTuple):
    """What a step knows of the field at its start.

    Attributes:
        v: the velocity.
        v_t: its derivative in time.
        matrix: its derivative in the state, whole or by diagonals.
    """

    v: Tensor
    v_t: Tensor
    matrix: Tensor


class RosenbrockSteps:
    """Takes steps of a :class:`~solvers.RosenbrockTableau`, and keeps the Jacobian of one that is rejected.

    Gradients flow through the systems and the Jacobian itself, by second derivatives of the field.

    Args:
        tableau: the method.

    Attributes:
        calls: field calls so far.
        jacobians: Jacobians computed so far.
        factorizations: matrices factorized so far, one for all samples.
    """

    def __init__(self, tableau: RosenbrockTableau) -> None:
        self.tableau = tableau
        self.calls = self.jacobians = self.factorizations = 0
        self._start: _Start | None = None

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """The last step is taken, by all samples or some; the next one begins elsewhere."""
        self._start = None

    def __call__(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None = None, *,
        closing: bool = True
    ) -> Step:  # fmt: skip
        """One step, as :func:`~solvers.rk_step` takes it; ``first`` is of no use to it.

        Raises:
            TypeError, RuntimeError: as of implicit methods.
            ValueError: a field for each stage, or a state too large for its Jacobian.
        """
        if is_inference_mode_enabled():
            with counting():
                return self(field, t, countable(x), h, closing=closing)
        check_implicit(self.tableau, x)
        refuse_forward_mode(x)
        if isinstance(field, (list, tuple)):
            raise ValueError(
                f"{self.tableau.name} takes one field for all its stages, as with stage_fields='tied', got {len(field)}"
            )
        self._check_size(x)
        start = self._start = self._start or self._linearized(field, t, x, h)
        gamma = self.tableau.gamma
        scale, v, stages = h * gamma[0][0], start.v, list[Tensor]()
        system = Dense(start.matrix, scale) if self.tableau.roots.band is None else Banded(start.matrix, scale)
        self.factorizations += 1
        for i, weights in enumerate(gamma):
            if i:
                v = velocity(field, t + self.tableau.c[i] * h, combine(x, stages, self.tableau.a[i], h), i)
                self.calls += 1
            # h J w = (w - (I - h g J) w) / g of w = sum_j gamma_ij p_j: no product with J
            shifted = combine(v, stages, [weight / weights[-1] for weight in weights[:-1]], 1.0) if i else v
            p = system.solve(shifted + sum(weights) * h * start.v_t)
            stages.append(p - (shifted - v) if i else p)
        x1 = combine(x, stages, self.tableau.b, h)
        return Step(t, h, x, x1, tuple(stages), self.tableau, None, _singular(start.v, stages[0]))

    def _check_size(self, x: Tensor) -> None:
        name, roots, size = self.tableau.name, self.tableau.roots, rows(x).shape[1]
        if roots.method not in ("auto", "newton"):
            raise ValueError(f"{name} solves with its Jacobian, got RootFinder({roots.method!r}): take kvaerno5")
        if roots.method == "auto" and roots.band is None and size > DENSE:
            raise ValueError(
                f"{name} solves with its Jacobian, for states of up to {DENSE} features, got {size}: take kvaerno5, "
                f"which needs none, or get_tableau({name!r}).solved_by(RootFinder(band=n)) where the Jacobian has few "
                "diagonals, RootFinder('newton') to have it all the same"
            )

    def _linearized(self, field: Field, t: Any, x: Tensor, h: Any) -> _Start:
        v = velocity(field, t, x)
        refuse_forward_mode(v)
        graph = torch.is_grad_enabled() and (v.requires_grad or _requires_grad(h) or _requires_grad(t))
        band = self.tableau.roots.band
        if band is None:
            matrix = jacobian(field, t, x, create_graph=graph)
        else:
            matrix = banded_jacobian(field, t, x, band, create_graph=graph)
        self.calls, self.jacobians = self.calls + 2, self.jacobians + 1
        return _Start(v, self._rate_in_time(field, t, x, h, v), matrix)

    def _rate_in_time(self, field: Field, t: Any, x: Tensor, h: Any, v: Tensor) -> Tensor:
        """By differences of velocities inside the step, of second order; one call where the field knows no time."""
        times, (one, two) = _ahead(t, h, x)
        near = velocity(field, times[0], x)
        self.calls += 1
        if torch.equal(near, v):
            return torch.zeros_like(v)
        far = velocity(field, times[1], x)
        self.calls += 1
        # through differences (d1, d2) over (s1, s2): (d1 s2 / s1 - d2 s1 / s2) / (s2 - s1)
        return (near - v) * one + (far - v) * two


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _ahead(t: Any, h: Any, x: Tensor) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Two times a little ahead, as far as the precision of the state tells them from t, and the weights of the changes
    until then in the derivative; 0 where the step is."""
    t, h = (torch.as_tensor(value, dtype=torch.float64, device=x.device).detach() for value in (t, h))
    eps = torch.finfo(x.dtype).eps
    share = (1e3 * eps * (t / h).abs()).nan_to_num(0.5).clamp(eps ** (1 / 3), 0.5)
    times = (t + share * h, t + 2 * share * h)
    s1, s2 = (time.to(x.dtype) - t.to(x.dtype) for time in times)
    weights = [torch.where(s1 * s2 * (s2 - s1) == 0, 0.0, w) for w in (s2 / s1 / (s2 - s1), -s1 / s2 / (s2 - s1))]
    if times[0].ndim == 0:
        return (times[0].item(), times[1].item()), (weights[0].item(), weights[1].item())
    return times, (weights[0], weights[1])


def _singular(v: Tensor, p: Tensor) -> np.ndarray | None:
    """The samples whose matrix is singular: the first stage of each, 0, else -1, ``(B,)``; None where none is."""
    with torch.no_grad():
        if bool(p.isfinite().all()):
            return None
        lost = ~rows(p).isfinite().all(1) & rows(v).isfinite().all(1)
        return np.where(lost.cpu().numpy(), 0, -1) if bool(lost.any()) else None
