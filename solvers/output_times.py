"""The times at which a caller wants states, checked: ``at`` of :func:`~solvers.integrate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.tolerance import to_host
from solvers.validation import exact, is_mapped

__all__ = ["output_times"]

Array = np.ndarray


_FEWER = "sort the times of each sample, and repeat the last one where a sample has fewer"


def output_times(at: Any, t0: Any, t1: Any, x: Tensor, *, gradient: str, per_sample: bool) -> tuple[Any, Tensor]:
    """The times as numbers within the solve, and as the tensor that its solution shows.

    Args:
        at: what the caller passed: a tensor, an array or numbers, ``(n,)``, per sample also ``(B, n)``.
        t0, t1: ends of the solve, numbers, or arrays ``(B,)`` with control per sample; t1 may be None, the last time.
        x: the state, packed.
        gradient: how gradients flow.
        per_sample: whether every sample has its own times.

    Returns:
        A list of n numbers, or an array ``(B, n)``; a tensor of the shape and floating dtype of ``at``, float64 if it
        has none, on the device of the state. Times that lie outside by the rounding of their dtype become the end.

    Raises:
        TypeError: no real numbers.
        ValueError: another shape, NaN or infinity, outside ``[t0, t1]``, turning back, or a gradient that gets lost.
    """
    samples = len(x) if per_sample else None
    numbers = _numbers(at)
    shape, single = (numbers.shape, False) if isinstance(numbers, np.ndarray) else ((len(numbers),), True)
    if samples is None and not single:
        raise ValueError(f"at must have shape (n,), got {shape}; control='sample' takes (B, n), times of each sample")
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != samples):
        raise ValueError(f"at must have shape (n,) or ({samples}, n), got {shape}")
    if 0 in shape:
        raise ValueError(f"at must hold at least one time, got shape {shape}")
    slack = 4 * torch.finfo(at.dtype if isinstance(at, Tensor) and at.is_floating_point() else torch.float64).eps
    if samples is None:
        times: Any = _within(list(numbers), t0, t1, slack)
        end = times[-1]
    else:
        times = _rows_within(np.broadcast_to(np.array(numbers, np.float64), (samples, shape[-1])), t0, t1, slack)
        end = times[:, -1]
    if isinstance(at, Tensor) and at.requires_grad and torch.is_grad_enabled():
        _check_gradient(gradient, t0, end if t1 is None else t1)
    return times, _as_tensor(at, numbers, x)


def _rows_within(rows: Array, t0: Array, t1: Array | None, slack: float) -> Array:
    """:func:`_within` of each row."""
    ends = rows[:, -1] if t1 is None else t1
    signs: Array = np.where(ends >= t0, 1, -1)[:, None]
    first, last = signs * t0[:, None], signs * ends[:, None]
    slacks = slack * np.maximum(np.abs(t0), np.abs(ends))[:, None]
    ahead = signs * rows
    within = np.minimum(np.maximum(ahead, first), last)
    good = np.isfinite(rows) & (first - slacks <= ahead) & (ahead <= last + slacks)
    for i in np.flatnonzero(~good.all(1) | (np.diff(within) < 0).any(1)).tolist():
        _within(rows[i].tolist(), float(t0[i]), None if t1 is None else float(t1[i]), slack, f" of sample {i}")
    return signs * within


def _as_tensor(at: Any, numbers: Any, x: Tensor) -> Tensor:
    if isinstance(at, Tensor) and at.is_floating_point():
        return (at if torch.is_grad_enabled() else at.detach()).to(x.device)
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device=x.device)
    return exact(numbers, x.device)


def _numbers(at: Any) -> list[float] | Array:
    """The times as a list of numbers, or as an array of more dimensions, or of none.

    Raises:
        TypeError: they are no real numbers.
    """
    if isinstance(at, (list, tuple)) and all(type(time) is float for time in at):
        return list(at)
    if torch.compiler.is_compiling():
        raise ValueError(f"at must be a list of floats under torch.compile, got {type(at).__name__}: call .tolist()")
    if isinstance(at, Tensor):
        if is_mapped(at):
            raise ValueError("at must not be mapped by torch.vmap: control='sample' takes (B, n), times of each sample")
        if at.is_complex() or at.dtype == torch.bool:
            raise TypeError(f"at must hold real numbers, got {at.dtype}")
        values: Any = np.array(to_host(at), dtype=np.float64)
        values = values.reshape(at.shape)
    elif isinstance(at, Real) or not isinstance(at, Sequence | Array) or isinstance(at, str | bytes):
        raise TypeError(f"at must be a tensor, an array or a list of times, got {type(at).__name__}")
    else:
        try:
            values = np.asarray(at)
        except ValueError:
            raise ValueError("at must have equally many times for every sample: repeat the last") from None
        if values.dtype.kind not in "iuf" and values.size:
            raise TypeError(f"at must hold real numbers, got {values.dtype}")
        values = values.astype(np.float64)
    return values.tolist() if values.ndim == 1 else values


def _within(times: Sequence[float], t0: float, t1: float | None, slack: float, whose: str = "") -> list[float]:
    """The times within ``[t0, t1]``, in the direction of the solve."""
    for i, time in enumerate(times):
        if not math.isfinite(time):
            raise ValueError(f"at{whose} must be finite, got {time} at index {i}: {_FEWER}")
    end = times[-1] if t1 is None else t1
    inside: list[float] = []
    direction, slack, last = 1 if end >= t0 else -1, slack * max(abs(t0), abs(end)), t0
    for i, time in enumerate(times):
        outside = not direction * t0 - slack <= direction * time <= direction * end + slack
        if outside and t1 is not None:
            raise ValueError(f"at{whose} must lie between t0 = {t0:g} and t1 = {t1:g}, got {time:.9g} at index {i}")
        inner = t0 if direction * time < direction * t0 else end if direction * time > direction * end else time
        if outside or direction * inner < direction * last:
            raise ValueError(
                f"at{whose} must run from t0 = {t0:g} to {end:g} without turning back, got {time:.9g} behind {last:.9g}"
                f" at index {i}: {_FEWER}"
            )
        last = inner
        inside.append(inner)
    return inside


def _check_gradient(gradient: str, t0: Any, t1: Any) -> None:
    if gradient != "direct":
        raise ValueError(
            f"at must not require a gradient with gradient={gradient!r}, which loses it: detach it, or use 'direct'"
        )
    if np.any(t0 == t1):
        raise ValueError("at must not require a gradient where t0 = t1, which loses it: detach it")
