"""What a solve returns: states, times, steps, counts, and the state at any time between."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from solvers.interpolation import interpolant
from solvers.step import Field, Step, beside

__all__ = ["SampleSolution", "SampleStatistics", "Solution", "Statistics", "Status"]

Status = Literal["finished", "event", "max_steps", "underflow", "not_finite"]


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


@dataclass(frozen=True, eq=False)
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
    """

    times: tuple[Any, ...]
    states: tuple[Any, ...]
    steps: tuple[Step, ...] = ()
    stats: Statistics = field(default_factory=Statistics)
    status: Any = "finished"
    event_time: Tensor | None = None
    _field: Field | None = field(default=None, repr=False)
    _unpack: Callable[[Tensor], Any] = field(default=lambda x: x, repr=False)
    _x0: Tensor | None = field(default=None, repr=False)

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
        if self._field is None:
            raise ValueError("solution(t) needs the steps: integrate with keep='steps'")
        if isinstance(t, Tensor) and t.ndim > 1:
            raise ValueError(f"t must be a number or have one dimension, got shape {tuple(t.shape)}")
        if isinstance(t, Tensor) and t.ndim:
            return self._unpack(torch.stack([self._at(time) for time in t.unbind()]))
        return self._unpack(self._at(t))

    def _at(self, t: float | Tensor) -> Tensor:
        first, last, time = self.times[0], self.times[-1], _number(t)
        direction = 1 if last >= first else -1
        slack = _rounding(t) * max(abs(first), abs(last))
        if not direction * first - slack <= direction * time <= direction * last + slack:
            raise ValueError(f"t must lie between {first:g} and {last:g}, got {time:g}")
        assert self._field is not None
        assert self._x0 is not None
        if first == last:
            return self._x0
        ends = [direction * float(step.t + step.h) for step in self.steps[:-1]]
        step = self.steps[bisect_left(ends, direction * time)]
        theta: Any = (time - step.t) / step.h if step.h else 0.0
        if isinstance(t, Tensor) and step.h:  # the value from numbers, the gradient from t
            theta = theta + (t - t.detach()) / step.h
        return interpolant(step, self._field)(theta)


@dataclass(frozen=True)
class SampleStatistics:
    """Counts of each sample, ``(B,)``: the field evaluations made for it, its accepted and its rejected steps."""

    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


@dataclass(frozen=True, eq=False)
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

    def _at(self, t: float | Tensor) -> Tensor:
        ends, time = [time.numpy() for time in self.times], _number(t)
        first, last = ends[0], ends[-1]
        slack = _rounding(t) * np.maximum(np.abs(first), np.abs(last))
        outside = (time < np.minimum(first, last) - slack) | (time > np.maximum(first, last) + slack)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(f"t must lie between {first[i]:g} and {last[i]:g} for sample {i}, got {time:g}")
        within = np.clip(time, np.minimum(first, last), np.maximum(first, last))
        assert self._x0 is not None
        assert self._field is not None
        waiting = first != last
        rest = (~waiting).nonzero()[0]
        rows, order = [self._x0[torch.from_numpy(rest)]], [rest]
        for step, samples, start, end in zip(self.steps, self.samples, ends, ends[1:], strict=False):
            samples = samples.numpy()
            start, end = start[samples], end[samples]
            here = waiting[samples] & ((end - within[samples]) * (end - start) >= 0)
            if here.any():
                part = step.of_samples(torch.from_numpy(here.nonzero()[0]).to(step.x0.device))
                assert isinstance(part.h, Tensor)
                inside = interpolant(part, partial(self._velocity, torch.from_numpy(samples[here]).to(step.x0.device)))
                # the step of a sample that met its event goes on beyond it: theta is a part of h
                theta = beside(within[samples[here]] - start[here], step.x0) / part.h
                if isinstance(t, Tensor):
                    theta = theta + (t - t.detach()) / part.h
                rows.append(inside(theta))
                order.append(samples[here])
                waiting[samples[here]] = False
        return torch.cat(rows)[torch.from_numpy(np.concatenate(order).argsort())]

    def _velocity(self, samples: Tensor, t: Any, x: Tensor) -> Tensor:
        """The field for some samples, asked with all of them in their places: it may know them by position."""
        assert self._x0 is not None
        assert self._field is not None
        times = beside(self.times[0].numpy(), self._x0).to(t.dtype).index_copy(0, samples, t)
        return self._field(times, self._x0.detach().to(x.dtype).index_copy(0, samples, x))[samples]


def _rounding(t: float | Tensor) -> float:
    """How far a time may lie outside for the precision in which it is given."""
    return torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0


def _number(t: float | Tensor) -> float:
    return t.detach().item() if isinstance(t, Tensor) else float(t)
