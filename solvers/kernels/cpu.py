"""The finish of a step on a CPU: what :mod:`solvers.kernels.loops` finds, on the threads that torch uses.

Loaded only where Numba is installed (``pip install odenets[cpu]``). A row is cut into segments of a fixed size, whose
sums are added in order: the result is the same however many threads share them.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.kernels import loops
from solvers.kernels.contract import Asked, Finish, rows_of
from solvers.kernels.threads import share

__all__ = ["backward", "forward", "serves"]

SHORT = 1 << 6  # numbers of a row below which torch's own operations are faster


def serves(stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> bool:
    """Whether these kernels know the dtype and the power, and rows are long enough for loops over them.

    Where nothing is summed and all have one step size, everything is one row.
    """
    p = stages[0]
    if p.dtype not in (torch.float32, torch.float64) or asked.power not in (1, 2, 3):
        return False
    return p.numel() >= SHORT * p.shape[0] or _one_row(h, asked)


def _one_row(h: float | Tensor, asked: Asked) -> bool:
    return not (isinstance(h, Tensor) or asked.error or asked.action or asked.residue)


def forward(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """What :func:`solvers.kernels.aten.expression` finds."""
    operands = rows_of([*stages, *([] if x0 is None else [x0])])
    first, (batch, n) = operands[0], _rows(operands[0], h, asked)
    tasks = batch * -(-n // loops.SEGMENT)
    x1, sums = torch.empty_like(first) if asked.state else None, torch.empty(4 * tasks, dtype=torch.float64)
    wants = (asked.error, asked.action, asked.residue, asked.residue)
    values = [first.new_empty(batch) if want else None for want in wants]
    sizes = _sizes(h, first)  # like the operands kept until all is done: loops see addresses
    kept = (None if x0 is None else operands[-1], x1, None, sums, sizes)
    given = _given(asked, h, n, kept, values, operands[: len(stages)])
    share(loops.loop("forward", first.dtype), given, tasks, len(operands) * first.nbytes)
    if any(wants):
        loops.loop("values", first.dtype)(given.buffer_info()[0])
    return Finish(x1, *values)


def backward(
    x0: Tensor | None,
    stages: Sequence[Tensor],
    h: float | Tensor,
    asked: Asked,
    grads: Finish,
    values: Finish,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients as :func:`solvers.kernels.aten.backward` finds them, from the values found by :func:`forward` too."""
    asked = asked._replace(
        error=grads.error is not None,
        action=grads.action is not None,
        residue=grads.square is not None or grads.cosine is not None,
    )
    x0 = x0 if asked.scaled else None
    operands = rows_of([*stages, *(x for x in (x0, grads.x1) if x is not None)])
    first, (batch, n) = operands[0], _rows(operands[0], h, asked)
    pulls = torch.from_numpy(_pulls(batch, n, h, asked, grads, values)).to(first.dtype)
    found = [torch.empty_like(first) if need else None for need in needs]
    sizes = _sizes(h, first)
    start, grad = None if x0 is None else operands[len(stages)], None if grads.x1 is None else operands[-1]
    kept = (start, grad, found[0], pulls, sizes)
    given = _given(asked, h, n, kept, (None,) * 4, operands[: len(stages)], found[1:])
    share(loops.loop("backward", first.dtype), given, batch * -(-n // loops.SEGMENT), len(operands) * first.nbytes)
    return found


def _rows(x: Tensor, h: float | Tensor, asked: Asked) -> tuple[int, int]:
    rows = 1 if _one_row(h, asked) else x.shape[0]
    return rows, x.numel() // rows


def _sizes(h: float | Tensor, x: Tensor) -> Tensor | None:
    """The step sizes of the samples in a row, in the dtype of x, where they are many."""
    return h.to(x.dtype).contiguous() if isinstance(h, Tensor) else None


def _given(
    asked: Asked,
    h: float | Tensor,
    features: int,
    tensors: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    stages: Sequence[Tensor],
    gradients: Sequence[Tensor | None] = (),
) -> array[int]:
    """What a loop is given, in the order of :mod:`solvers.kernels.loops`."""
    bits = 0 if isinstance(h, Tensor) else struct.unpack("=q", struct.pack("=d", h))[0]
    numbers = _weights(asked, stages[0].dtype).numbers
    addresses = [[0 if x is None else x.data_ptr() for x in given] for given in (tensors, values, stages, gradients)]
    return array("q", (0, 0, 0, *addresses[0], bits, *addresses[1], features, *numbers, *addresses[2], *addresses[3]))


class _Weights(NamedTuple):
    """What loops are given of what is asked, and the arrays whose addresses are in it."""

    numbers: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]


@functools.lru_cache(maxsize=256)
def _weights(asked: Asked, dtype: torch.dtype) -> _Weights:
    error = asked.e if asked.error else (0.0,) * len(asked.b)
    arrays = tuple(np.array(numbers, _kind(dtype)) for numbers in (asked.b, error, (asked.atol, asked.rtol)))
    wants = (int(asked.power), int(asked.error), int(asked.action), int(asked.residue))
    return _Weights((len(asked.b), *(each.ctypes.data for each in arrays), *wants), arrays)


def _kind(dtype: torch.dtype) -> type:
    return np.float32 if dtype == torch.float32 else np.float64


def _pulls(batch: int, n: int, h: float | Tensor, asked: Asked, grads: Finish, values: Finish) -> np.ndarray:
    """The factors E, A, R and T of the backward loop, ``(B, 4)``."""
    pulls = np.zeros((batch, 4))
    if grads.error is not None:
        rms = _array(values.error)
        pulls[:, 0] = np.where(rms == 0, 0, _array(grads.error)) / np.where(rms == 0, 1, rms * n)
    if grads.action is not None:
        pulls[:, 1] = _array(grads.action) * (_array(h) if isinstance(h, Tensor) else h) * (asked.power / n)
    if grads.square is not None:
        pulls[:, 2] = _array(grads.square) * (2 / n)
    if grads.cosine is not None:
        square = _array(values.square)
        slope = np.where(square == 0, 0, _array(grads.cosine)) / np.where(square == 0, 1, square * n)
        pulls[:, 2] -= slope * _array(values.cosine)
        pulls[:, 3] = slope * np.sqrt(square)
    return pulls


def _array(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().numpy().astype(np.float64)
