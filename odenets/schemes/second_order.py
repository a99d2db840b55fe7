"""Schemes of second order in time, and of two steps: networks that oscillate, and the midpoint rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from odenets.errors import check_number
from odenets.schemes.reversible import VelocityState

__all__ = ["HeavyBall", "SecondOrder", "TwoStepMidpoint"]


@dataclass(frozen=True)
class TwoStepMidpoint(VelocityState):
    """The midpoint rule of two steps, ``x_{m+1} = x_{m-1} + 2 h v_m(x_m)``, of order 2.

    In residues that is ``r_m = (1 + w) v_m(x_m) - w r_{m-1}`` with ``w = h_m / h_{m-1}``, which keeps the order where
    step sizes differ. The first block takes a step of Euler's method. It is stable on the imaginary axis alone, and so
    for antisymmetric fields ``s((K - K^T) x + b)``; what contracts it makes oscillate and grow.
    Reference: Chang et al. AAAI 2018, arXiv:1709.03698; Hairer, Norsett, Wanner, *Solving Ordinary Differential
    Equations I*, III.1.

    Args:
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`.

    >>> import odenets
    >>> odenets.Flow(odenets.MLPField(2), solver=TwoStepMidpoint(), depth=3).evaluations
    3
    """

    name: str = field(init=False, repr=False, default="two_step_midpoint")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "order", 2)

    def rates(self, h: float, before: float | None) -> tuple[float, float]:
        """``-w`` and ``1 + w``."""
        if before is None:
            return 0.0, 1.0
        w = h / before
        return -w, 1 + w


@dataclass(frozen=True)
class SecondOrder(VelocityState):
    """The leapfrog network, or hyperbolic CNN: ``x'' = v(t, x)`` from rest by Stoermer's rule, of order 2.

    ``x_{m+1} = 2 x_m - x_{m-1} + h^2 v_m(x_m)``, in residues ``r_m = r_{m-1} + (h_m + h_{m-1}) / 2 v_m(x_m)``, which
    is also what is computed where step sizes differ; the first is ``h / 2 v``. With a field ``-K^T s(K x + b)`` whose
    weights are the same in all blocks its energy ``|x'|^2 / 2 + S(K x + b)`` stays bounded, S the sum of an
    antiderivative of s. The method "leapfrog" of :mod:`solvers` integrates separable systems, this one a field of x.
    Reference: Chang et al. AAAI 2018, arXiv:1709.03698; Ruthotto, Haber. Deep neural networks motivated by
    partial differential equations. JMIV 2020, arXiv:1804.04272.

    Args:
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`.

    >>> import odenets, torch
    >>> flow, x = odenets.Flow(odenets.MLPField(2), solver=SecondOrder(), depth=3), torch.randn(5, 2)
    >>> *_, last = flow.steps(x)
    >>> torch.allclose(flow.inverse(last.x1, memory=last.residue), x, atol=1e-5)
    True
    """

    name: str = field(init=False, repr=False, default="second_order")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "order", 2)

    def rates(self, h: float, before: float | None) -> tuple[float, float]:
        """1, and the time between the middles of the steps."""
        return 1.0, h / 2 if before is None else (h + before) / 2


@dataclass(frozen=True)
class HeavyBall(SecondOrder):
    """Heavy ball: ``x' = m`` and ``m' = -gamma m + v(t, x)`` from rest, of order 2.

    The velocity m is computed at the middles of the steps, where it is the residue: over the time ``tau`` from one to
    the next, ``(h_m + h_{m-1}) / 2`` and at first ``h / 2``, damping is exact and v constant,
    ``r_m = exp(-gamma tau) r_{m-1} + (1 - exp(-gamma tau)) / gamma v_m(x_m)``. With gamma = 0 it is
    :class:`SecondOrder`. The published neural ODE solves the system by an adaptive method and learns gamma.
    Reference: Xia et al. Heavy ball neural ordinary differential equations. NeurIPS 2021, arXiv:2110.04840.

    Args:
        gamma: the damping, not negative, in the unit of one over time.
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`; rounding grows by ``exp(gamma h)`` a block on the
            way back, before it is too much a pair of states is kept.

    Raises:
        TypeError, ValueError: a gamma that is no number, negative or not finite.

    >>> import odenets
    >>> odenets.Flow(odenets.MLPField(2), solver=HeavyBall(0.5), depth=3).evaluations
    3
    """

    name: str = field(init=False, repr=False, default="heavy_ball")
    gamma: float = 1.0

    def __post_init__(self) -> None:
        gamma = check_number("gamma", self.gamma)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be finite and not negative, got {gamma}")
        super().__post_init__()

    def rates(self, h: float, before: float | None) -> tuple[float, float]:
        """The damping over the time between the middles of the steps, and the integral of it."""
        scale, tau = super().rates(h, before)
        return (
            (math.exp(-self.gamma * tau), -math.expm1(-self.gamma * tau) / self.gamma) if self.gamma else (scale, tau)
        )
