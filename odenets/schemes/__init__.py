"""Schemes: what a flow takes as its solver where its blocks are no Runge-Kutta steps of one field each.

>>> import odenets, torch
>>> from odenets import measures
>>> flow = odenets.Flow(odenets.MLPField(2), solver="lm", depth=3)  # or solver=odenets.schemes.LinearMultistep()
>>> state, records = flow.record(torch.randn(4, 2), action=measures.action)
>>> records["action"].shape
torch.Size([3, 4])
"""

from odenets.schemes.equilibrium import Equilibrium
from odenets.schemes.fractal import Fractal
from odenets.schemes.halves import Hamiltonian, RevNet
from odenets.schemes.implicit_explicit import ImplicitExplicit
from odenets.schemes.implicit_runge_kutta import LearnedImplicitRungeKutta
from odenets.schemes.momentum import Momentum
from odenets.schemes.multistep import AdamsBashforth2, LinearMultistep
from odenets.schemes.names import SOURCES, names
from odenets.schemes.noise import Noisy, mean_over_paths
from odenets.schemes.polynomial import Polynomial
from odenets.schemes.reversible import CoupledHalves, ReversibleScheme, VelocityState
from odenets.schemes.runge_kutta import LearnedRungeKutta
from odenets.schemes.scheme import Memory, Scheme
from odenets.schemes.second_order import HeavyBall, SecondOrder, TwoStepMidpoint
from odenets.schemes.space_to_depth import InjectivePadding, SpaceToDepth
from odenets.schemes.splitting import Splitting
from odenets.schemes.stochastic_depth import StochasticDepth

__all__ = [
    "SOURCES",
    "AdamsBashforth2",
    "CoupledHalves",
    "Equilibrium",
    "Fractal",
    "Hamiltonian",
    "HeavyBall",
    "ImplicitExplicit",
    "InjectivePadding",
    "LearnedImplicitRungeKutta",
    "LearnedRungeKutta",
    "LinearMultistep",
    "Memory",
    "Momentum",
    "Noisy",
    "Polynomial",
    "RevNet",
    "ReversibleScheme",
    "Scheme",
    "SecondOrder",
    "SpaceToDepth",
    "Splitting",
    "StochasticDepth",
    "TwoStepMidpoint",
    "VelocityState",
    "mean_over_paths",
    "names",
]
