"""The reductions as plain expressions of torch: the mathematics, and what serves where no kernel does.

A compiler fuses them; the transforms of ``torch.func``, forward-mode and higher derivatives go through them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.validation import real_dtype

__all__ = [
    "HALF",
    "ReductionSpec",
    "Reductions",
    "combination",
    "finish_step",
    "row_moments",
    "rows_of",
    "weighted_combination",
    "wide",
    "wide_dtype",
]  # fmt: skip

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionSpec:
    """What is computed from the stages ``p_i`` of a step of size h from x0, with ``r = sum_i b_i p_i``.

    Attributes:
        b: weights of the solution, one per stage; a stage of weight 0 is not read for what is made of r. A tensor
            ``(stages,)``, as e may be too, where they get gradients: no operator takes it.
        e: weights of the embedded error, one per stage.
        rtol, atol: what the error is divided by, ``s = atol + rtol * max(|x0|, |x1|)``; 0 and 1 leave it as it is.
        state: the state ``x1 = x0 + h r``, in the dtype of the stages.
        error: ``<(h sum_i e_i p_i / s)^2>``.
        action: ``h sum_i b_i <p_i^2>``.
        residue: ``<r^2>`` and ``<r>``.
    """

    b: tuple[float, ...]
    e: tuple[float, ...]
    rtol: float = 0.0
    atol: float = 1.0
    state: bool = False
    error: bool = False
    action: bool = False
    residue: bool = False

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The fields in their order, as an operator takes them."""
        return self.b, self.e, self.rtol, self.atol, self.state, self.error, self.action, self.residue

    @classmethod
    def of(cls, numbers: Sequence[Any]) -> ReductionSpec:
        """From :attr:`numbers`."""
        b, e, rtol, atol, state, error, action, residue = numbers
        return cls(
            b=tuple(b), e=tuple(e), rtol=rtol, atol=atol, state=state, error=error, action=action, residue=residue
        )

    @property
    def computed(self) -> tuple[bool, ...]:
        """Which of :attr:`Reductions.values` are computed."""
        return self.state, self.error, self.action, self.residue, self.residue

    @property
    def scaled(self) -> bool:
        """Whether the error is scaled by the states, so that x0 is read."""
        return self.error and self.rtol != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reductions:
    """The state ``(B, *S)`` and values ``(B,)`` in float32 or wider; None for what the specification leaves out."""

    x1: Tensor | None = None
    error: Tensor | None = None
    action: Tensor | None = None
    square: Tensor | None = None
    mean: Tensor | None = None

    @property
    def values(self) -> tuple[Tensor | None, ...]:
        """The fields in their order, as an operator returns them."""
        return self.x1, self.error, self.action, self.square, self.mean

    @classmethod
    def of(cls, values: Iterable[Tensor | None]) -> Reductions:
        """From :attr:`values`."""
        x1, error, action, square, mean = values
        return cls(x1=x1, error=error, action=action, square=square, mean=mean)


def finish_step(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec) -> Reductions:
    """The end of a step of size h, a number or ``(B,)``; x0 is read for the state and for a scaled error."""
    p = stages[0]
    size = h.reshape(-1, *[1] * (p.ndim - 1)) if isinstance(h, Tensor) else h
    x1 = error = action = square = mean = start = end = None
    if x0 is not None and (spec.state or spec.scaled):
        start = x0.float() if x0.dtype in HALF else x0
        end = (weighted_combination if isinstance(spec.b, Tensor) else combination)(start, stages, spec.b, size)  # type: ignore[arg-type] - by its kind
        x1 = end.to(x0.dtype) if spec.state else None
    if spec.error:
        scaled = _weighted(stages, spec.e) * size
        if start is not None and end is not None and spec.scaled:
            scaled = scaled / (spec.atol + spec.rtol * torch.maximum(start.abs(), end.abs()))
        elif spec.atol != 1:
            scaled = scaled / spec.atol
        error = _mean_power(scaled, 2)
    if spec.action:
        learned = isinstance(spec.b, Tensor)
        powers = (_mean_power(wide(q), 2) * b for q, b in zip(stages, spec.b, strict=True) if learned or b)
        action = h * sum(powers, start=torch.zeros((), device=p.device))
    if spec.residue:
        square, mean = row_moments(stages, spec.b, 2, True)
    return Reductions(x1=x1, error=error, action=action, square=square, mean=mean)


def row_moments(
    rows: Sequence[Tensor], weights: Sequence[float] | Tensor, power: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """``<|r|^power>`` and, with ``mean``, ``<r>`` of ``r = sum_i w_i x_i``, each ``(B,)``; weights 0 are skipped."""
    r = _weighted(rows, weights)
    return _mean_power(r, power), _mean(r) if mean else None


def combination(x: Tensor, stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``x + h sum_i w_i p_i`` in the dtype of x, one operation per weight that is not 0, in float32 or wider.

    There may be more ``stages`` than ``weights``, or fewer; h is a number or broadcasts against x. This is
    :func:`~solvers.combine` without its kernels.
    """
    if x.dtype in HALF:
        return combination(x.float(), stages, weights, h).to(x.dtype)
    for p, weight in zip(stages, weights):  # noqa: B905 - torch 2.8's compiler takes strict=False for True
        if weight:
            if isinstance(h, Tensor):
                x = torch.addcmul(x, p.float() if p.dtype in HALF else p, h, value=weight).to(x.dtype)
            else:
                x = torch.add(x, p, alpha=h * weight)
    return x


def weighted_combination(x: Tensor, stages: Sequence[Tensor], weights: Tensor, h: float | Tensor) -> Tensor:
    """:func:`combination` with weights ``(stages,)`` that get gradients, so that none is skipped."""
    return (wide(x) + h * _weighted(stages[: len(weights)], weights)).to(x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are accumulated and returned."""
    return torch.promote_types(real_dtype(x), torch.float32)


def rows_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, ``(B, *S)`` each, so laid out that sample b of all is one run of memory in the same order.

    They are as given if they lie so: contiguous, or all of them channels-last; copies otherwise.
    """
    ndim = tensors[0].ndim
    if all(x.is_contiguous() for x in tensors):
        return list(tensors)
    if ndim in (4, 5):
        last = torch.channels_last if ndim == 4 else torch.channels_last_3d
        if all(x.is_contiguous(memory_format=last) for x in tensors):
            return list(tensors)
    return [x.contiguous() for x in tensors]


def wide(x: Tensor) -> Tensor:
    """A tensor in float32 or wider."""
    return x.float() if x.dtype in HALF else x


def _weighted(rows: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """``sum_i w_i x_i`` over the weights that are not 0, in float32 or wider; over all where they are a tensor."""
    if isinstance(weights, Tensor):  # whose entries, without dimensions, leave the dtype as it is
        return functools.reduce(torch.add, [wide(x) * w for x, w in zip(rows, weights.unbind(), strict=True)])
    (x, weight), *rest = [(wide(x), w) for x, w in zip(rows, weights, strict=True) if w != 0]
    total = x if weight == 1 else x * weight
    for x, weight in rest:
        total = torch.add(total, x, alpha=weight)
    return total


def _mean(x: Tensor) -> Tensor:
    return x.sum(tuple(range(1, x.ndim))) / math.prod(x.shape[1:])


def _mean_power(x: Tensor, p: float) -> Tensor:
    """``<|x|^p>`` of real or complex numbers."""
    if p == 2:
        return _mean(x.real.square() + x.imag.square() if x.is_complex() else x.square())
    return _mean(x.abs() if p == 1 else x.abs().pow(p))
