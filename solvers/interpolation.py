"""The state inside a step: the method's own interpolant, or a cubic Hermite one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from solvers.step import Field, Step, velocity

__all__ = ["hermite", "interpolant"]


def interpolant(step: Step, field: Field) -> Callable[[Any], Tensor]:
    """The state at ``t + theta * h``, ``(B, *S)``, as a function of theta in [0, 1], a number or a tensor.

    That of the method where it has one and the step its closing stage; else cubic Hermite, which costs one field
    evaluation.

    Args:
        step: the step.
        field: velocity ``v(t, x)``.
    """
    if step.tableau.dense is not None and len(step.stages) == step.tableau.stages:
        return step.at
    return partial(hermite, step, velocity(field, step.t + step.h, step.x1, step.tableau.interior))


def hermite(step: Step, last: Tensor, theta: Any) -> Tensor:
    """Cubic Hermite between the ends of a step with velocity ``last`` at its end (Hairer, Norsett, Wanner, II.6)."""
    rise = step.x1 - step.x0
    bend = step.h * ((1 - theta) * step.stages[0] - theta * last)
    x = step.x0 + theta * theta * (3 - 2 * theta) * rise + theta * (1 - theta) * bend
    return x.to(step.x0.dtype)
