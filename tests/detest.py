"""The non-stiff problems A1 to E5 of DETEST.

Hull, Enright, Fellen, Sedgwick: Comparing numerical methods for ordinary differential equations, SIAM Journal on
Numerical Analysis 9 (1972), 603-637. Formulas, constants and end states as in the authors' test package: Enright,
Pryce: Algorithm 648, ACM Transactions on Mathematical Software 13 (1987), 28-34. All problems run from t = 0 to t = 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ellipj
from torch import Tensor

__all__ = ["END_STATES", "PROBLEMS", "Problem"]

D = torch.float64


@dataclass(frozen=True, eq=False)
class Problem:
    """An initial value problem.

    Attributes:
        name: A1 to E5.
        field: velocity ``(t, y)``, of a time (number or scalar tensor) and a state ``(..., n)``.
        y0: state at t = 0, ``(n,)``, float64.
        exact: states ``(m, n)`` at times ``(m,)``, where a closed form is known.
        end: last time.
    """

    name: str
    field: Callable[[float | Tensor, Tensor], Tensor]
    y0: Tensor
    exact: Callable[[Tensor], Tensor] | None = None
    end: float = 20.0


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack(columns, -1)


def _time(t: float | Tensor, y: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=y.dtype, device=y.device)


def a5(t: float | Tensor, y: Tensor) -> Tensor:
    """``y' = (y - t) / (y + t)``: a spiral, ``ln r + phi`` is constant in polar coordinates of (t, y)."""
    return (y - t) / (y + t)


def b1(t: float | Tensor, y: Tensor) -> Tensor:
    """Two conflicting populations."""
    u, v = y.unbind(-1)
    return _columns(2 * (u - u * v), -(v - u * v))


def b2(t: float | Tensor, y: Tensor) -> Tensor:
    """A linear chemical reaction."""
    u, v, w = y.unbind(-1)
    return _columns(v - u, u - 2 * v + w, v - w)


def b2_exact(t: Tensor) -> Tensor:
    """Modes of the eigenvalues 0, -1 and -3."""
    slow, fast = torch.exp(-t) / 2, torch.exp(-3 * t) / 2
    return _columns(1 + slow + fast, 1 - 2 * fast, 1 - slow + fast)


def b3(t: float | Tensor, y: Tensor) -> Tensor:
    """A nonlinear chemical reaction."""
    u, v, _ = y.unbind(-1)
    return _columns(-u, u - v * v, v * v)


def b4(t: float | Tensor, y: Tensor) -> Tensor:
    """A curve on a torus."""
    u, v, w = y.unbind(-1)
    r = torch.sqrt(u * u + v * v)
    return _columns(-v - u * w / r, u - v * w / r, u / r)


def b4_exact(t: Tensor) -> Tensor:
    """Distance ``2 + cos t`` from the axis, angle t, height ``sin t``."""
    r = 2 + torch.cos(t)
    return _columns(r * torch.cos(t), r * torch.sin(t), torch.sin(t))


def b5(t: float | Tensor, y: Tensor) -> Tensor:
    """Euler's equations of a rigid body without external forces."""
    u, v, w = y.unbind(-1)
    return _columns(v * w, -u * w, -0.51 * u * v)


def b5_exact(t: Tensor) -> Tensor:
    """The Jacobi elliptic functions sn, cn, dn of parameter 0.51."""
    return torch.from_numpy(np.stack(ellipj(t.double().numpy(), 0.51)[:3], -1))


def c1(t: float | Tensor, y: Tensor) -> Tensor:
    """A radioactive decay chain with equal rates."""
    decay = y[..., :-1]
    none = torch.zeros_like(y[..., :1])
    return torch.cat([none, decay], -1) - torch.cat([decay, none], -1)


def c1_exact(t: Tensor) -> Tensor:
    """Poisson probabilities, the last component the rest."""
    first = torch.stack([t**i * torch.exp(-t) / math.factorial(i) for i in range(9)], -1)
    return torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)


def c2(t: float | Tensor, y: Tensor) -> Tensor:
    """A radioactive decay chain with rates 1 to 9."""
    decay = y[..., :-1] * torch.arange(1, 10, dtype=y.dtype, device=y.device)
    none = torch.zeros_like(y[..., :1])
    return torch.cat([none, decay], -1) - torch.cat([decay, none], -1)


def c2_exact(t: Tensor) -> Tensor:
    """The pure birth process: ``e^-t (1 - e^-t)^(i - 1)``, and ``(1 - e^-t)^9`` at the end of the chain."""
    gone = 1 - torch.exp(-t)
    return torch.stack([*(torch.exp(-t) * gone**i for i in range(9)), gone**9], -1)


def diffusion(t: float | Tensor, y: Tensor) -> Tensor:
    """C3 and C4: the heat equation by central differences, ``y_{i-1} - 2 y_i + y_{i+1}``."""
    none = torch.zeros_like(y[..., :1])
    return torch.cat([none, y[..., :-1]], -1) + torch.cat([y[..., 1:], none], -1) - 2 * y


