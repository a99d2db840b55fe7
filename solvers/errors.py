"""Errors of a solve: what went wrong, where, and the part of the solution that stands."""

from __future__ import annotations

from solvers.solution import Solution

__all__ = ["MaxStepsError", "NonFiniteError", "SolverError", "StepUnderflowError"]


class SolverError(RuntimeError):
    """A solve that cannot go on.

    Attributes:
        t: time at the start of the step that failed.
        h: size of that step.
        stage: index of the stage concerned, or None when it is the step as a whole.
        solution: the accepted part of the solve.
    """

    def __init__(self, what: str, *, t: float, h: float, stage: int | None, solution: Solution | None = None) -> None:
        where = "the step as a whole" if stage is None else f"stage {stage}"
        super().__init__(f"{what} (t = {t:.6g}, h = {h:.6g}, {where})")
        self.t, self.h, self.stage, self.solution = t, h, stage, solution


class StepUnderflowError(SolverError):
    """The error asks for steps below the smallest allowed; the problem may be stiff."""


class MaxStepsError(SolverError):
    """The limit on attempted steps was reached before the end time."""


class NonFiniteError(SolverError):
    """A stage or a state holds NaN or infinity, and no smaller step avoids it."""
