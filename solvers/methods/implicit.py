"""Published diagonally implicit Runge-Kutta methods as tableaus."""

from __future__ import annotations

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
KVAERNO5 = method(
    "kvaerno5",
    order=5,
    c=(0.0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0),
    a=(
        (),
        (_G, _G),
        (0.13, 0.84033320996790809, _G),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, _G),
        (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, _G),
        _LOW,
        _B,
    ),
    b=_B,
    order4=(4, (*_LOW, 0.0)),
    low="order4",
    dense=_hermite(_B),
)
