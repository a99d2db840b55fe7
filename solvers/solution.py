"""What a solve returns: states, times, steps, counts, and the state at any time between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from solvers.errors import Status
from solvers.interpolation import Interpolant
from solvers.step import Step

__all__ = ["SampleSolution", "SampleStatistics", "Solution", "Statistics"]


@dataclass
class Statistics:
    """Counts of a solve.

    Attributes:
        evaluations: field calls; of methods that take a :class:`~solvers.Separable` field the calls of its two
            functions, one by one, and of a :class:`~solvers.SemiLinear` field those of the network.
        accepted: accepted steps; with a step size per sample, those of all samples together.
        rejected: rejected steps, likewise.
    """

    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Result of :func:`~solvers.integrate`; ``solution(t)`` is the state at any time solved, with ``keep="steps"``.

    Attributes:
        times: the time of each kept state, ``times[0] = t0``; with ``at`` those times, a tensor ``(n,)`` or ``(B, n)``.
        states: the kept states, each as ``x0``; only the last one with ``keep="last"``. They are a tuple, for a tensor
            of all of them would be a copy, of twice the memory: ``torch.stack(solution.states)`` makes it. With ``at``
            they are the states at these times as one tensor ``(n, B, *S)``, or ``(B, n, *S)`` for times of each sample
            (``(n, *x0.shape)`` for an x0 without batch; a tuple or dictionary of such tensors for one of tensors). A
            state is NaN where the solve did not reach the time: it met its event before, or could not go on.
        steps: the accepted steps, with ``keep="steps"``.
        stats: counts.
        status: "finished", "event", or why the solve stopped before its end.
        event_time: the time of the event, a tensor that gradients flow through, float64 or, on a device that has none,
            float32; None if there was none. ``t1`` is the same as a number.
        step_times: where the accepted steps begin and end, t0 first; none where only the last or the states of ``at``
            are kept.
        end: with ``at``, time and state at the end, which are ``t1`` and ``x1``.
        interpolant: the state at a time, with ``keep="steps"``.

    >>> import torch
    >>> from solvers import integrate
    >>> solution = integrate(lambda t, x: -x, torch.ones(4, 2), 0.0, 1.0, keep="steps")
    >>> solution.x1.shape, solution.t1, len(solution.steps) == solution.stats.accepted
    (torch.Size([4, 2]), 1.0, True)
    >>> round(solution(0.5)[0, 0].item(), 2)
    0.61
    """

    times: Any
    states: Any
    steps: tuple[Step, ...] = ()
    stats: Statistics = field(default_factory=Statistics)
    status: Status | tuple[Status, ...] = "finished"
    event_time: Tensor | None = None
    step_times: tuple[Any, ...] = ()
    end: tuple[Any, Any] | None = field(default=None, repr=False)
    interpolant: Interpolant | None = field(default=None, repr=False)

    @property
    def x1(self) -> Any:
        """The state at the end of the solve, as ``x0``."""
        return self.states[-1] if self.end is None else self.end[1]

    @property
    def t1(self) -> Any:
        """The time at the end of the solve."""
        return self.times[-1] if self.end is None else self.end[0]

    def __call__(self, t: float | Tensor) -> Any:
        """The state at ``t``, from the interpolant of the method or, where it has none, cubic Hermite.

        Nothing of it is computed during the solve. A method without interpolant costs a field evaluation a time.

        Args:
            t: a time between t0 and ``t1``, or ``(n,)`` of them, then in a new first dimension; gradients
                flow to it.

        Returns:
            The state as ``x0``; of several times, each tensor of it with them in front, ``(n, B, *S)``.

        Raises:
            ValueError: ``keep`` was not "steps", or t lies outside.
        """
        if self.interpolant is None:
            raise ValueError("solution(t) needs the steps: integrate with keep='steps'")
        return self.interpolant(t)


@dataclass(frozen=True)
class SampleStatistics:
    """Counts of each sample of a solve with a step size per sample.

    Attributes:
        evaluations: field evaluations for the sample, ``(B,)``.
        accepted: its accepted steps, ``(B,)``.
        rejected: its rejected steps, ``(B,)``.
    """

    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleSolution(Solution):
    """Result of :func:`~solvers.integrate` with ``control="sample"``.

    Every entry of ``times`` and ``step_times`` is a ``(B,)`` tensor (not with ``at``), ``t1`` is one; a sample that was
    rejected or had finished repeats its time and state. ``status`` holds one entry per sample, ``event_time`` is
    ``(B,)`` with NaN where there was no event, ``stats`` counts field calls and the steps of all samples together.

    Attributes:
        samples: the samples that took each of ``steps``, from ``step_times[k]`` to ``step_times[k + 1]``.
        sample_stats: the counts of each sample.

    >>> import torch
    >>> from solvers import integrate
    >>> rates = torch.tensor([[1.0], [30.0]])
    >>> solution = integrate(lambda t, x: -rates * x, torch.ones(2, 1), 0.0, 1.0, control="sample")
    >>> accepted = solution.sample_stats.accepted  # of each sample: the stiffer one takes more steps
    >>> bool(accepted[0] < accepted[1])
    True
    """

    samples: tuple[Tensor, ...] = ()
    sample_stats: SampleStatistics | None = None
