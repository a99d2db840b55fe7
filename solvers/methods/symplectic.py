"""Symplectic methods for separable systems, compositions of leapfrogs, as tableaus."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from solvers.tableaus import ButcherTableau, Row

__all__ = ["LEAPFROG", "YOSHIDA4", "SplitTableau", "composition"]


@dataclass(frozen=True)
class SplitTableau(ButcherTableau):
    """A composition of leapfrogs for ``dq/dt = g(t, p)``, ``dp/dt = f(t, q)``, of which each takes a share of the step.

    A leapfrog of size s from time t is a kick ``p += s/2 f(t, q)``, a drift ``q += s g(t + s/2, p)`` and a kick
    ``p += s/2 f(t + s, q)``. It is symmetric and symplectic, and so is a composition with symmetric shares. Leapfrog j
    gives two stages, ``(g, f)`` with the force of its first and of its second kick, each of half its weight in b, so
    that ``x1 = x0 + h sum_i b_i p_i`` as for every step; a holds the drifts in front of the force of a stage.
    Reference: Hairer, Lubich, Wanner, *Geometric Numerical Integration*, II.4, II.5 and VI.3.

    Attributes:
        substeps: the shares; they sum to 1, of order 4 the sum of their cubes is 0, and they are the same from either
            end. Of a share below 0 the leapfrog goes backward, and its stages have weights below 0 in the action.

    Raises:
        ValueError: shares that miss the order, an order other than 2 and 4, or c, a and b of other shares.
    """

    structure: ClassVar[str] = "separable"
    substeps: Row = ()

    def _check_conditions(self, name: str, order: int, b: Row) -> None:
        shares, cubes = self.substeps, sum(share**3 for share in self.substeps)
        if order not in (2, 4):
            raise ValueError(f"{self.name}: {name} must be 2 or 4, for compositions of leapfrogs, got {order}")
        if (self.c, self.a, b) != _coefficients(shares):
            raise ValueError(f"{self.name}: c, a and b must be those of the substeps {shares}: take composition()")
        if any(abs(one - other) > 1e-12 for one, other in zip(shares, reversed(shares), strict=True)):
            raise ValueError(f"{self.name}: substeps must be the same from either end, got {shares}")
        if order == 4 and abs(cubes) > 1e-9:
            raise ValueError(f"{self.name}: {name} must be 2: the cubes of the substeps sum to {cubes:.12g}, not to 0")

    @property
    def calls(self) -> int:
        """Calls of velocity, one for each leapfrog, and of force, one more."""
        return 2 * len(self.substeps) + 1

    @property
    def inside_calls(self) -> int:
        """Calls of velocity, at both ends of a step."""
        return 2


def composition(name: str, order: int, substeps: Row) -> SplitTableau:
    """The method of leapfrogs with these shares of a step."""
    c, a, b = _coefficients(substeps)
    return SplitTableau(name, order=order, c=c, a=a, b=b, substeps=substeps)


def _coefficients(substeps: Row) -> tuple[Row, tuple[Row, ...], Row]:
    ends = [0.0, *accumulate(substeps)]
    ends[-1] = 1.0 if abs(ends[-1] - 1.0) <= 1e-12 else ends[-1]
    c = tuple(end for pair in pairwise(ends) for end in pair)
    b = tuple(share / 2 for share in substeps for _ in range(2))
    a = tuple(b[:i] if i % 2 == 0 else (*b[: i - 1], 2 * b[i]) for i in range(len(b)))
    return c, a, b


LEAPFROG = composition("leapfrog", 2, (1.0,))

# Yoshida (1990), Construction of higher order symplectic integrators, Phys. Lett. A 150.
_ENDS = 1 / (2 - 2 ** (1 / 3))
YOSHIDA4 = composition("yoshida4", 4, (_ENDS, 1 - 2 * _ENDS, _ENDS))
