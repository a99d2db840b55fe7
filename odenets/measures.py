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
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from torch import Tensor

from solvers import Step, finish_step
from solvers.reductions import power_mean, weighted_action, weighted_root_mean_square

__all__ = [
    "Measure",
    "action",
    "cosine",
    "displacement",
    "error",
    "interior",
    "needs_closing",
    "reductions_of",
    "residue",
    "square_norm",
]

Measure = Callable[[Step], Tensor]
M = TypeVar("M", bound=Callable[..., Tensor])


def interior(measure: M) -> M:
    """Mark a measure that never reads the closing stage of an FSAL method, so that none is evaluated for it."""
    measure.interior = True  # type: ignore[attr-defined]  # functions take attributes
    return measure


def needs_closing(measure: Measure) -> bool:
    """Whether a measure may read the closing stage: true unless it, or what it is a partial of, is :func:`interior`."""
    while isinstance(measure, partial) and not hasattr(measure, "interior"):
        measure = measure.func
    return not getattr(measure, "interior", False)


def reductions_of(measures: Iterable[Measure]) -> frozenset[str]:
    """The reductions that these measures read, computed while a step's state is (``rk_step(..., reductions=...)``)."""
    return frozenset(name for measure in measures if (name := getattr(measure, "reduction", None)))


def _reduction(name: str) -> Callable[[M], M]:
    """Mark a measure that is read off a reduction of the step."""

    def mark(measure: M) -> M:
        measure.reduction = name  # type: ignore[attr-defined]  # functions take attributes
        return measure

    return mark


def _computed(step: Step, name: str) -> Tensor | None:
    return None if step.reductions is None else step.reductions.get(name)


def _residue(step: Step, name: str) -> Tensor:
    value = _computed(step, name)
    if value is None:
        value = finish_step(step.x0, step.stages, step.tableau, step.h, state=False, residue=True)[1][name]
    return value


@interior
@_reduction("action")
def action(step: Step, p: float = 2.0) -> Tensor:
    """Kinetic action ``h sum_i b_i <|p_i|^p>``, ``<.>`` the mean over features, ``(B,)``.

    With p = 2, the energy, it is the quadrature of ``int <v^2> dt`` over the step with the tableau's own weights; for
    Euler with h = 1 it is the transport cost as computed in [K24], ``<r^2>``: the cost ``|r|^2`` of its section 3
    over the dimension of the state (with another p, ``|r|_p^p`` over it). A weight ``1 / (2 tau)`` on it is thus a
    proximal step of size ``tau`` times the dimension; :func:`square_norm` is the cost without the mean. For another
    exponent record ``functools.partial(action, p=...)``.
    """
    if p != 2:
        pairs = zip(step.tableau.b, step.stages, strict=False)
        powers: Tensor = sum(b * power_mean(stage, p) for b, stage in pairs if b)  # type: ignore[assignment]  # never 0
        return step.h * powers
    value = _computed(step, "action")
    return weighted_action(step.stages, step.tableau.b, step.h) if value is None else value


@interior
@_reduction("residue")
def residue(step: Step, p: float = 2.0) -> Tensor:
    """Mean over the features of ``|r|^p`` with the residue ``r = (x1 - x0) / h``, ``(B,)``.

    Its mean square with p = 2 [K24, eq. 34], the square of its norm over the dimension.
    """
    return _residue(step, "residue") if p == 2 else power_mean(step.residue, p)


@interior
@_reduction("residue")
def square_norm(step: Step) -> Tensor:
    """Sum of the squares of the residue over the features, ``(B,)``."""
    return residue(step) * math.prod(step.x0.shape[1:])


@interior
@_reduction("residue")
def cosine(step: Step) -> Tensor:
    """Cosine of the residue with the vector of ones, ``(B,)`` (last features of [K24, eq. 34]); 0 where r = 0."""
    return _residue(step, "cosine")


@_reduction("error")
def error(step: Step) -> Tensor:
    """Root mean square over the features of the embedded error, ``(B,)``.

    Raises:
        ValueError: the method has no embedded lower order, or the closing stage was not evaluated.
    """
    value = _computed(step, "error")
    if value is None:
        weights = step.error_weights()
        value = weighted_root_mean_square(step.stages, weights, step.h)
    return value


@interior
def displacement(step: Step) -> Tensor:
    """Root mean square over the features of the displacement ``x1 - x0 = h r``, ``(B,)``."""
    return weighted_root_mean_square(step.stages, step.tableau.b, step.h)
