"""Errors of a solve: what went wrong, where, and the part of the solution that stands."""

from __future__ import annotations

from solvers.solution import Solution, Status

__all__ = ["MaxStepsError", "NonFiniteError", "SolverError", "StepUnderflowError"]


class SolverError(RuntimeError):
    """A solve that cannot go on.

    Attributes:
        t: time at the start of the step that failed.
        h: size of that step.
        stage: index of the stage concerned, or None when it is the step as a whole.
        sample: index of the first sample concerned, or None when it is the batch as a whole.
        solution: the accepted part of the solve.
    """

    status: Status = "finished"

    def __init__(self, what: str, *, t: float, h: float, stage: int | None, sample: int | None = None) -> None:
        where = "the step as a whole" if stage is None else f"stage {stage}"
        where += "" if sample is None else f", sample {sample}"
        super().__init__(f"{what} (t = {t:.6g}, h = {h:.6g}, {where})")
        self.t, self.h, self.stage, self.sample = t, h, stage, sample
        self.solution: Solution | None = None


class StepUnderflowError(SolverError):
    """The error asks for steps below the smallest allowed; the problem may be stiff."""

    status = "underflow"


class MaxStepsError(SolverError):
    """The limit on attempted steps was reached before the end time."""

    status = "max_steps"


class NonFiniteError(SolverError):
    """A stage or a state holds NaN or infinity, and no smaller step avoids it."""

    status = "not_finite"
