"""Published explicit Runge-Kutta methods as tableaus."""

from __future__ import annotations

from solvers.tableaus import ButcherTableau, Embedded, Row

__all__ = ["BS23", "DOPRI5", "EULER", "FEHLBERG2", "HEUN", "HEUN3", "MIDPOINT", "RK4", "RK4_38", "TSIT5", "method"]


def method(
    name: str, *, order: int, c: Row, a: tuple[Row, ...], b: Row, output: str | None = None, low: str | None = None,
    dense: tuple[Row, ...] | None = None, **outputs: tuple[int, Row],
) -> ButcherTableau:  # fmt: skip
    """A tableau with Euler's output, further ones by name, each an order and its weights, and its own as ``output``."""
    embedded = {"euler": (1, (1.0, *[0.0] * (len(c) - 1)))} | outputs | {output or f"order{order}": (order, b)}
    solutions = tuple((key, Embedded(*solution)) for key, solution in embedded.items())
    return ButcherTableau(name=name, order=order, c=c, a=a, b=b, embedded=solutions, low=low, dense=dense)


EULER = method("euler", order=1, c=(0.0,), a=((),), b=(1.0,), output="euler")

MIDPOINT = method("midpoint", order=2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0), output="midpoint", low="euler")

HEUN = method("heun", order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2), output="heun", low="euler")

# The classic method of Kutta (1901), not the 3/8 rule.
RK4 = method(
    "rk4", order=4, c=(0.0, 1 / 2, 1 / 2, 1.0), a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), midpoint=(2, (0.0, 1.0, 0.0, 0.0)),
)  # fmt: skip

# Bogacki and Shampine (1989), A 3(2) pair of Runge-Kutta formulas; [K24, eq. 46 and 47].
BS23 = method(
    "bs23",
    order=3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    midpoint=(2, (0.0, 1.0, 0.0, 0.0)),
    order2=(2, (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
    low="order2",
    dense=((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),  # cubic Hermite
)

# Dormand and Prince (1980), A family of embedded Runge-Kutta formulae.
DOPRI5 = method(
    "dopri5",
    order=5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    order4=(4, (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)),
    low="order4",
    dense=(  # Shampine (1986), Some practical Runge-Kutta formulas
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
)

# Tsitouras (2011), Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption.
_TSIT5_B = (
    0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0
)  # fmt: skip
_TSIT5_ERROR = (
    -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
    0.5823571654525552, -0.45808210592918697, 1 / 66,
)  # fmt: skip
TSIT5 = method(
    "tsit5",
    order=5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    order4=(4, tuple(b + e for b, e in zip(_TSIT5_B, _TSIT5_ERROR, strict=True))),
    low="order4",
    dense=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.930296236894751, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.338188630282318, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479368, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
)

# Fehlberg's RK1(2) (NASA TR R-315, 1969).
FEHLBERG2 = method(
    "fehlberg2", order=2, c=(0.0, 1 / 2, 1.0), a=((), (1 / 2,), (1 / 256, 255 / 256)), b=(1 / 512, 255 / 256, 1 / 512),
    midpoint=(2, (0.0, 1.0, 0.0)), order1=(1, (1 / 256, 255 / 256, 0.0)), low="order1",
)  # fmt: skip

HEUN3 = method("heun3", order=3, c=(0.0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4))

# Kutta's 3/8 rule, which torchdiffeq calls rk4.
RK4_38 = method(
    "rk4_38", order=4, c=(0.0, 1 / 3, 2 / 3, 1.0), a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)  # fmt: skip
