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

import math
from collections.abc import Callable

import torch
from torch import Tensor

from solvers import Step

__all__ = ["Measure", "action", "cosine", "displacement", "error", "interior", "needs_closing", "residue"]

Measure = Callable[[Step], Tensor]


def interior(measure: Measure) -> Measure:
    """Mark a measure that never reads the closing stage of an FSAL method, so that none is evaluated for it."""
    measure.interior = True  # type: ignore[attr-defined]
    return measure


def needs_closing(measure: Measure) -> bool:
    """Whether a measure may read the closing stage: true unless it is marked :func:`interior`."""
    return not getattr(measure, "interior", False)


def _norm(p: Tensor) -> Tensor:
    """2-norm over the features, accumulated in float32 or wider, ``(B,)``."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.linalg.vector_norm(p, dim=tuple(range(1, p.ndim)), dtype=wide)


def _features(p: Tensor) -> int:
    return p[0].numel()


def _per_sample(h: float | Tensor) -> float | Tensor:
    return h.reshape(-1) if isinstance(h, Tensor) else h


@interior
def action(step: Step) -> Tensor:
    """Kinetic action ``h sum_i b_i <p_i^2>``, ``<.>`` the mean over features, ``(B,)``.

    The quadrature of ``int <v^2> dt`` over the step with the tableau's own weights; for Euler with h = 1 it is the
    transport cost of the thesis, ``<r^2>`` (section 3).
    """
    total = torch.zeros((), device=step.x0.device)
    for p, b in zip(step.stages, step.tableau.b, strict=False):
        if b != 0:
            total = total + b * _norm(p).square()
    return total * _per_sample(step.h) / _features(step.x0)


@interior
def residue(step: Step) -> Tensor:
    """Mean square of the residue, ``<r^2>`` with ``r = (x1 - x0) / h``, ``(B,)`` (first features of eq. 34)."""
    return _norm(step.residue).square() / _features(step.x0)


@interior
def cosine(step: Step) -> Tensor:
    """Cosine of the residue with the vector of ones, ``(B,)`` (last features of eq. 34); 0 where r = 0."""
    r = step.residue
    wide = torch.promote_types(r.dtype, torch.float32)
    total = r.sum(tuple(range(1, r.ndim)), dtype=wide)
    norm = _norm(r)
    moving = norm > 0
    return torch.where(moving, total, 0) / torch.where(moving, norm * math.sqrt(_features(r)), 1)


def error(step: Step) -> Tensor:
    """Root mean square over the features of the embedded error, ``(B,)``.

    Raises:
        ValueError: the method has no embedded lower order.
    """
    return _norm(step.error()) / math.sqrt(_features(step.x0))


@interior
def displacement(step: Step) -> Tensor:
    """Root mean square over the features of the displacement ``x1 - x0 = h r``, ``(B,)``."""
    return _norm(step.residue) * abs(_per_sample(step.h)) / math.sqrt(_features(step.x0))
