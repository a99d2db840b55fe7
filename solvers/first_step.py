"""The size of the first step (Hairer, Norsett, Wanner, II.4), for a batch as a whole or for each of its samples."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field, check_unchanged, velocity, versions_of
from solvers.tolerance import Tolerance
from solvers.validation import in_state_shape, real_dtype, to_state_shape

__all__ = ["first_step"]

# The operations of the formula, on arrays and on numbers, for which NumPy takes as long as the solve of a small field.
_ARRAYS: Any = (np.where, np.minimum, np.maximum, np.float_power, np.isfinite)
_NUMBERS: Any = (lambda good, a, b: a if good else b, min, max, pow, math.isfinite)
_TENSORS: Any = (
    torch.where,
    lambda a, b: torch.where(a < b, a, b),
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: a**b,
    torch.isfinite,
)


def first_step(
    field: Field, t: Any, x: Tensor, first: Tensor, direction: Any, order: int, span: Any, tolerance: Tolerance
) -> Any:
    """Step size to attempt first, a number, or ``(B,)`` numbers per sample; NaN where the field is not finite.

    One field evaluation, with gradients as the solve has them, and three waits for the device; in a graph, where t is a
    tensor, none.

    Args:
        field: velocity ``v(t, x)``.
        t: where the solve begins, a number, or ``(B,)`` numbers for a step per sample; or a tensor of these, float64,
            as the result is then.
        x: state there, ``(B, *S)``.
        first: the velocity there.
        direction: 1 or -1, of time, in the kind of t.
        order: order q of the lower solution.
        span: how far the solve goes, likewise; the field is not evaluated beyond.
        tolerance: what the error is divided by.

    Raises:
        ValueError: the field writes where it must not.
    """
    graph, version, slope = isinstance(t, Tensor), versions_of([first]), first.detach()
    each = isinstance(t, np.ndarray) or (graph and t.ndim > 0)
    where, least, most, power, isfinite = _TENSORS if graph else _ARRAYS if each else _NUMBERS
    real = torch.promote_types(real_dtype(x), torch.float32)
    scale = x.detach().abs().to(real).mul_(tolerance.rtol).add_(tolerance.atol)

    size = partial(tolerance.size_in_graph if graph else tolerance.size_over, scale=scale, each=each)
    d0, d1 = size(x.detach()), size(slope)
    finite = isfinite(d0 + d1)
    if not graph and not (finite.any() if each else finite):
        return where(finite, d0, math.nan)
    with np.errstate(all="ignore") if each and not graph else nullcontext():
        h0 = where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / most(d1, 1e-5))
        h0 = where(finite, least(h0, span * (1 - 1e-15)), 0.0)
        h: Any = direction * h0
        if graph or each:
            shaped: Any = in_state_shape if graph else to_state_shape
            start, h = shaped(t, x), shaped(h, x)
            second = velocity(field, start + h, torch.addcmul(x, slope, h.to(x.real.dtype)).to(x.dtype))
        else:
            second = velocity(field, t + h, torch.add(x, slope, alpha=h))
        check_unchanged([first], version)
        change = size(second.detach() - slope)
        bend = most(where(h0 > 0, change / where(h0 > 0, h0, 1.0), 0.0), d1)
        h1 = power(0.01 / most(bend, 1e-15), 1 / (order + 1))
        h1 = least(100 * h0, where(bend <= 1e-15, most(1e-6, h0 * 1e-3), h1))
        # where the field is not defined so far, the error control finds how far it is
        return where(finite, where(isfinite(bend), h1, h0), math.nan)
