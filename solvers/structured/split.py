"""Steps of compositions of leapfrogs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import check_unchanged, velocity, versions_of
from solvers.methods.symplectic import SplitTableau
from solvers.separable import halves
from solvers.step import Step
from solvers.structured.fields import check_structure
from solvers.tableaus import ButcherTableau

__all__ = ["SplitSteps", "end_velocities"]


class SplitSteps:
    """Takes steps of :class:`~solvers.methods.symplectic.SplitTableau`; keeps the force of the last kick for the next.

    Args:
        tableau: the method.

    Attributes:
        calls: calls of velocity and of force so far, each counted as one.
    """

    def __init__(self, tableau: ButcherTableau) -> None:
        assert isinstance(tableau, SplitTableau)
        self.tableau, self.calls = tableau, 0
        self._end: Tensor | None = None
        self._force: Tensor | None = None

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """A step that begins where the last one ends is told by its state."""

    def __call__(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None = None, *, closing: bool = True
    ) -> Step:
        """One step, with all its stages; ``first`` is of no use to it.

        Raises:
            TypeError: the field is no Separable.
            ValueError: a state that has no halves, or a step size per entry of dimension 1.
        """
        tableau = self.tableau
        check_structure(tableau, field)
        if isinstance(h, Tensor) and h.ndim and (h.ndim != x.ndim or h.shape[1] != 1):
            raise ValueError(f"h must be one for positions and momenta, as (B, 1), got {tuple(h.shape)}")
        q, p = halves(x)
        force = self._force if x is self._end else self._call(field, "force", t, q, 0)
        assert force is not None
        start, begun = force, versions_of([force])
        parts: list[Tensor] = []
        stages: list[Tensor] = []
        versions: list[int] = []
        for j, share in enumerate(tableau.substeps):
            size = share * h
            p = p + size / 2 * force
            rate = self._call(field, "velocity", t + (tableau.c[2 * j] + share / 2) * h, p, 2 * j)
            versions += versions_of([rate]) or ()
            q = q + size * rate
            before, force = force, self._call(field, "force", t + tableau.c[2 * j + 1] * h, q, 2 * j + 1)
            versions += versions_of([force]) or ()
            parts += [rate, force]
            p = p + size / 2 * force
            stages += [torch.cat([rate, before], 1), torch.cat([rate, force], 1)]
        check_unchanged([start], begun)
        check_unchanged(parts, versions)
        x1 = torch.cat([q, p], 1)
        self._end, self._force = x1, force
        return Step(t, h, x, x1, tuple(stages), tableau)

    def _call(self, field: Any, name: str, t: Any, half: Tensor, stage: int) -> Tensor:
        self.calls += 1
        return velocity(partial(field.part, name=name), t, half, stage)


def end_velocities(step: Step, field: Any) -> tuple[Tensor, Tensor]:
    """The field at both ends of a step: velocity is called there, and the forces are those of the kicks."""
    ends = []
    for t, x, stage in ((step.t, step.x0, step.stages[0]), (step.t + step.h, step.x1, step.stages[-1])):
        rate = velocity(partial(field.part, name="velocity"), t, halves(x)[1])
        ends.append(torch.cat([rate, halves(stage)[1]], 1))
    return ends[0], ends[1]
