"""The schemes by name."""

from __future__ import annotations

from typing import Any

from odenets.schemes.fractal import Fractal
from odenets.schemes.implicit_explicit import ImplicitExplicit
from odenets.schemes.multistep import AdamsBashforth2, LinearMultistep
from odenets.schemes.noise import Noisy
from odenets.schemes.polynomial import Polynomial
from odenets.schemes.runge_kutta import LearnedRungeKutta
from odenets.schemes.scheme import Scheme
from odenets.schemes.splitting import Splitting
from odenets.schemes.stochastic_depth import StochasticDepth
from solvers import ButcherTableau, get_tableau

__all__ = ["SCHEMES", "method_of"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        LinearMultistep(), AdamsBashforth2(), Polynomial("poly2"), Polynomial("mpoly2"), Polynomial("two_way"),
        Fractal(), LearnedRungeKutta(), Splitting("lie_trotter"), Splitting("strang"), StochasticDepth(), Noisy(),
        ImplicitExplicit(),
    )
}  # fmt: skip
"""Those that need nothing but a name, by it."""


def method_of(solver: Any) -> ButcherTableau:
    """The scheme or the method of a name; anything else as :func:`solvers.get_tableau` takes it.

    Raises:
        ValueError: neither a scheme nor a method has the name.

    >>> method_of("lm"), method_of("bs23").name
    (LinearMultistep(start=0.0), 'bs23')
    """
    if isinstance(solver, str) and solver in SCHEMES:
        return SCHEMES[solver]
    return get_tableau(solver)
