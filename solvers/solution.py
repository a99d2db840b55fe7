"""What a solve returns: states, times, steps and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from solvers.step import Step

__all__ = ["Solution", "Statistics"]


@dataclass
class Statistics:
    """Counts of a solve: field evaluations and attempted steps."""

    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Solution:
    """Result of :func:`~solvers.integrate`.

    Attributes:
        times: the time of each kept state, ``times[0] = t0``.
        states: the kept states, each ``(B, *S)``; only the last one with ``keep="last"``.
        steps: the accepted steps, with ``keep="steps"``.
        stats: counts.
    """

    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    stats: Statistics = field(default_factory=Statistics)

    @property
    def x1(self) -> Tensor:
        """The last state, ``(B, *S)``."""
        return self.states[-1]
