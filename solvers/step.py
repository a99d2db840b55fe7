"""One Runge-Kutta step: the object that every measure looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.reductions import SMALL, combination, combine
from solvers.tableaus import ButcherTableau

__all__ = ["Step"]


def _weighted_sum(stages: Sequence[Tensor], weights: Sequence[float] | Tensor, h: float | Tensor) -> Tensor:
    """``h * sum_i w_i p_i``: as many tensor operations as non-zero weights."""
    if isinstance(weights, Tensor):
        return combine(torch.zeros_like(stages[0]), stages, weights, h)
    (p, weight), *rest = [(p, w) for p, w in zip(stages, weights) if w != 0]  # noqa: B905 - torch 2.8's compiler takes strict=False for True
    add = combination if p.numel() <= SMALL else combine
    return add(p * (h * weight), [p for p, _ in rest], [w for _, w in rest], h)


class Step(NamedTuple):
    """A step of a Runge-Kutta method on ``[t, t + h]``.

    Attributes:
        t: time at the start, a number.
        h: step size, a number or a tensor that broadcasts against the state.
        x0: state at the start, ``(B, *S)``.
        x1: state at the end, ``(B, *S)``.
        stages: velocities ``p_i``, each ``(B, *S)``. The closing stages, on which ``x1`` does not depend, are absent
            if the step is taken without them: the last one of an FSAL method, and all behind the solution of
            :meth:`~solvers.ButcherTableau.forwarding`.
        tableau: the method.
        reductions: numbers of each sample computed with ``x1``, by the names of :func:`solvers.finish_step`, or None.
        unsolved: of an implicit method, the first stage of each sample that is not found, ``(B,)``, -1 where all are;
            from there on its numbers are NaN. None where all stages of all samples are found.

    >>> from solvers import get_tableau, rk_step
    >>> step = rk_step(lambda t, x: -x, 0.0, torch.ones(4, 2), 0.1, get_tableau("bs23"))
    >>> step.residue.shape, step.error().abs().max() < 1e-4
    (torch.Size([4, 2]), tensor(True))
    """

    t: float | Tensor
    h: float | Tensor
    x0: Tensor
    x1: Tensor
    stages: tuple[Tensor, ...]
    tableau: ButcherTableau
    reductions: dict[str, Tensor] | None = None
    unsolved: np.ndarray | None = None

    @property
    def residue(self) -> Tensor:
        """``(x1 - x0) / h = sum_i b_i p_i``, from the stages, ``(B, *S)``."""
        return _weighted_sum(self.stages, self.tableau.b, 1.0)

    def error(self) -> Tensor:
        """Embedded error ``h * sum_i (b_i - b_low_i) p_i``, ``(B, *S)``.

        With one smooth field for all stages (tied) it is ``O(h^(q+1))`` for the lower order q: halving h divides
        BS23's by 8. A field with kinks has no such order: by 5.5 to 5.8 for the ReLU fields of ``ConvField`` at their
        first weights. With a field per stage (untied) the stages are not samples of one velocity, their differences do
        not vanish with h, and halving h only halves it.

        Raises:
            ValueError: the method has no embedded lower order, or the closing stage was not evaluated.
        """
        return _weighted_sum(self.stages, self.error_weights(), self.h)

    def error_weights(self) -> tuple[float, ...]:
        """The weights ``b_i - b_low_i`` of the stages in :meth:`error`.

        Raises:
            ValueError: as there.
        """
        weights = self.tableau.error_weights
        if weights is None:
            raise ValueError(f"{self.tableau.name} carries no embedded error: take bs23, dopri5, dopri8 or kvaerno5")
        self._needs_stages(weights, "error()")
        return weights

    def output(self, name: str) -> Tensor:
        """The embedded output ``name`` of the method, ``(B, *S)``: ``x0 + h * sum_i b_i p_i`` with its weights.

        Those of a method are ``step.tableau.outputs``; BS23 has "euler", "midpoint", "order2" and "order3".

        Raises:
            ValueError: no such output, or it needs the closing stage and that was not evaluated.
        """
        weights = self.tableau.solution(name).b
        if weights is self.tableau.b or weights == self.tableau.b:
            return self.x1
        self._needs_stages(weights, f"output({name!r})")
        return combine(self.x0, self.stages, weights, self.h)

    def at(self, theta: float | Tensor) -> Tensor:
        """The state at ``t + theta * h`` from the method's own interpolant, ``(B, *S)``.

        Args:
            theta: in [0, 1]; a tensor that broadcasts against the state lets gradients through.

        Returns:
            The state, ``(B, *S)``.

        Raises:
            ValueError: the method has no interpolant of its own, or it needs the closing stage and that was not
                evaluated.
        """
        weights = self.tableau.weights_at(theta)
        if not isinstance(theta, Tensor):
            self._needs_stages(weights, "at()")
            return combine(self.x0, self.stages, weights, self.h)
        if len(self.stages) < len(weights):
            raise ValueError(f"at() needs the closing stage of {self.tableau.name}: take the step with closing=True")
        x = self.x0
        for p, weight in zip(self.stages, weights, strict=True):
            x = x + (weight * self.h).to(p.dtype) * p
        return x

    def select(self, samples: Tensor) -> Step:
        """The step of some ``samples`` alone, indices ``(n,)`` or a mask ``(B,)``; it has no reductions."""
        t, h = (v[samples] if isinstance(v, Tensor) and v.ndim else v for v in (self.t, self.h))
        stages = tuple(p[samples] for p in self.stages)
        return Step(t, h, self.x0[samples], self.x1[samples], stages, self.tableau)

    def not_finite(self) -> np.ndarray:
        """The first stage of each sample that holds NaN or infinity, -1 where none does, ``(B,)``.

        A state of less than two dimensions is one sample.
        """
        rows = len(self.x0) if self.x0.ndim > 1 else 1
        bad = torch.stack([(~p.detach().isfinite()).reshape(rows, -1).any(1) for p in self.stages]).cpu().numpy()
        return np.where(bad.any(0), bad.argmax(0), -1)

    def _needs_stages(self, weights: Sequence[float], what: str) -> None:
        if any(weights[len(self.stages) :]):
            raise ValueError(f"{what} needs the closing stage of {self.tableau.name}: take the step with closing=True")
