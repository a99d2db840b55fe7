"""What takes the steps of a solve, one after another, by the kind of its method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from solvers.field_calls import Field
from solvers.implicit import implicit_steps
from solvers.runge_kutta import rk_step
from solvers.step import Step
from solvers.structured import structured_steps
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance

__all__ = ["ExplicitSteps", "Stepper", "stepper"]


class Stepper(Protocol):
    """Takes steps, and may remember something from one to the next."""

    @property
    def calls(self) -> int:
        """Field calls so far."""
        ...

    def __call__(
        self, field: Field | Sequence[Field], t: Any, x: Tensor, h: Any, first: Tensor | None = None, *,
        closing: bool = True
    ) -> Step:  # fmt: skip
        """One step; ``first``: its first stage, where that is known, ``closing``: with all stages."""
        ...

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """The last step is taken, by all samples or by those of a mask ``(B,)``."""
        ...


class ExplicitSteps:
    """Steps of an explicit method, which remember nothing."""

    def __init__(self, tableau: ButcherTableau) -> None:
        self.tableau, self.calls = tableau, 0

    def __call__(
        self, field: Field | Sequence[Field], t: Any, x: Tensor, h: Any, first: Tensor | None = None, *,
        closing: bool = True
    ) -> Step:  # fmt: skip
        """:func:`~solvers.rk_step`."""
        step = rk_step(field, t, x, h, self.tableau, first, closing=closing)
        self.calls += len(step.stages) - (first is not None)
        return step

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """Nothing is remembered."""


def stepper(tableau: ButcherTableau, tolerance: Tolerance | None = None, *, each: bool = False) -> Stepper:
    """What takes the steps of a method; ``each``: samples are accepted one by one."""
    if tableau.explicit:
        return ExplicitSteps(tableau)
    if tableau.structure:
        return structured_steps(tableau)
    if tolerance is None:
        return implicit_steps(tableau, each=each)
    return implicit_steps(tableau, tolerance.rtol, tolerance.atol, each=each)