def diffusion_exact(n: int) -> Callable[[Tensor], Tensor]:
    """Sine modes of the second difference on n points, from a unit at the first point."""
    angles = torch.arange(1, n + 1, dtype=D) * math.pi / (n + 1)
    modes = torch.sin(angles[:, None] * torch.arange(1, n + 1, dtype=D)) * math.sqrt(2 / (n + 1))
    rates = 2 * torch.cos(angles) - 2
    return lambda t: (torch.exp(rates * t.double()[:, None]) * modes[:, 0]) @ modes


GRAVITY, SUN = 2.95912208286, 1.00000597682
MASSES = (0.954786104043e-3, 0.285583733151e-3, 0.437273164546e-4, 0.517759138449e-4, 0.277777777778e-5)
PLACES = (
    *(3.42947415189, 3.35386959711, 1.35494901715),
    *(6.64145542550, 5.97156957878, 2.18231499728),
    *(11.2630437207, 14.6952576794, 6.27960525067),
    *(-30.1552268759, 1.65699966404, 1.43785752721),
    *(-21.1238353380, 28.4465098142, 15.3882659679),
)
SPEEDS = (
    *(-0.557160570446, 0.505696783289, 0.230578543901),
    *(-0.415570776342, 0.365682722812, 0.169143213293),
    *(-0.325325669158, 0.189706021964, 0.0877265322780),
    *(-0.0240476254170, -0.287659532608, -0.117219543175),
    *(-0.176860753121, -0.216393453025, -0.0148647893090),
)


def c5(t: float | Tensor, y: Tensor) -> Tensor:
    """Five outer planets around the sun, from Jupiter to Pluto: their 15 coordinates, then their 15 velocities.

    ``y_j'' = k (-(m_0 + m_j) y_j / r_j^3 + sum_{k != j} m_k ((y_k - y_j) / d_jk^3 - y_k / r_k^3))``
    """
    masses = torch.tensor(MASSES, dtype=y.dtype, device=y.device)
    places, speeds = y[..., :15].unflatten(-1, (5, 3)), y[..., 15:]
    pulls = places / torch.linalg.vector_norm(places, dim=-1, keepdim=True) ** 3
    apart = places[..., None, :, :] - places[..., :, None, :]
    others = 1 - torch.eye(5, dtype=y.dtype, device=y.device)
    cubes = torch.linalg.vector_norm(apart, dim=-1) ** 3 + (1 - others)
    mutual = (masses * others / cubes)[..., None] * apart - (masses * others)[..., None] * pulls[..., None, :, :]
    force = GRAVITY * (mutual.sum(-2) - (SUN + masses)[:, None] * pulls)
    return torch.cat([speeds, force.flatten(-2)], -1)


def orbit(t: float | Tensor, y: Tensor) -> Tensor:
    """D1 to D5: two bodies."""
    places, speeds = y[..., :2], y[..., 2:]
    return torch.cat([speeds, -places / torch.linalg.vector_norm(places, dim=-1, keepdim=True) ** 3], -1)


def orbit_start(eccentricity: float) -> Tensor:
    """The state nearest to the focus."""
    return _vector(1 - eccentricity, 0.0, 0.0, math.sqrt((1 + eccentricity) / (1 - eccentricity)))


def orbit_exact(e: float) -> Callable[[Tensor], Tensor]:
    """The ellipse, by Kepler's equation ``u - e sin u = t``."""

    def states(t: Tensor) -> Tensor:
        t = t.double()
        u = t + e * torch.sin(t)
        for _ in range(60):
            u = u - ((u - e * torch.sin(u) - t) / (1 - e * torch.cos(u))).clamp(-0.5, 0.5)
        b, rate = math.sqrt(1 - e * e), 1 / (1 - e * torch.cos(u))
        return _columns(torch.cos(u) - e, b * torch.sin(u), -torch.sin(u) * rate, b * torch.cos(u) * rate)

    return states


def e1(t: float | Tensor, y: Tensor) -> Tensor:
    """Bessel's equation of order 1/2, the origin shifted by one."""
    u, v = y.unbind(-1)
    x = _time(t, y) + 1
    return _columns(v, -(v / x + (1 - 0.25 / (x * x)) * u))


def e1_exact(t: Tensor) -> Tensor:
    """``J_1/2(t + 1)`` and its derivative."""
    x = t + 1
    scale = torch.sqrt(2 / (math.pi * x))
    return _columns(scale * torch.sin(x), scale * (torch.cos(x) - torch.sin(x) / (2 * x)))


def e2(t: float | Tensor, y: Tensor) -> Tensor:
    """Van der Pol's equation."""
    u, v = y.unbind(-1)
    return _columns(v, (1 - u * u) * v - u)


