"""States at chosen times, read off the steps in which these lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.interpolation import at_many, interpolant
from solvers.step import Step
from solvers.validation import to_state_shape

__all__ = ["BatchOutputs", "Reading", "SampleOutputs", "SampleReading", "stacked"]

Array = np.ndarray
_ROUNDING = 1e-12
_SMALL = 1 << 10  # numbers of a state up to which several are the faster made at once


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The states at fractions of a step, numbers or tensors; at the number 1 its end.

    Calling it with a step, and what makes of a step the state at a fraction, gives them, each ``(B, *S)``.
    """

    fractions: Sequence[Any]

    @property
    def inside(self) -> bool:
        """Whether one of them needs an interpolant."""
        return any(isinstance(theta, Tensor) or theta != 1 for theta in self.fractions)

    def __call__(self, step: Step, state_in: Callable[[Step], Callable[[Any], Tensor]]) -> list[Tensor]:
        """The states at the fractions of a step, each of the shape of its states."""
        inside = [theta for theta in self.fractions if isinstance(theta, Tensor) or theta != 1]
        if not inside:
            return [step.x1] * len(self.fractions)
        state_at = state_in(step)
        several = len(inside) > 2 and step.x0.numel() <= _SMALL and not torch.compiler.is_compiling()
        alike = len({isinstance(theta, Tensor) for theta in inside}) == 1
        states = iter(at_many(step, state_at, inside) if several and alike else map(state_at, inside))
        return [next(states) if isinstance(theta, Tensor) or theta != 1 else step.x1 for theta in self.fractions]


@dataclass(frozen=True, slots=True)
class SampleReading:
    """The same of a step with a size per sample.

    Attributes:
        samples: whose states, ``(P,)``, in order; a sample may occur often.
        fractions: of the step of each, ``(P,)`` float64.
        shift: None, or zeros ``(P,)`` that carry the gradient of the times.
    """

    samples: Array
    fractions: Array
    shift: Tensor | None = None

    @property
    def inside(self) -> bool:
        """Whether one of them needs an interpolant."""
        return self.shift is not None or bool((self.fractions != 1).any())

    def __call__(self, step: Step, field: Field) -> list[Tensor]:
        """Their states, one tensor ``(P, *S)``; an interpolant that needs the velocity at the end takes it for all."""
        device = step.x0.device
        if not self.inside:
            return [step.x1[torch.from_numpy(self.samples).to(device)]]
        rows, width, order = self._block()
        samples, places = torch.from_numpy(rows).to(device), torch.from_numpy(order).to(device)
        part = _widened(step.select(samples))
        fractions = np.ones(len(rows) * width)
        fractions[order] = self.fractions
        theta = to_state_shape(fractions, step.x0).unflatten(0, (-1, width))
        if self.shift is not None:
            shift = self.shift.new_zeros(len(fractions)).index_copy(0, places, self.shift)
            theta = theta + shift.to(theta).view_as(theta) / part.h  # type: ignore[operator] - tensors here
        concerned = np.zeros(len(step.x0), dtype=bool)
        concerned[self.samples] = True
        among = to_state_shape(concerned, step.x0)

        def last(t: Any, x: Tensor) -> Tensor:
            """The field at the ends of the step, called with all samples in their places."""
            times = torch.where(among, step.t + step.h, step.t)  # type: ignore[arg-type] - tensors here
            return field(times, torch.where(among, step.x1, step.x0))[samples].unsqueeze(1)

        states = interpolant(part, last, many=True)(theta)
        ends = fractions == 1
        if self.shift is None and ends.any():
            states = torch.where(to_state_shape(ends, step.x0).view_as(theta), part.x1, states)
        return [states.flatten(0, 1)[places]]

    def _block(self) -> tuple[Array, int, Array]:
        """Samples as rows of one width, and the places of the states in them; one state a row where many stay empty."""
        samples, counts = np.unique(self.samples, return_counts=True)
        width = int(counts.max())
        if len(samples) * width > 2 * len(self.samples):
            return self.samples, 1, np.arange(len(self.samples))
        firsts = np.repeat(counts.cumsum() - counts, counts)
        return samples, width, np.repeat(np.arange(len(samples)) * width, counts) + np.arange(len(firsts)) - firsts


def _widened(step: Step) -> Step:
    """A step whose states have a dimension of times behind that of the samples."""
    t, h, *states = (v.unsqueeze(1) for v in (step.t, step.h, step.x0, step.x1, *step.stages))  # type: ignore[union-attr]
    return Step(t, h, states[0], states[1], tuple(states[2:]), step.tableau)


