"""Events: where a function of time and state changes sign, and the gradient of that time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers.methods import get_tableau
from solvers.states import real_dtype
from solvers.step import Field, Step, rk_step

__all__ = ["Event", "crossing", "crossings", "link", "until"]

Event = Callable[[Any, Tensor], Tensor]


def until(entries: Event, t: Any, x: Tensor, *, each: bool = False) -> Event:
    """``entries`` as a function that is positive until the first of its entries changes sign.

    Args:
        entries: ``(t, x)`` to a tensor.
        t, x: where the solve begins.
        each: the entries of each sample, ``(B, ...)``, have a sign of their own, and the function is ``(B,)``; else it
            is a scalar. An entry that is 0 at the start has its event there.
    """

    def rows(s: Any, x: Tensor) -> Tensor:
        found = torch.as_tensor(entries(s, x))
        return found.reshape(len(x), -1) if each else found.reshape(-1)

    with torch.no_grad():
        signs = rows(t, x).sign()
    if not each and bool((signs == 0).any()):
        return lambda s, x: rows(s, x).abs().min()
    return lambda s, x: (rows(s, x) * signs).amin(-1)


def crossing(step: Step, inside: Callable[[Any], Tensor], event: Event, width: float) -> float:
    """Where in the step, as a fraction of it, a scalar event function leaves the positive; to ``width`` in time."""
    low, high = 0.0, 1.0
    for _ in range(_halvings(abs(float(step.h)), width)):
        middle = (low + high) / 2
        if float(event(step.t + middle * step.h, inside(middle))) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def crossings(step: Step, inside: Callable[[Any], Tensor], event: Event, width: float) -> Tensor:
    """:func:`crossing` for each sample of a step with a size per sample, in the shape of ``step.h``."""
    assert isinstance(step.h, Tensor)
    low, high = torch.zeros_like(step.h), torch.ones_like(step.h)
    for _ in range(_halvings(float(step.h.abs().max()), width)):
        middle = (low + high) / 2
        positive = (event(step.t + middle * step.h, inside(middle)) > 0).reshape(low.shape)
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    return (low + high) / 2


def _halvings(h: float, width: float) -> int:
    return max(1, min(60, math.ceil(math.log2(h / max(width, 1e-15)))))


def link(field: Field, event: Event, s: Tensor, x: Tensor, met: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Time and state of the event with the gradients of the implicit function ``event(t, x(t)) = 0``.

    Newton steps from the event found, which change no value: the event function is constant along the solution it
    defines, so ``t - event / (d event / dt)`` has the derivatives of t. A second step makes those of second order
    right.

    Args:
        field: velocity ``v(t, x)``.
        event: ``(t, x)`` to a scalar, or ``(B,)`` where s is a time per sample.
        s: the time, float64, of a shape that broadcasts against the state.
        x: the state there.
        met: the samples that met the event, ``(B,)`` on the device; the others stay as they are. All if not given.
    """
    if not torch.is_grad_enabled():
        return s, x
    if not (x.requires_grad or s.requires_grad or event(s, x).requires_grad):  # what the event itself depends on
        return s, x
    for method in ("midpoint", "euler"):
        velocity = field(s, x)
        at = s if s.requires_grad else s.detach().requires_grad_()
        where = x if x.requires_grad else x.detach().requires_grad_()
        value = event(at, where)
        slope_t, slope_x = torch.autograd.grad(value.sum(), (at, where), create_graph=True, allow_unused=True)
        rate = torch.zeros_like(value) if slope_t is None else slope_t.reshape(value.shape).to(value.dtype)
        if slope_x is not None:
            product = (slope_x.conj() * velocity).real if x.is_complex() else slope_x * velocity
            rate = rate + (product.sum() if value.ndim == 0 else product.flatten(1).sum(1))
        fall = value.detach() - value
        if met is not None:
            fall, rate = fall * met, torch.where(met, rate, 1.0)
        moved = (fall / rate).reshape(s.shape)
        x = rk_step(field, s, x, moved.to(real_dtype(x)), get_tableau(method), velocity, closing=False).x1
        s = s + moved
    return s, x
