"""Errors of a solve: what went wrong, where, and the part of the solution that stands."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from solvers.solution import Solution

__all__ = ["MaxStepsError", "NewtonError", "NonFiniteError", "SolverError", "Status", "StepUnderflowError", "failure"]

Status = Literal["finished", "event", "max_steps", "underflow", "not_finite", "newton"]
"""How a solve ends, at its end, at its event or, where it cannot go on, as one of four errors names it."""


class SolverError(RuntimeError):
    """A solve that cannot go on; each kind of it is a class of its own, with its ``status``.

    With ``integrate(..., on_limit="return")`` the solution comes back with that status instead.

    Attributes:
        status: the :data:`Status` of solutions that end so.
        what: what went wrong, without where.
        t: time at the start of the step that failed.
        h: size of that step.
        stage: index of the stage concerned, or None when it is the step as a whole.
        sample: index of the first sample concerned, or None when it is the batch as a whole.
        solution: the accepted part of the solve; without its interpolant, which needs the field, once pickled.

    >>> import torch
    >>> from solvers import integrate
    >>> try:  # the solution 1 / (1 - t) does not reach t = 2
    ...     integrate(lambda t, x: x * x, torch.ones(1, 1), 0.0, 2.0)
    ... except SolverError as error:
    ...     print(type(error).__name__, error.status, round(error.solution.t1, 1))
    StepUnderflowError underflow 1.0
    """

    status: Status = "finished"

    def __init__(self, what: str, *, t: float, h: float, stage: int | None, sample: int | None = None) -> None:
        self.what, self.t, self.h, self.stage, self.sample = what, t, h, stage, sample
        where = "the step as a whole" if stage is None else f"stage {stage}"
        where += "" if sample is None else f", sample {sample}"
        super().__init__(f"{what} (t = {t:.6g}, h = {h:.6g}, {where})")
        self.solution: Solution | None = None

    def __reduce__(self) -> tuple[object, ...]:
        kind, state = partial(type(self), t=self.t, h=self.h, stage=self.stage, sample=self.sample), dict(vars(self))
        if self.solution is not None:
            state["solution"] = replace(self.solution, interpolant=None)
        return kind, (self.what,), state


class StepUnderflowError(SolverError):
    """The error asks for steps below what time resolves; the problem may be stiff or discontinuous there."""

    status = "underflow"


class MaxStepsError(SolverError):
    """The limit on attempted steps, ``Tolerance(max_steps=...)``, was reached before the end time."""

    status = "max_steps"


class NonFiniteError(SolverError):
    """A stage or a state holds NaN or infinity, and no smaller step avoids it."""

    status = "not_finite"


class NewtonError(SolverError):
    """The iteration of an implicit stage does not converge, and no smaller step is taken.

    >>> import torch
    >>> from solvers import integrate
    >>> try:  # 1 - h J is singular
    ...     integrate(
    ...         lambda t, x: 4 * x, torch.ones(1, 1), 0.0, 1.0, solver="implicit_euler", steps=4
    ...     )
    ... except NewtonError as error:
    ...     print(error.status, error.t, error.stage)
    newton 0.0 0
    """

    status = "newton"


def failure(
    status: Status, *, t: float, h: float, stage: int | None = None, sample: int | None = None,
    ratio: float = math.nan, attempts: int = 0, t1: float = math.nan, smallest: float = math.nan,
    implicit: bool = False,
) -> SolverError:  # fmt: skip
    """The error of a loop that cannot go on: ``attempts`` led not to ``t1``, or no step is below the ``smallest``.

    Args:
        status: "max_steps", "underflow", "not_finite" or "newton".
        t, h, stage, sample: where, as in :class:`SolverError`.
        ratio: the last error ratio.
        implicit: whether the method is implicit.
    """
    if status == "newton":
        return NewtonError(
            "the iteration of an implicit stage does not converge: take smaller steps, float64, or another RootFinder; "
            "its matrix is singular, or the field too far from linear, not finite near the state, not differentiable, "
            "drawing at random (dropout in training mode), or one whose samples depend on each other (newton_krylov)",
            t=t, h=h, stage=stage, sample=sample,
        )  # fmt: skip
    if status == "not_finite":
        return NonFiniteError("NaN or infinity, and no smaller step avoids it", t=t, h=h, stage=stage, sample=sample)
    kind, what, remedy = MaxStepsError, f"{attempts} attempted steps did not reach t1 = {t1:g}", (
        "raise max_steps, or loosen the tolerance"
    )  # fmt: skip
    if status == "underflow":
        kind, what, remedy = StepUnderflowError, f"the error asks for a step below {smallest:.3g}", (
            "the problem is discontinuous here, or the tolerance is below rounding"
        )  # fmt: skip
    if not implicit:
        remedy += "; where the problem is stiff, solver='rodas4' or 'kvaerno5'"
    return kind(f"{what}; last error ratio {ratio:.3g}: {remedy}", t=t, h=h, stage=None, sample=sample)
