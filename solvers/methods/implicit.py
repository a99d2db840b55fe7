"""Published diagonally implicit Runge-Kutta methods as tableaus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from solvers.methods.explicit import method
from solvers.tableaus import ButcherTableau, Row

__all__ = ["IMPLICIT_EULER", "IMPLICIT_MIDPOINT", "KVAERNO5", "TRAPEZOID"]


def _hermite(b: Row) -> tuple[Row, ...]:
    """Cubic Hermite by the stages of a method whose first and last are the velocities at the ends of its step."""
    ends = {0: (1.0, -2.0, 1.0), len(b) - 1: (0.0, -1.0, 1.0)}
    rows = []
    for i, weight in enumerate(b):
        slope, square, cube = ends.get(i, (0.0, 0.0, 0.0))
        rows.append((slope, square + 3 * weight, cube - 2 * weight))
    return tuple(rows)


def _inside(a: Sequence[Row], b: Row, c: Row) -> tuple[Row, ...]:
    """A quartic interpolant for a method of stage order 2 whose last stage is its end and whose first is explicit.

    Weights ``b_i(theta)`` of least norm that fulfil the conditions of order 4 at each theta, end in b, and interpolate
    where the field is so stiff that the stages lie on the solution (``b(theta)' A^-1 c^3 = theta^3``).
    """
    size, nodes = len(b), np.array(c)
    matrix = np.array([[*row, *[0.0] * (size - len(row))] for row in a])
    stiff = np.concatenate([[0.0], np.linalg.solve(matrix[1:, 1:].T, np.eye(size - 1)).T @ nodes[1:] ** 3])
    conditions = [
        (np.ones(size), 0, 1.0), (nodes, 1, 1 / 2), (nodes**2, 2, 1 / 3), (nodes**3, 3, 1 / 4),
        (matrix @ nodes**2, 3, 1 / 12), (stiff, 2, 1.0),
    ]  # fmt: skip
    rows = [np.kron(vector, np.eye(4)) for vector, _, _ in conditions]
    rows.append(np.kron(np.eye(size), np.ones(4)))
    rights = [share * np.eye(4)[power] for _, power, share in conditions]
    weights = np.linalg.lstsq(np.concatenate(rows), np.concatenate([*rights, b]), rcond=1e-11)[0]
    return tuple(map(tuple, weights.reshape(size, 4).tolist()))


IMPLICIT_EULER = ButcherTableau("implicit_euler", order=1, c=(1.0,), a=((1.0,),), b=(1.0,), dense=((1.0,),))

IMPLICIT_MIDPOINT = ButcherTableau("implicit_midpoint", order=2, c=(0.5,), a=((0.5,),), b=(1.0,), dense=((1.0,),))

TRAPEZOID = method(
    "trapezoid", order=2, c=(0.0, 1.0), a=((), (1 / 2, 1 / 2)), b=(1 / 2, 1 / 2), dense=_hermite((1 / 2, 1 / 2))
)

# Kvaerno (2004), Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT 44: 5(4), L-stable.
_G = 0.26
_LOW = (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, _G)
_B = (
    0.13659751177640291, 0.0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728, _G,
)  # fmt: skip
_C = (0.0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0)
_A = (
    (),
    (_G, _G),
    (0.13, 0.84033320996790809, _G),
    (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, _G),
    (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, _G),
    _LOW,
    _B,
)
KVAERNO5 = method(
    "kvaerno5", order=5, c=_C, a=_A, b=_B, order4=(4, (*_LOW, 0.0)), low="order4", dense=_inside(_A, _B, _C)
)