class BatchOutputs:
    """The states at ``at``, collected while the steps are taken.

    Args:
        at: the times, from ``t0`` on and in the direction of the solve, numbers.
        t: the same as a tensor ``(n,)``, which gradients may flow to.
        x0, t0: where the solve begins.
        origin: ``t0`` as a tensor that gradients may flow to: then times are counted from it.
        adaptive: whether the steps are numbers; with an origin only.
    """

    def __init__(
        self, at: Sequence[float], t: Tensor, x0: Tensor, t0: float, *, origin: Tensor | None, adaptive: bool
    ) -> None:
        self.at, self.origin, self.adaptive, self.x0 = at, origin, adaptive, x0
        self.shifts = t.requires_grad
        self.t = _wide(t, x0) if origin is None and self.shifts else t
        self.states: list[Tensor] = []
        if origin is not None or not self.shifts:
            while len(self.states) < len(at) and at[len(self.states)] == t0:
                self.states.append(x0)
        self.begun = len(self.states)

    def reading(self, start: float, size: float, until: float | None = None, step: Step | None = None) -> Reading:
        """What is read off the next step from ``start``, of a ``size``, both numbers; nothing beyond ``until``.

        The step itself is needed where gradients flow to times.
        """
        fractions: list[Any] = []
        at = self.at
        while self.begun < len(at):
            theta = (at[self.begun] - start) / size
            if theta > 1 + _ROUNDING or (until is not None and (at[self.begun] - until) * size > 0):
                break
            theta = 1.0 if abs(theta - 1) <= _ROUNDING else theta
            fractions.append(theta if step is None else self._fraction(self.begun, theta, step))
            self.begun += 1
        return Reading(fractions)

    def _fraction(self, i: int, theta: float, step: Step) -> Any:
        at, t, origin = self.at, self.t, self.origin
        if origin is not None and not self.adaptive:  # from the grid as it is, a tensor
            return theta if theta == 1 else ((t[i] if self.shifts else at[i]) - step.t) / step.h
        if not self.shifts:
            return theta
        if origin is None:  # the value from numbers, the gradient from t
            return theta + (t[i] - t[i].detach()) / step.h
        return (t[i] - origin - (step.t - at[0])) / step.h

    def stacked(self) -> Tensor:
        """The states ``(n, *x0.shape)``; NaN at the times that the solve has not reached."""
        return stacked(self.states, len(self.at), self.x0)


def stacked(states: Sequence[Tensor], n: int, x0: Tensor) -> Tensor:
    """The states at the first of n times, and NaN at the others, ``(n, *x0.shape)``."""
    missing = [torch.full_like(x0, torch.nan)] * (n - len(states))
    return torch.stack([*states, *missing])


class SampleOutputs:
    """The states at ``at`` where every sample has its own steps.

    Args:
        at: the times of each sample, ``(B, n)``.
        t: the same as a tensor, or ``(n,)`` where they are those of every sample; gradients may flow to it.
        x0, t0: where the samples begin.
        rest: the samples whose solve is over at once.
    """

    def __init__(self, at: Array, t: Tensor, x0: Tensor, t0: Array, rest: Array) -> None:
        self.at, self.x0, self.shared = at, x0, t.ndim == 1
        self.t = _wide(t.expand(at.shape), x0) if t.requires_grad else None
        here = np.broadcast_to(rest[:, None], at.shape)
        if self.t is None:
            here = here | (at == t0[:, None])
        self.pending = ~here
        samples = here.nonzero()[0]
        self.states, self.order = [x0[torch.from_numpy(samples).to(x0.device)]], [here.reshape(-1).nonzero()[0]]

    def reading(self, start: Array, size: Array, taken: Array, until: Array | None = None) -> SampleReading | None:
        """What the samples that took a step from ``start``, of a ``size``, read off it; nothing beyond ``until``."""
        at = self.at
        theta = (at - start[:, None]) / np.where(taken, size, 1.0)[:, None]
        theta = np.where(np.abs(theta - 1) <= _ROUNDING, 1.0, theta)
        here = self.pending & taken[:, None] & (theta <= 1)
        if until is not None:
            here = here & ((at - until[:, None]) * np.sign(size)[:, None] <= 0)
        samples, columns = here.nonzero()
        if not len(samples):
            return None
        self.pending = self.pending & ~here
        self.order.append(samples * at.shape[1] + columns)
        shift = None
        if self.t is not None:
            times = self.t[torch.from_numpy(samples).to(self.t.device), torch.from_numpy(columns).to(self.t.device)]
            shift = times - times.detach()
        return SampleReading(samples, theta[samples, columns], shift)

    def stacked(self) -> Tensor:
        """The states ``(B, n, *S)``, or ``(n, B, *S)`` where the times are those of every sample.

        NaN at the times that a sample has not reached.
        """
        left = self.pending.reshape(-1).nonzero()[0]
        rows = [*self.states, self.x0.new_full((len(left), *self.x0.shape[1:]), torch.nan)]
        places = torch.from_numpy(np.concatenate([*self.order, left]).argsort()).to(self.x0.device)
        states = torch.cat(rows)[places].unflatten(0, self.at.shape)
        return states.transpose(0, 1) if self.shared else states


def _wide(t: Tensor, x: Tensor) -> Tensor:
    """Times in the precision in which fractions of a step are numbers."""
    return t if x.device.type == "mps" else t.to(torch.float64)
