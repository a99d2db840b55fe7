"""What a solve returns: states, times, steps, counts, and the state at any time between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from solvers.interpolation import Interpolant
from solvers.step import Step

__all__ = ["SampleSolution", "SampleStatistics", "Solution", "Statistics"]


@dataclass
class Statistics:
    """Counts of a solve.

    Attributes:
        evaluations: field calls.
        accepted, rejected: attempted steps; with a step size per sample, those of all samples together.
    """

    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Result of :func:`~solvers.integrate`; ``solution(t)`` is the state at any time solved, with ``keep="steps"``.

    Attributes:
        times: the time of each kept state, ``times[0] = t0``.
        states: the kept states, each as ``x0``; only the last one with ``keep="last"``.
        steps: the accepted steps, with ``keep="steps"``.
        stats: counts.
        status: "finished", "event", or why the solve stopped before its end.
        event_time: the time of the event, a tensor that gradients flow through, float64 or, on a device that has none,
            float32; None if there was none. ``t1`` is the same as a number.
        interpolant: the state at a time, with ``keep="steps"``.
    """

    times: tuple[Any, ...]
    states: tuple[Any, ...]
    steps: tuple[Step, ...] = ()
    stats: Statistics = field(default_factory=Statistics)
    status: Any = "finished"
    event_time: Tensor | None = None
    interpolant: Interpolant | None = field(default=None, repr=False)

    @property
    def x1(self) -> Any:
        """The last state, as ``x0``."""
        return self.states[-1]

    @property
    def t1(self) -> Any:
        """The time of the last state."""
        return self.times[-1]

    def __call__(self, t: float | Tensor) -> Any:
        """The state at ``t``, from the interpolant of the method or, where it has none, cubic Hermite.

        Nothing of it is computed during the solve. A method without interpolant costs a field evaluation a time.

        Args:
            t: a time between ``times[0]`` and ``t1``, or ``(n,)`` of them, then in a new first dimension; gradients
                flow to it.

        Raises:
            ValueError: ``keep`` was not "steps", or t lies outside.
        """
        if self.interpolant is None:
            raise ValueError("solution(t) needs the steps: integrate with keep='steps'")
        return self.interpolant(t)


@dataclass(frozen=True)
class SampleStatistics:
    """Counts of each sample, ``(B,)``: the field evaluations made for it, its accepted and its rejected steps."""

    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleSolution(Solution):
    """Result of :func:`~solvers.integrate` with ``control="sample"``.

    Every entry of ``times`` is a ``(B,)`` tensor; a sample that was rejected or had finished repeats its time and
    state. ``status`` holds one entry per sample, ``event_time`` is ``(B,)`` with NaN where there was no event,
    ``stats`` counts field calls and the steps of all samples together.

    Attributes:
        samples: the samples that took each of ``steps``, from ``times[k]`` to ``times[k + 1]``.
        sample_stats: the counts of each sample.
    """

    samples: tuple[Tensor, ...] = ()
    sample_stats: SampleStatistics | None = None
