"""The schemes by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from odenets.schemes.equilibrium import Equilibrium
from odenets.schemes.fractal import Fractal
from odenets.schemes.halves import Hamiltonian, RevNet
from odenets.schemes.implicit_explicit import ImplicitExplicit
from odenets.schemes.implicit_runge_kutta import LearnedImplicitRungeKutta
from odenets.schemes.momentum import Momentum
from odenets.schemes.multistep import AdamsBashforth2, LinearMultistep
from odenets.schemes.noise import Noisy
from odenets.schemes.polynomial import Polynomial
from odenets.schemes.runge_kutta import LearnedRungeKutta
from odenets.schemes.scheme import Scheme
from odenets.schemes.second_order import HeavyBall, SecondOrder, TwoStepMidpoint
from odenets.schemes.splitting import Splitting
from odenets.schemes.stochastic_depth import StochasticDepth
from solvers import ButcherTableau, get_tableau
from solvers.methods import method_names
from solvers.methods.rosenbrock import RosenbrockTableau

__all__ = ["SCHEMES", "SOURCES", "method_of", "names"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        LinearMultistep(), AdamsBashforth2(), Polynomial("poly2"), Polynomial("mpoly2"), Polynomial("two_way"),
        Fractal(), LearnedRungeKutta(), Splitting("lie_trotter"), Splitting("strang"), StochasticDepth(), Noisy(),
        RevNet(), Hamiltonian(), Hamiltonian("verlet"), TwoStepMidpoint(), SecondOrder(), Momentum(), HeavyBall(),
        ImplicitExplicit(), Equilibrium(), LearnedImplicitRungeKutta(),
    )
}  # fmt: skip
"""Those that need nothing but a name, by it."""


_PUBLISHED = {
    "lmresnet": "lm", "adamsbashforth": "ab2", "polynet": "poly2", "fractalnet": "fractal", "imexnet": "imex",
    "irevnet": "revnet", "momentumresnet": "momentum", "deq": "equilibrium", "leapfrognetwork": "second_order",
    "hyperbolic": "second_order", "transformer": "lie_trotter", "enresnet": "noisy", "droppath": "stochastic_depth",
}  # fmt: skip
"""Names of schemes by those of the networks, in small letters."""

SOURCES = {
    "lm": "Lu 2018", "ab2": "Bashforth 1883", "poly2": "Zhang 2017", "mpoly2": "Zhang 2017", "two_way": "Zhang 2017",
    "fractal": "Larsson 2017", "rkcnn": "Zhu 2018", "lie_trotter": "Lu 2019", "strang": "Strang 1968",
    "stochastic_depth": "Huang 2016", "noisy": "Wang 2019", "euler": "He 2016", "implicit_euler": "Euler",
    "revnet": "Gomez 2017", "hamiltonian": "Chang 2018", "hamiltonian_verlet": "Chang 2018",
    "two_step_midpoint": "Chang 2018", "second_order": "Chang 2018; Ruthotto, Haber 2020", "momentum": "Sander 2021",
    "heavy_ball": "Xia 2021",
    "imex": "Haber 2019", "equilibrium": "Bai 2019", "rkcnn_implicit": "Zhu 2018",
    "bs23": "Bogacki, Shampine 1989", "dopri5": "Dormand, Prince 1980", "tsit5": "Tsitouras 2011", "rk4": "Kutta 1901",
    "dopri8": "Dormand, Prince 1981", "heun": "Heun 1900", "midpoint": "Runge 1895",
}  # fmt: skip
"""Where schemes and methods come from, by name."""


def method_of(solver: Any) -> ButcherTableau:
    """The scheme or the method of a name; anything else as :func:`solvers.get_tableau` takes it.

    Raises:
        ValueError: neither a scheme nor a method has the name.

    >>> method_of("lm"), method_of("bs23").name
    (LinearMultistep(start=0.0), 'bs23')
    """
    if isinstance(solver, type) and issubclass(solver, Scheme):
        raise TypeError(f"solver must be a scheme, got the class {solver.__name__}: solver={solver.__name__}()")
    if not isinstance(solver, str):
        if not isinstance(solver, ButcherTableau) and not hasattr(solver, "coefficients"):
            raise TypeError(f"solver must be the name of a scheme or a method, or one itself, got {solver!r:.80}")
        return get_tableau(solver)
    if solver in SCHEMES:
        return SCHEMES[solver]
    try:
        return get_tableau(solver)
    except ValueError as error:
        low = "".join(c if c.isalnum() else "_" for c in solver.lower())
        low = _PUBLISHED.get(low.replace("_", ""), low)
        near = [repr(name) for name in get_close_matches(low, SCHEMES, n=2, cutoff=0.7)]
        take = f": take {' or '.join(near)}" if near else ""
        raise ValueError(f"{error}; schemes are {', '.join(SCHEMES)}{take}") from None


def names() -> tuple[str, ...]:
    """The names that a flow of images takes as its solver: those of schemes, and of methods for states of any size.

    >>> "lm" in names(), "bs23" in names()
    (True, True)
    """
    methods = {name: get_tableau(name) for name in method_names()}
    dense = [name for name, method in methods.items() if method.structure or isinstance(method, RosenbrockTableau)]
    return (*SCHEMES, *(name for name in methods if name not in dense))
