"""Fields with a structure, as the steps call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from solvers.packing import Packing
from solvers.tableaus import ButcherTableau

__all__ = ["BoundField", "check_structure", "part_of"]

_CLASSES = {
    "separable": "Separable(velocity, force) from solvers, for dq/dt = velocity(t, p), dp/dt = force(t, q)",
    "semilinear": "SemiLinear(A, network) from solvers, for dx/dt = A x + network(t, x)",
}


@dataclass(frozen=True, slots=True, eq=False)
class BoundField:
    """A field with a structure, of a state that is one tensor, and of no further arguments.

    Attributes:
        structure: that of the field.
        call: ``(t, x, name, *args)`` to a part of the field by its name, as ``field.part`` gives it.
        packing: how the state lies in one tensor.
        args: further arguments.
    """

    structure: str
    call: Callable[..., Any]
    packing: Packing
    args: Sequence[Any] = ()

    def __call__(self, t: Any, x: Tensor) -> Any:
        """The velocity of the whole state."""
        return self.part(t, x, "whole")

    def part(self, t: Any, x: Tensor, name: str) -> Any:
        """A part of the field: of half of the state, ``(B, N)``, or the "whole"."""
        if self.packing.single:
            return self.call(t, x, name, *self.args)
        if name == "whole":
            return self.packing.pack(self.call(t, self.packing.unpack(x), name, *self.args), "field")
        half = x.reshape(len(x), *self.packing.shapes[0])
        rate = self.call(t, half, name, *self.args)
        return rate.reshape(x.shape) if isinstance(rate, Tensor) and rate.shape == half.shape else rate


def part_of(field: Any) -> Callable[..., Any]:
    """``field.part`` for one solve."""
    return field.begun() if field.structure == "semilinear" else field.part


def check_structure(tableau: ButcherTableau, field: Any) -> None:
    """Refuse a field that has not the structure that a method reads.

    Raises:
        TypeError: with what to take.
    """
    if tableau.structure == "blocks":
        raise TypeError(
            f"solver must be a method for one field, got {tableau.name}, a scheme for the blocks of an "
            f"odenets.Flow(field, solver={tableau.name!r})"
        )
    if getattr(field, "structure", "") != tableau.structure:
        kind = f"{len(field)} fields" if isinstance(field, (list, tuple)) else type(field).__name__
        raise TypeError(f"field must be a {_CLASSES[tableau.structure]}, with solver={tableau.name!r}, got {kind}")
