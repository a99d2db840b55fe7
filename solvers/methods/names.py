"""The methods by name."""

from __future__ import annotations

import difflib
from typing import Any, cast

from solvers.methods.dopri8 import DOPRI8
from solvers.methods.explicit import (
    BS23,
    DOPRI5,
    EULER,
    FEHLBERG2,
    HEUN,
    HEUN3,
    MIDPOINT,
    RK4,
    RK4_38,
    TSIT5,
)  # fmt: skip
from solvers.methods.exponential import ETD2RK, EXPONENTIAL_EULER
from solvers.methods.implicit import IMPLICIT_EULER, IMPLICIT_MIDPOINT, KVAERNO5, TRAPEZOID
from solvers.methods.rosenbrock import RODAS4
from solvers.methods.symplectic import LEAPFROG, YOSHIDA4
from solvers.tableaus import ButcherTableau

__all__ = ["get_tableau", "method_names"]

_METHODS = (
    EULER, MIDPOINT, HEUN, HEUN3, RK4, RK4_38, FEHLBERG2, BS23, DOPRI5, TSIT5, DOPRI8, IMPLICIT_EULER,
    IMPLICIT_MIDPOINT, TRAPEZOID, KVAERNO5, RODAS4, LEAPFROG, YOSHIDA4, EXPONENTIAL_EULER, ETD2RK,
)  # fmt: skip
_TABLEAUS = {tableau.name: tableau for tableau in _METHODS}
_ALIASES = {"bosh3": "bs23"}
_STIFF = "'rodas4' or 'kvaerno5'"
_ELSEWHERE = {
    "heun2": "'heun'", "adaptive_heun": "'heun'", "rk45": "'dopri5'", "rk23": "'bs23'",
    "dop853": "'dopri8'", "explicit_adams": "'dopri5' or 'rk4'", "implicit_adams": _STIFF,
    "fixed_adams": "'rk4'", "radau": _STIFF, "bdf": _STIFF, "lsoda": _STIFF, "radauiia3": _STIFF, "radauiia5": _STIFF,
    "gl2": "'implicit_midpoint'", "gl4": _STIFF, "gl6": _STIFF, "sdirk2": _STIFF, "trbdf2": _STIFF,
    "rodas3": _STIFF, "rodas5": _STIFF, "rodas5p": _STIFF, "rosenbrock23": _STIFF, "ode23s": _STIFF,
    "kvaerno3": _STIFF, "kvaerno4": _STIFF, "kencarp4": _STIFF, "kencarp5": _STIFF,
    "backward_euler": "'implicit_euler'", "crank_nicolson": "'trapezoid'", "verlet": "'leapfrog'",
    "velocity_verlet": "'leapfrog'", "stormer_verlet": "'leapfrog'", "semi_implicit_euler": "'leapfrog'",
    "etd1": "'exponential_euler'", "etdrk2": "'etd2rk'",
}  # fmt: skip
"""What takes the place of methods of torchdiffeq and SciPy, in small letters."""


def get_tableau(name: Any) -> ButcherTableau:
    """The tableau called ``name``; a tableau, or a :class:`~solvers.LearnedTableau`, is returned as it is.

    >>> get_tableau("bosh3").name
    'bs23'

    Raises:
        ValueError: the name is not known; the message lists those that are.
    """
    if isinstance(name, ButcherTableau):
        return name
    if hasattr(name, "coefficients"):  # which has the attributes of a tableau
        return cast(ButcherTableau, name)
    tableau = _TABLEAUS.get(_ALIASES.get(name, name))  # type: ignore[arg-type] - a name by now
    if tableau is None:
        known, low = [*_TABLEAUS, *_ALIASES], str(name).lower()
        near = [repr(one) for one in difflib.get_close_matches(low, known, n=2, cutoff=0.7)]
        remedy = _ELSEWHERE.get(low) or " or ".join(near)
        take = f": take {remedy}" if remedy else ""
        raise ValueError(f"unknown solver {name!r}{take}; known are {', '.join(known)}")
    return tableau


def method_names() -> tuple[str, ...]:
    """The names of all published methods, as :func:`get_tableau` takes them.

    >>> method_names()[:2]
    ('euler', 'midpoint')
    """
    return tuple(_TABLEAUS)
