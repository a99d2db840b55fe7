"""What a kernel is asked for and what it returns: the contract between the operator and its kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from solvers.validation import real_dtype

__all__ = ["Asked", "Finish", "rows_of", "wide_dtype"]


class Asked(NamedTuple):
    """What is wanted of the stages ``p_i`` of a step of size h from x0, with ``r = sum_i b_i p_i``.

    Attributes:
        b: weights of the solution, one per stage; a stage of weight 0 is not read for what is made of r.
        e: weights of the embedded error, one per stage, or none.
        rtol, atol: what the error is divided by, ``atol + rtol * max(|x0|, |x1|)``; 0 and 1 leave it as it is.
        power: the exponent of the action.
        state: the state ``x1 = x0 + h r``, in the dtype of the stages.
        error: the root mean square of ``h sum_i e_i p_i`` over its scale.
        action: ``h sum_i b_i <|p_i|^power>``.
        residue: ``<r^2>``, and the cosine of r with the vector of ones, 0 where r = 0.
    """

    b: tuple[float, ...]
    e: tuple[float, ...] = ()
    rtol: float = 0.0
    atol: float = 1.0
    power: float = 2.0
    state: bool = False
    error: bool = False
    action: bool = False
    residue: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the error is scaled by the states, so that x0 is read."""
        return self.error and self.rtol != 0


class Finish(NamedTuple):
    """What was found: the state ``(B, *S)``, and values ``(B,)`` in float32 or wider; None for what was not asked."""

    x1: Tensor | None = None
    error: Tensor | None = None
    action: Tensor | None = None
    square: Tensor | None = None
    cosine: Tensor | None = None


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are accumulated and returned."""
    return torch.promote_types(real_dtype(x), torch.float32)


def rows_of(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, ``(B, *S)`` each, so laid out that sample b of all is one run of memory in the same order.

    They are as given if they lie so: contiguous, or all of them channels-last; copies otherwise.
    """
    ndim = tensors[0].ndim
    if all(x.is_contiguous() for x in tensors):
        return tensors
    if ndim in (4, 5):
        last = torch.channels_last if ndim == 4 else torch.channels_last_3d
        if all(x.is_contiguous(memory_format=last) for x in tensors):
            return tensors
    return [x.contiguous() for x in tensors]
