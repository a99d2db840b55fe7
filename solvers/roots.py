"""How the stages of an implicit step are found."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

__all__ = ["RootFinder"]

METHODS = ("auto", "newton", "newton_krylov", "anderson", "fixed_point")


@dataclass(frozen=True)
class RootFinder:
    """How an implicit method finds a stage, the root p of ``p = v(t + c h, x + h sum_j a_j p_j + h a p)``.

    Reference: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.8; for the matrix-free iteration Knoll,
    Keyes, Jacobian-free Newton-Krylov methods, J. Comput. Phys. 193 (2004).

    Attributes:
        method: "newton", the simplified Newton iteration: one Jacobian ``(B, D, D)`` of all samples, kept over steps as
            long as the iteration converges fast, and one factorization a step; it takes each sample for itself.
            "newton_krylov", no matrix: each iteration solves its linear system by products with the Jacobian, one
            field call each, for fields such as convolutions. "fixed_point" iterates the equation as it stands, which
            converges only where h times the Jacobian is below 1. "anderson" accelerates that by the last iterates of
            each sample, one field call an iteration, and converges in many cases beyond. "auto" is "newton" up to 200
            features of a sample, "newton_krylov" above.
        band: how far an entry of the Jacobian that is not 0 lies from its diagonal at most, over the features of a
            sample as they lie in memory: 1 for a line of points that see their neighbours. "newton" then takes
            ``2 band + 1`` products with the Jacobian for all of it, and banded factors, on the host, by SciPy: for
            lines of thousands of points. A band that is too narrow costs iterations, and no accuracy. None for whole
            matrices.
        tolerance: with error control the iteration ends where its error is estimated below this share of the tolerance
            of the solve. Without, this is not read: the iteration ends near rounding, where the largest change of a
            component is ``eps ** 0.75`` of it, or no more than the last digit of the largest.
        max_iterations: the largest number of iterations of a stage; a step in which one does not converge by then is
            rejected, and where no smaller one can be taken, the solve ends with :class:`~solvers.NewtonError`.

    Raises:
        ValueError: an unknown method, or limits out of range.

    >>> from solvers import get_tableau
    >>> get_tableau("trapezoid").solved_by(RootFinder("newton_krylov")).roots.method
    'newton_krylov'
    """

    method: Literal["auto", "newton", "newton_krylov", "anderson", "fixed_point"] = "auto"
    band: int | None = None
    tolerance: float = 0.1
    max_iterations: int = 10

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        if not (isinstance(self.tolerance, Real) and 0 < self.tolerance < 1):
            raise ValueError(f"tolerance must be a share in (0, 1), got {self.tolerance!r}")
        if self.band is not None:
            if not isinstance(self.band, Integral) or isinstance(self.band, bool) or self.band < 0:
                raise ValueError(f"band must be a whole number of diagonals, 0 or more, or None, got {self.band!r}")
            if self.method not in ("auto", "newton"):
                raise ValueError(f"band goes with method 'newton', got method={self.method!r}, which has no matrix")
        whole = isinstance(self.max_iterations, Integral) and not isinstance(self.max_iterations, bool)
        if not whole or self.max_iterations < 1:
            raise ValueError(f"max_iterations must be a whole number, at least 1, got {self.max_iterations!r}")
