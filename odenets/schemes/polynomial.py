"""PolyNet: a step of the implicit Euler method as a polynomial of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from odenets.schemes.scheme import Memory, Scheme, Velocity

__all__ = ["Polynomial"]

_USES = {"poly2": (2,), "mpoly2": (1, 1), "two_way": (1, 1)}


@dataclass(frozen=True)
class Polynomial(Scheme):
    """PolyNet's blocks: ``I + hF + h^2 F^2`` for ``(I - hF)^-1``, the implicit Euler method to second order.

    With F the field and ``F^2(x) = F(F(x))``, G a second field of the block, the residues are

    * "poly2": ``F(x) + h F(F(x))``, one field, evaluated twice;
    * "mpoly2": ``F(x) + h G(F(x))``;
    * "two_way": ``F(x) + G(x)``.

    With h = 1 these are the published blocks. For a linear field poly2 agrees with the implicit Euler method up to
    ``O(h^3)`` a step; all three follow ``x' = F(x)``, two_way ``x' = F(x) + G(x)``, to first order. The field gets the
    state and then a velocity, both in the state's shape.
    Reference: Zhang, Li, Loy, Lin. PolyNet. CVPR 2017, section 3.

    Args:
        form: "poly2", "mpoly2" or "two_way".

    Raises:
        ValueError: another form.

    >>> import odenets, torch
    >>> odenets.Flow(odenets.MLPField(2), solver=Polynomial(), depth=3).evaluations
    6
    """

    name: str = field(init=False, repr=False, default="poly2")
    form: str = "poly2"

    def __post_init__(self) -> None:
        if self.form not in _USES:
            raise ValueError(f"form must be one of {', '.join(_USES)}, got {self.form!r}")
        object.__setattr__(self, "name", self.form)
        super().__post_init__()

    @property
    def uses(self) -> tuple[int, ...]:
        """One field twice, or two fields."""
        return _USES[self.form]

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The first term and the second one."""
        v = fields[0](t, x)
        if self.form == "two_way":
            return v + fields[1](t, x)
        return v.add(fields[1](t, v), alpha=h)
