"""Measures on a solver step: functions ``Step -> (B,)``.

A measure is any such function; one that reads no closing stage says so with :func:`interior`, and a step is then
taken without that evaluation:

>>> import torch, odenets
>>> flow = odenets.Flow(solver="bs23", depth=2)
>>> x1, records = flow.record(torch.randn(4, 3), action=action, peak=lambda step: step.x1.abs().amax(1))
>>> records["action"].shape, records["peak"].shape
(torch.Size([2, 4]), torch.Size([2, 4]))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from solvers import Step
from solvers.reductions import mean_square, mean_square_and_cosine, root_mean_square, weighted_action

__all__ = ["Measure", "action", "cosine", "displacement", "error", "interior", "needs_closing", "residue"]

Measure = Callable[[Step], Tensor]


def interior(measure: Measure) -> Measure:
    """Mark a measure that never reads the closing stage of an FSAL method, so that none is evaluated for it."""
    measure.interior = True  # type: ignore[attr-defined]
    return measure


def needs_closing(measure: Measure) -> bool:
    """Whether a measure may read the closing stage: true unless it is marked :func:`interior`."""
    return not getattr(measure, "interior", False)


def _per_sample(h: float | Tensor) -> float | Tensor:
    return h.reshape(-1) if isinstance(h, Tensor) else h


@interior
def action(step: Step) -> Tensor:
    """Kinetic action ``h sum_i b_i <p_i^2>``, ``<.>`` the mean over features, ``(B,)``.

    The quadrature of ``int <v^2> dt`` over the step with the tableau's own weights; for Euler with h = 1 it is the
    transport cost of the thesis, ``<r^2>`` (section 3).
    """
    return weighted_action(step.stages, step.tableau.b, step.h)


@interior
def residue(step: Step) -> Tensor:
    """Mean square of the residue, ``<r^2>`` with ``r = (x1 - x0) / h``, ``(B,)`` (first features of eq. 34)."""
    return mean_square(step.residue)


@interior
def cosine(step: Step) -> Tensor:
    """Cosine of the residue with the vector of ones, ``(B,)`` (last features of eq. 34); 0 where r = 0."""
    return mean_square_and_cosine(step.residue)[1]


def error(step: Step) -> Tensor:
    """Root mean square over the features of the embedded error, ``(B,)``.

    Raises:
        ValueError: the method has no embedded lower order.
    """
    return root_mean_square(step.error())


@interior
def displacement(step: Step) -> Tensor:
    """Root mean square over the features of the displacement ``x1 - x0 = h r``, ``(B,)``."""
    return root_mean_square(step.residue) * abs(_per_sample(step.h))
