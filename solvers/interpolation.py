"""The state between the ends of a step, and at any time of a solve."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field, velocity
from solvers.step import Step
from solvers.structured import end_velocities, exponential_state
from solvers.validation import to_state_shape

__all__ = ["Interpolant", "SampleInterpolant", "at_many", "hermite", "interpolant"]


def interpolant(step: Step, field: Field, *, many: bool = False) -> Callable[[Any], Tensor]:
    """The state at ``t + theta * h``, ``(B, *S)``, as a function of theta in [0, 1], a number or a tensor.

    That of the method where it has one and the step its closing stage; else cubic Hermite, which costs one field
    evaluation, of a Separable field two of its velocity; of a SemiLinear field that of its method, which costs one
    evaluation for each stage.

    Args:
        step: the step.
        field: velocity ``v(t, x)``.
        many: whether theta is a tensor of many fractions, for which products and sums are taken in one pass.
    """
    if step.tableau.dense is not None and len(step.stages) == step.tableau.stages:
        return (
            step.at if not many else lambda theta: _summed(step, [w * step.h for w in step.tableau.weights_at(theta)])
        )
    if step.tableau.structure == "semilinear":
        return exponential_state(step, field)
    if step.tableau.structure == "separable":
        first, last = end_velocities(step, field)
        return partial(hermite, step._replace(stages=(first,)), last)
    if step.tableau.c[0] != 0:
        raise ValueError(
            f"{step.tableau.name} has no velocity at the start of its steps, from which states inside them would be "
            "interpolated: give the table dense="
        )
    return partial(hermite, step, velocity(field, step.t + step.h, step.x1, step.tableau.interior))


def at_many(step: Step, state_at: Callable[[Any], Tensor], thetas: Sequence[Any]) -> Tensor:
    """The states at several fractions of a step at once, numbers or scalar tensors, ``(m, *S)``.

    ``state_at`` makes the state at one of them; the weights of numbers are taken in float64 on the host.
    """
    x, shape = step.x0, (len(thetas), *[1] * step.x0.ndim)
    if isinstance(thetas[0], Tensor):
        return state_at(torch.stack(list(thetas)).view(shape))
    numbers = np.array(thetas)
    if step.tableau.dense is None or isinstance(step.h, Tensor) or len(step.stages) < step.tableau.stages:
        return state_at(to_state_shape(numbers, x).view(shape))
    weights = np.concatenate(step.tableau.weights_at(numbers)) * step.h
    return _summed(step, to_state_shape(weights, x).view(-1, *shape))


def _summed(step: Step, weights: Iterable[Tensor]) -> Tensor:
    """The first state and the weighted stages; other roundings than those of :meth:`Step.at`."""
    x = step.x0
    for p, weight in zip(step.stages, weights, strict=True):
        x = torch.addcmul(x, weight.to(p.dtype), p)
    return x


def hermite(step: Step, last: Tensor, theta: Any) -> Tensor:
    """Cubic Hermite between the ends of a step with velocity ``last`` at its end (Hairer, Norsett, Wanner, II.6)."""
    rise = step.x1 - step.x0
    bend = step.h * ((1 - theta) * step.stages[0] - theta * last)
    x = step.x0 + theta * theta * (3 - 2 * theta) * rise + theta * (1 - theta) * bend
    return x.to(step.x0.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interpolant:
    """The state at any time of a solve: what ``solution(t)`` calls where the solve keeps its steps.

    Attributes:
        field: velocity ``v(t, x)``.
        x0: the first state, one tensor.
        times: the time of each state, ``times[0]`` that of the first.
        steps: the steps between them.
        unpack: a state as the caller gave it.
    """

    field: Field
    x0: Tensor
    times: Sequence[Any]
    steps: Sequence[Step]
    unpack: Callable[[Tensor], Any]

    def __call__(self, t: float | Tensor) -> Any:
        """The state at a time ``t``, or at ``(n,)`` of them, then in a new first dimension, as the caller gave it.

        Raises:
            ValueError: a time outside of the solve, or times of more dimensions.
        """
        if isinstance(t, Tensor) and t.ndim > 1:
            raise ValueError(f"t must be a number or have one dimension, got shape {tuple(t.shape)}")
        if isinstance(t, Tensor) and t.ndim:
            return self.unpack(torch.stack([self.at(time) for time in t.unbind()]))
        return self.unpack(self.at(t))

    def at(self, t: float | Tensor) -> Tensor:
        """The state at one time ``t``, as one tensor.

        Raises:
            ValueError: t lies outside of the solve.
        """
        first, last, time = self.times[0], self.times[-1], _number(t)
        direction = 1 if last >= first else -1
        slack = _rounding(t) * max(abs(first), abs(last))
        if not direction * first - slack <= direction * time <= direction * last + slack:
            raise ValueError(f"t must lie between {first:g} and {last:g}, got {time:g}")
        if first == last:
            return self.x0
        ends = [direction * float(step.t + step.h) for step in self.steps[:-1]]
        step = self.steps[bisect_left(ends, direction * time)]
        theta: Any = (time - step.t) / step.h if step.h else 0.0
        if isinstance(t, Tensor) and step.h:  # the value from numbers, the gradient from t
            theta = theta + (t - t.detach()) / step.h
        return interpolant(step, self.field)(theta)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleInterpolant(Interpolant):
    """:class:`Interpolant` where every sample has its own times, so that each of ``times`` is ``(B,)``.

    Attributes:
        samples: which samples took each of the steps, indices ``(n,)``.
    """

    samples: Sequence[Tensor]

    def at(self, t: float | Tensor) -> Tensor:
        """The states of all samples at one time ``t``, as one tensor.

        Raises:
            ValueError: t lies outside of the solve of a sample.
        """
        ends, time = [time.numpy() for time in self.times], _number(t)
        first, last = ends[0], ends[-1]
        slack = _rounding(t) * np.maximum(np.abs(first), np.abs(last))
        outside = (time < np.minimum(first, last) - slack) | (time > np.maximum(first, last) + slack)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(f"t must lie between {first[i]:g} and {last[i]:g} for sample {i}, got {time:g}")
        within = np.clip(time, np.minimum(first, last), np.maximum(first, last))
        waiting = first != last
        rest = (~waiting).nonzero()[0]
        rows, order = [self.x0[torch.from_numpy(rest)]], [rest]
        for step, samples, start, end in zip(self.steps, self.samples, ends, ends[1:], strict=False):
            samples = samples.numpy()
            start, end = start[samples], end[samples]
            here = waiting[samples] & ((end - within[samples]) * (end - start) >= 0)
            if here.any():
                part = step.select(torch.from_numpy(here.nonzero()[0]).to(step.x0.device))
                assert isinstance(part.h, Tensor)
                places = torch.from_numpy(samples[here]).to(step.x0.device)
                # the step of a sample that meets its event goes on beyond it: theta is a part of h
                theta = to_state_shape(within[samples[here]] - start[here], step.x0) / part.h
                if isinstance(t, Tensor):
                    theta = theta + (t - t.detach()) / part.h
                rows.append(interpolant(part, partial(self.velocity, places))(theta))
                order.append(samples[here])
                waiting[samples[here]] = False
        return torch.cat(rows)[torch.from_numpy(np.concatenate(order).argsort())]

    def velocity(self, samples: Tensor, t: Any, x: Tensor) -> Tensor:
        """The field for some ``samples``, their times ``t`` and states ``x``.

        It is called with all of them in their places, for it may know them by position.
        """
        times = to_state_shape(self.times[0].numpy(), self.x0).to(t.dtype).index_copy(0, samples, t)
        return self.field(times, self.x0.detach().to(x.dtype).index_copy(0, samples, x))[samples]


def _rounding(t: float | Tensor) -> float:
    """How far a time may lie outside for the precision in which it is given."""
    return torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0


def _number(t: float | Tensor) -> float:
    return t.detach().item() if isinstance(t, Tensor) else float(t)
