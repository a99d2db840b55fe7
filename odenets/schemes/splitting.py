"""Splitting: a step by one part of the velocity and one by the other, as in the two halves of a transformer's block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from odenets.schemes.scheme import Memory, Scheme, Velocity

__all__ = ["Splitting"]


@dataclass(frozen=True)
class Splitting(Scheme):
    """A step of ``x' = F(x) + G(x)`` by Euler steps of its parts, one after the other; a block has the two fields.

    * order 1, Lie and Trotter: ``y = x + h F(x)``, ``x1 = y + h G(y)``, the block of a transformer with F its
      attention and G its perceptron;
    * order 2, Strang: ``F`` over h / 2, ``G`` over h, ``F`` over h / 2 with the same weights. The splitting is of
      order 2, its Euler steps are not.

    The fields come in turns, F and G of the first block, then of the second: with ``turns = itertools.cycle([F, G])``
    of functions that make them, ``Flow(lambda: next(turns)(), solver="lie_trotter")``.
    Reference: McLachlan, Quispel. Splitting methods. Acta Numerica 2002.

    Args:
        form: "lie_trotter" or "strang".

    Raises:
        ValueError: another form.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=Splitting("strang"), depth=3)
    >>> flow.evaluations, len(flow.blocks[0].fields)
    (9, 2)
    """

    name: str = field(init=False, repr=False, default="lie_trotter")
    form: str = "lie_trotter"

    def __post_init__(self) -> None:
        if self.form not in ("lie_trotter", "strang"):
            raise ValueError(f"form must be 'lie_trotter' or 'strang', got {self.form!r}")
        object.__setattr__(self, "name", self.form)
        super().__post_init__()

    @property
    def uses(self) -> tuple[int, ...]:
        """F once or twice, G once."""
        return (1 + (self.form == "strang"), 1)

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The sum of the velocities, each at the state that those before it lead to."""
        if self.form == "lie_trotter":
            first = fields[0](t, x)
            return first + fields[1](t, x.add(first, alpha=h))
        first, last, second = fields
        r = first(t, x) * 0.5
        r = r + second(t, x.add(r, alpha=h))
        return r.add(last(t + 0.5 * h, x.add(r, alpha=h)), alpha=0.5)
