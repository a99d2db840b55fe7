"""Rosenbrock methods, which solve linear systems with the Jacobian in the place of equations, as tableaus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.order_conditions import missed_condition
from solvers.tableaus import ButcherTableau, Embedded, Row

__all__ = ["RODAS4", "RosenbrockTableau"]


@dataclass(frozen=True)
class RosenbrockTableau(ButcherTableau):
    """A linearly implicit method.

    ``p_i = v(t + c_i h, x + h sum_j a_ij p_j) + h J sum_j gamma_ij p_j + gamma_i h v_t`` and
    ``x1 = x + h sum_i b_i p_i``: a stage is a velocity that foresees how the field changes. J is the derivative of v in
    x and ``v_t`` that in t, both at the start of the step; ``gamma_i = sum_j gamma_ij``. A step takes one Jacobian, one
    factorization and as many solutions as stages, and no iteration. The Jacobian must be exact, so that samples must
    not depend on each other.
    Reference: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.7.

    Attributes:
        gamma: row ``i`` holds ``i + 1`` weights, the last of which is the same in all rows, and positive.

    Raises:
        ValueError: rows of gamma of another length or with other last weights, or coefficients that miss the order.
    """

    gamma: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", tuple(tuple(map(float, row)) for row in self.gamma))
        lengths, last = [len(row) for row in self.gamma], {row[-1] for row in self.gamma if row}
        if lengths != list(range(1, len(self.c) + 1)) or len(last) != 1 or not min(last) > 0:
            raise ValueError(
                f"{self.name}: row i of gamma must have i + 1 entries, the last of them positive and the same in all "
                f"rows, got rows of {lengths} that end in {sorted(last)}"
            )
        super().__post_init__()
        if self.implicit:
            raise ValueError(f"{self.name}: row i of a must have i entries; what is implicit is in gamma")
        for name, value in (("implicit", True), ("explicit", False), ("fsal", False)):
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((self.name, self.b))

    def _check_conditions(self, name: str, order: int, b: Row) -> None:
        if missed := missed_condition(order, self.a, b, self.c, self.gamma):
            most, condition = missed
            raise ValueError(
                f"{self.name}: {name} must be at most {most}, that of the coefficients, got {order}: {condition}"
            )


def _rodas4() -> RosenbrockTableau:
    """From the coefficients as they are published, those of ``u = Gamma p``."""
    states = (
        (), (1.544,), (0.9466785280815826, 0.2557011698983284),
        (3.314825187068521, 2.896124015972201, 0.9986419139977817),
        (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950),
        (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950, 1.0),
    )  # fmt: skip
    changes = (
        (), (-5.6688,), (-2.430093356833875, -0.2063599157091915),
        (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
        (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160),
        (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
    )  # fmt: skip
    inside = (
        (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662, 0.0),
        (-0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872, 0.0),
    )
    square = lambda rows: np.array([[*row, *[0.0] * (6 - len(row))] for row in rows])  # noqa: E731
    gamma = np.linalg.inv(4 * np.eye(6) - square(changes))
    low, end = square(states)[-1] @ gamma, np.array([*states[-1], 1.0]) @ gamma
    first, second = np.array(inside) @ gamma
    return RosenbrockTableau(
        "rodas4",
        order=4,
        c=(0.0, 0.386, 0.21, 0.63, 1.0, 1.0),
        a=tuple(tuple(row[:i]) for i, row in enumerate((square(states) @ gamma).tolist())),
        b=tuple(end.tolist()),
        embedded=(("rodas4", Embedded(4, tuple(end.tolist()))), ("order3", Embedded(3, tuple(low.tolist())))),
        low="order3",
        dense=tuple(map(tuple, np.stack([end + first, second - first, -second], 1).tolist())),
        gamma=tuple((*row[:i], 0.25) for i, row in enumerate(gamma.tolist())),
    )


# Hairer, Wanner (1996), IV.10, the code RODAS: order 4(3), L-stable and stiffly accurate, states inside of order 3.
RODAS4 = _rodas4()
