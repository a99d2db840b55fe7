"""Steps whose stages are roots of equations: iterations, linear systems, and gradients through the root."""

from __future__ import annotations

from typing import Any

from solvers.implicit.rosenbrock import RosenbrockSteps
from solvers.implicit.steps import ImplicitSteps, check_found
from solvers.methods.rosenbrock import RosenbrockTableau
from solvers.tableaus import ButcherTableau

__all__ = ["ImplicitSteps", "RosenbrockSteps", "check_found", "implicit_steps"]


def implicit_steps(
    tableau: ButcherTableau, rtol: Any = None, atol: Any = None, *, each: bool = False
) -> ImplicitSteps | RosenbrockSteps:
    """What takes the steps of a method; the arguments are those of :class:`ImplicitSteps`."""
    if isinstance(tableau, RosenbrockTableau):
        return RosenbrockSteps(tableau)
    return ImplicitSteps(tableau, rtol, atol, each=each)
