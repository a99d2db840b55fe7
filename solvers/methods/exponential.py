"""Exponential methods for a linear part and a network, as tableaus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from solvers.tableaus import ButcherTableau

__all__ = ["ETD2RK", "EXPONENTIAL_EULER", "ExponentialTableau"]


@dataclass(frozen=True)
class ExponentialTableau(ButcherTableau):
    """A method for ``dx/dt = A x + n(t, x)`` that takes the linear part exactly.

    Its coefficients are those of the explicit method that it becomes where A = 0: exponential Euler that of Euler,
    etd2rk that of Heun. A stage holds what the functions of hA make of a velocity
    (:class:`~solvers.structured.ExponentialSteps`), so that ``x1 = x0 + h sum_i b_i p_i`` as for every step.
    Reference: Hochbruck, Ostermann, Exponential integrators, Acta Numerica 19 (2010).
    """

    structure: ClassVar[str] = "semilinear"

    @property
    def inside_calls(self) -> int:
        """Calls of the network anew, whose stages hold its values no more."""
        return self.stages


EXPONENTIAL_EULER = ExponentialTableau("exponential_euler", order=1, c=(0.0,), a=((),), b=(1.0,))

# Cox and Matthews (2002), Exponential time differencing for stiff systems, J. Comput. Phys. 176.
ETD2RK = ExponentialTableau("etd2rk", order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2))
