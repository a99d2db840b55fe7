"""Steps of methods that read the structure of their field: two halves, or a linear part and a network."""

from __future__ import annotations

from solvers.structured.exponential import ExponentialSteps, exponential_state
from solvers.structured.fields import BoundField, check_structure, part_of
from solvers.structured.split import SplitSteps, end_velocities
from solvers.tableaus import ButcherTableau

__all__ = [
    "BoundField", "ExponentialSteps", "SplitSteps", "check_structure", "end_velocities", "exponential_state",
    "part_of", "structured_steps",
]  # fmt: skip


def structured_steps(tableau: ButcherTableau) -> SplitSteps | ExponentialSteps:
    """What takes the steps of a method."""
    return SplitSteps(tableau) if tableau.structure == "separable" else ExponentialSteps(tableau)