def e3(t: float | Tensor, y: Tensor) -> Tensor:
    """Duffing's equation."""
    u, v = y.unbind(-1)
    return _columns(v, u**3 / 6 - u + 2 * torch.sin(2.78535 * _time(t, y)))


def e4(t: float | Tensor, y: Tensor) -> Tensor:
    """A falling body with quadratic resistance."""
    _, v = y.unbind(-1)
    return _columns(v, 0.032 - 0.4 * v * v)


def e4_exact(t: Tensor) -> Tensor:
    """``30 + ln(cosh(0.4 c t)) / 0.4`` and ``c tanh(0.4 c t)``, with the final speed ``c = sqrt(0.08)``."""
    c = math.sqrt(0.08)
    return _columns(30 + torch.log(torch.cosh(0.4 * c * t)) / 0.4, c * torch.tanh(0.4 * c * t))


def e5(t: float | Tensor, y: Tensor) -> Tensor:
    """A linear pursuit."""
    _, v = y.unbind(-1)
    return _columns(v, torch.sqrt(1 + v * v) / (25 - _time(t, y)))


def e5_exact(t: Tensor) -> Tensor:
    """``v = sinh(ln(25 / (25 - t)))``, integrated."""
    left = 25 / (25 - t)
    return _columns(12.5 * torch.log(left) - t / 2 + t * t / 100, (left - 1 / left) / 2)


def _unit(n: int) -> Tensor:
    return torch.eye(n, dtype=D)[0]


_E1 = math.sqrt(2 / math.pi)
_ALL = (
    Problem("A1", lambda t, y: -y, _vector(1.0), lambda t: torch.exp(-t)[:, None]),
    Problem("A2", lambda t, y: -(y**3) / 2, _vector(1.0), lambda t: torch.rsqrt(t + 1)[:, None]),
    Problem("A3", lambda t, y: y * torch.cos(_time(t, y)), _vector(1.0), lambda t: torch.exp(torch.sin(t))[:, None]),
    Problem(
        "A4", lambda t, y: y / 4 * (1 - y / 20), _vector(1.0), lambda t: 20 / (1 + 19 * torch.exp(-t / 4))[:, None]
    ),
    Problem("A5", a5, _vector(4.0)),
    Problem("B1", b1, _vector(1.0, 3.0)),
    Problem("B2", b2, _vector(2.0, 0.0, 1.0), b2_exact),
    Problem("B3", b3, _vector(1.0, 0.0, 0.0)),
    Problem("B4", b4, _vector(3.0, 0.0, 0.0), b4_exact),
    Problem("B5", b5, _vector(0.0, 1.0, 1.0), b5_exact),
    Problem("C1", c1, _unit(10), c1_exact),
    Problem("C2", c2, _unit(10), c2_exact),
    Problem("C3", diffusion, _unit(10), diffusion_exact(10)),
    Problem("C4", diffusion, _unit(51), diffusion_exact(51)),
    Problem("C5", c5, _vector(*PLACES, *SPEEDS)),
    *(Problem(f"D{i}", orbit, orbit_start(e), orbit_exact(e)) for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)),
    Problem("E1", e1, _vector(_E1 * math.sin(1), _E1 * (math.cos(1) - math.sin(1) / 2)), e1_exact),
    Problem("E2", e2, _vector(2.0, 0.0)),
    Problem("E3", e3, _vector(0.0, 0.0)),
    Problem("E4", e4, _vector(30.0, 0.0), e4_exact),
    Problem("E5", e5, _vector(0.0, 0.0), e5_exact),
)
PROBLEMS = {problem.name: problem for problem in _ALL}

# Of the problems without a closed form, the states at t = 20 that Algorithm 648 lists.
END_STATES = {
    "A5": _vector(-0.7887826688964196),
    "B1": _vector(0.6761876008576667, 0.1860816099640036),
    "B3": _vector(2.061153488557776e-9, 0.05257228022048349, 0.9474277177183630),
    "C5": _vector(
        *(-4.792730224323733, -2.420550725448973, -0.9212509306014886),
        *(-4.217310404035213, 7.356202947498970, 3.223785985421212),
        *(4.035559443262270, 17.19865528670555, 7.478910794233703),
        *(-29.98759326324844, -4.107310937550929, -0.9277008321754407),
        *(-24.42125302518482, 23.81459045746554, 14.92096306951359),
        *(0.3499208963063806, -0.5748487687912825, -0.2551694020879149),
        *(-0.5237040978903326, -0.2493000463579661, -0.08045341642044464),
        *(-0.3875289237334110, 0.05648603288767891, 0.03023606472143342),
        *(0.04133856546712445, -0.2862393029841379, -0.1183032405136207),
        *(-0.1511986457359206, -0.2460068894318766, -0.03189687411323877),
    ),
    "E2": _vector(2.008149762174948, -0.04250887527320057),
    "E3": _vector(-0.1004178858647128, 0.2411400132095954),
}
