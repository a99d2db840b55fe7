"""Events: where a function of time and state changes sign, and the gradient of that time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field, velocity, versions_of
from solvers.methods import get_tableau
from solvers.runge_kutta import rk_step
from solvers.step import Step
from solvers.validation import real_dtype, to_state_shape

__all__ = ["Event", "attach_event_gradient", "changes", "crossing", "first_crossing_fn", "values"]

Event = Callable[[Any, Tensor], Tensor]


def first_crossing_fn(entries: Event, t: Any, x: Tensor, *, each: bool = False) -> Event:
    """``entries`` as a function that is positive until the first of its entries changes sign.

    Args:
        entries: ``(t, x)`` to a tensor or a number; a comparison changes where it turns.
        t, x: where the solve begins.
        each: the entries of each sample, ``(B, ...)``, have a sign of their own, and the function is ``(B,)``; else it
            is a scalar. A number that is 0 at the start has its event there.

    Raises:
        TypeError, ValueError: the entries are no real numbers, none, not ``(B, ...)``, NaN, or x is overwritten.
    """

    def rows(s: Any, x: Tensor) -> Tensor:
        version = versions_of([x])
        value = entries(s, x)
        if version != versions_of([x]):
            raise ValueError("event must not write into its input: let it begin with x = x.clone()")
        if type(value) is not Tensor and not isinstance(value, Tensor | int | float | np.ndarray | np.generic):
            raise TypeError(f"event must return a tensor or a number, got {type(value).__name__}")
        value = torch.as_tensor(value, device=x.device)
        if value.is_complex():
            raise TypeError(f"event must return real numbers or comparisons, got {value.dtype}")
        if value.numel() == 0 or (each and value.shape[:1] != x.shape[:1]):
            shape = f"({len(x)}, ...) with control='sample'" if each else "at least one number"
            raise ValueError(f"event must return {shape}, got shape {tuple(value.shape)}")
        if value.dtype == torch.bool:
            value = torch.where(value, 1.0, -1.0)
        elif not value.is_floating_point():
            value = value.to(torch.float32)
        return value.reshape(len(x), -1) if each else value.reshape(-1)

    signs = rows(t, x).detach().sign()
    if not each and bool((signs == 0).any()):
        return lambda s, x: rows(s, x).abs().min()
    return lambda s, x: (rows(s, x) * signs).amin(-1)


def values(event: Event, t: Any, x: Tensor, among: Any = None) -> Any:
    """What the event function is there: a number, or an array ``(B,)`` that is 1 but for the samples ``among``.

    Raises:
        ValueError: NaN.
    """
    value: Any = event(t, x).detach().tolist()
    if isinstance(value, float) and value == value:
        return value
    value = np.array(value)
    if among is not None and value.ndim:
        value = np.where(among, value, 1.0)
    if not (value == value).all():
        times = np.broadcast_to(t.detach().flatten().tolist() if isinstance(t, Tensor) else t, value.shape)
        raise ValueError(f"event must return numbers, got NaN at t = {times[np.isnan(value)].flat[0]:.6g}")
    return value


def changes(
    step: Step, state_at: Callable[[Any], Tensor], event: Event, start: Any, end: Any, among: Any = None
) -> tuple[Any, Any, Any]:
    """Whether an event function leaves the positive in a step, and between which parts of it for the first time.

    The step is cut into 4 parts (2 where the function of a batch is almost straight), where there is a change into 16,
    and further into up to 64 until the function is resolved: every new value differs from the mean of its two neighbors
    by less than the least of the three, so that a parabola through them has no root, and where the function changes
    sign by less than that change. So the first of several changes in a step counts, and a function that leaves and
    comes back within a step is noticed, if the bend shows. What lasts less than a 64th of a step may be stepped over;
    ``Tolerance(max_step=...)`` or more steps are the remedy.

    Args:
        step: the step.
        state_at: the state at a fraction of it.
        event: positive at the start of the step, a scalar or ``(B,)``.
        start, end: its values there.
        among: the samples that are looked at, ``(B,)``.

    Returns:
        Whether it changes, and the fractions of the step before and behind the change; of the shape of ``start``.
    """
    if np.ndim(start) == 0:  # in numbers first, since this is done at every step
        middle = float(values(event, step.t + 0.5 * step.h, state_at(0.5)))
        if 32 * abs(middle - (start + end) / 2) <= min(start, middle, end):
            return False, 0.0, 1.0
    among = np.ones_like(np.atleast_1d(start), dtype=bool) if among is None else among
    rows = [np.where(among, start, 1.0), np.where(among, end, 1.0)]
    n, first, resolved = 1, np.zeros_like(rows[0]), False
    while not resolved and n < 64:
        n *= 2
        new = (np.atleast_1d(values(event, step.t + k / n * step.h, state_at(k / n), among)) for k in range(1, n, 2))
        rows = [row for pair in zip(rows, new, strict=False) for row in pair] + rows[-1:]
        v = np.stack(rows)
        first = np.where((v[1:] <= 0).any(0), 1 + (v[1:] <= 0).argmax(0), n + 1)
        resolved = n >= (16 if (first <= n).any() else 4) and _resolved(v, first)
    met, high = first <= n, np.minimum(first, n) / n
    return (met, high - 1 / n, high) if np.ndim(start) else (bool(met[0]), float(high[0] - 1 / n), float(high[0]))


def crossing(
    step: Step, interpolate: Callable[[], Callable[[Any], Tensor]], event: Event, start: Any, end: Any,
    among: Any = None, *, costs: bool, width: float | None = None
) -> tuple[Callable[[Any], Tensor], Any, Any] | None:  # fmt: skip
    """Where an event function leaves the positive in a step for the first time, found by bisection.

    Args:
        step, event, start, end, among: as in :func:`changes`.
        interpolate: makes the state at a fraction of the step.
        costs: whether it takes a field evaluation: then a parabola is looked at first.
        width: how close in time; the resolution of time there, or that of a part of the step, if not given.

    Returns:
        The state at a fraction of the step; whether the function leaves the positive; and at which fraction. None
        where it does not.
    """
    if costs and not np.any(changes(step, _parabola(step), event, start, end, among)[0]):
        return None
    state_at = interpolate()
    met, low, high = changes(step, state_at, event, start, end, among)
    if not np.any(met):
        return None
    width, each = _resolution(step) if width is None else width, np.ndim(met) > 0
    longest = float(torch.as_tensor(step.h).detach().abs().max()) * float(np.max(high - low))
    for _ in range(max(1, min(60, math.ceil(math.log2(max(longest, 1e-300) / max(width, 1e-300)))))):
        middle = (low + high) / 2
        theta = to_state_shape(middle, step.x0) if each else middle
        positive = values(event, step.t + theta * step.h, state_at(theta), met if each else None) > 0
        if each:
            low, high = np.where(positive, middle, low), np.where(positive, high, middle)
        else:
            low, high = (middle, high) if positive else (low, middle)
    return state_at, met, (low + high) / 2


def _resolution(step: Step) -> float:
    span = max(float(torch.as_tensor(t).detach().abs().max()) for t in (step.t, step.t + step.h))
    size, kind = torch.as_tensor(step.h).detach(), step.h.dtype if isinstance(step.h, Tensor) else torch.float64
    return max(torch.finfo(kind).eps * float(size.abs().max()), torch.finfo(torch.float64).eps * span, 1e-300)


def _parabola(step: Step) -> Callable[[Any], Tensor]:
    """The state inside a step from both ends and the velocity of its start."""
    slope = step.stages[0] * step.h
    bend = step.x1 - step.x0 - slope
    return lambda theta: (step.x0 + theta * (slope + theta * bend)).to(step.x0.dtype)


def _resolved(v: np.ndarray, first: np.ndarray) -> bool:
    """Whether values at equal distances, ``(n + 1, B)``, show no change before that at ``first``, as changes() says."""
    k = np.arange(1, len(v) - 1, 2)[:, None]
    before, here, after = v[:-2:2], v[1::2], v[2::2]
    with np.errstate(over="ignore", invalid="ignore"):  # of infinite values, which show no change
        bend = np.abs(here - (before + after) / 2)
        change = np.where(k == first, before - here, here - after)
    least = np.minimum(np.minimum(before, here), after)
    return bool(((k > first) | (bend <= np.where(k + 1 < first, least, change))).all())


class _WithoutSlope(torch.autograd.Function):
    """Time and state of an event whose function has no slope: as they are, and no gradient, not even a silent zero."""

    @staticmethod
    def forward(s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return s.clone(), x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError(
            "event has no slope at its change, as a comparison (bool), a rounded number or a detached value has none, "
            "so the time of the event has no gradient: return a difference, as y.mean() - 0.01 in place of "
            "y.mean() > 0.01, or detach what the solve returns"
        )


def attach_event_gradient(
    field: Field, event: Event, s: Tensor, x: Tensor, met: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Time and state of the event with the gradients of the implicit function ``event(t, x(t)) = 0``.

    Newton steps from the event, which change no value: the event function is constant along the solution it
    defines, so ``t - event / (d event / dt)`` has the derivatives of t. A second step makes those of second order
    right. Where the event function has no slope, a backward pass raises.

    Args:
        field: velocity ``v(t, x)``.
        event: ``(t, x)`` to a scalar, or ``(B,)`` where s is a time per sample.
        s: the time, float64 (float32 on a device without), of a shape that broadcasts against the state.
        x: the state there.
        met: the samples that met the event, ``(B,)`` on the device; the others stay as they are. All if not given.
    """
    if not torch.is_grad_enabled():
        return s, x
    if not (x.requires_grad or s.requires_grad or event(s, x).requires_grad):  # what the event itself depends on
        return s, x
    for method in ("midpoint", "euler"):
        step = velocity(field, s, x)
        at = s if s.requires_grad else s.detach().requires_grad_()
        where = x if x.requires_grad else x.detach().requires_grad_()
        value = event(at, where)
        if not value.requires_grad:
            return _WithoutSlope.apply(s, x)  # type: ignore[return-value] - apply is untyped
        slope_t, slope_x = torch.autograd.grad(value.sum(), (at, where), create_graph=True, allow_unused=True)
        rate = torch.zeros_like(value) if slope_t is None else slope_t.reshape(value.shape).to(value.dtype)
        if slope_x is not None:
            product = (slope_x.conj() * step).real if x.is_complex() else slope_x * step
            rate = rate + (product.sum() if value.ndim == 0 else product.flatten(1).sum(1))
        fall = value.detach() - value
        if met is not None:
            fall, rate = fall * met, torch.where(met, rate, 1.0)
        if bool((rate.detach() == 0).any()):
            return _WithoutSlope.apply(s, x)  # type: ignore[return-value] - apply is untyped
        moved = (fall / rate).reshape(s.shape)
        x = rk_step(field, s, x, moved.to(real_dtype(x)), get_tableau(method), step, closing=False).x1
        s = s + moved
    return s, x
