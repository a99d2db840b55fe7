"""The finish of a step on a CPU: loops over blocks that stay in the first-level cache, compiled by Numba.

Loaded only where Numba is installed (``pip install odenets[cpu]``); it brings its own code generator, and what it has
compiled is kept on disk. A row is cut into segments of a fixed size, whose sums are added in order: the result is the
same however many threads share them.
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic
from torch import Tensor

from solvers.kernels import aten
from solvers.kernels.contract import Asked, Finish, rows_of

__all__ = ["backward", "forward", "serves"]

BLOCK = 1 << 7  # numbers at a time: blocks of all operands and temporaries share the first-level cache, few to a set
ALONE = 1 << 11  # and where nothing but sums of powers is asked, which have no temporaries
SEGMENT = 1 << 15  # numbers per task
SHORT = 1 << 6  # numbers of a row below which torch's own operations are faster
PARALLEL = 1 << 27  # bytes read from which threads pay: they share the cores with torch's own, which wait by spinning
SHARES = 8  # shares of the tasks per thread


def serves(stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> bool:
    """Whether these kernels know the dtype and the power, and rows are long enough for loops over them.

    Where nothing is summed and all have one step size, everything is one row.
    """
    p = stages[0]
    if p.dtype not in (torch.float32, torch.float64) or asked.power not in (1, 2, 3):
        return False
    return p[0].numel() >= SHORT or _one_row(h, asked)


def _one_row(h: float | Tensor, asked: Asked) -> bool:
    return not (isinstance(h, Tensor) or asked.error or asked.action or asked.residue)


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no directory to keep compiled code in
        return numba.njit(**options)(function)


@intrinsic
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to numbers of the kind that the array ``like`` holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


_to_pointer: Any = _pointer


@numba.njit
def _view(address, like, count):
    """The numbers at an address."""
    return carray(_to_pointer(address, like), (count,))


@numba.njit
def _scratch(like):
    return np.zeros(BLOCK, like.dtype)


@numba.njit
def _size(h, number, row, like):
    """The step size of a sample: at an address if that is not 0, else a number."""
    one = np.empty(1, like.dtype)
    one[0] = number if h == 0 else _view(h, like, row + 1)[row]
    return one[0]


@numba.njit
def _sign(x, zero, one):
    return (one if x > zero else zero) - (one if x < zero else zero)


@_compiled
def _forward(x0, stages, b, e, scale, asked, h, h_number, x1, features, tasks, sums, power):
    """Sums of each task: ``(h eps / s)^2``, ``sum_i b_i |p_i|^power``, ``r^2`` and r; addresses of x0, x1 may be 0."""
    wants_error, wants_action, wants_residue = asked[0], asked[1], asked[2]
    alone = wants_residue and len(stages) == 1 and x0 == 0 and not wants_error and not wants_action
    wants_r = x1 != 0 or x0 != 0 or (wants_residue and not alone)
    atol, rtol, bytes_each = scale[0], scale[1], b.itemsize
    r, d = _scratch(b), _scratch(b)
    segments = (features + SEGMENT - 1) // SEGMENT
    zero = r[0]
    block = BLOCK if wants_r or wants_error else ALONE
    for task in range(tasks[0], tasks[1]):
        row, begin = task // segments, (task % segments) * SEGMENT
        end, size = min(begin + SEGMENT, features), _size(h, h_number, row, b)
        total_e = total_a = total_s = total_t = 0.0
        for start in range(begin, end, block):
            m = min(block, end - start)
            offset = (row * features + start) * bytes_each
            if wants_r:
                r[:m] = zero
            if wants_error:
                d[:m] = zero
            for k in range(0 if alone else len(stages)):
                w, v = b[k], e[k]
                if w == 0 and (v == 0 or not wants_error):
                    continue
                p = _view(stages[k] + offset, b, m)
                a = zero
                if w != 0 and wants_action and power != 2:
                    for j in range(m):
                        q = abs(p[j])
                        a += q if power == 1 else q * q * q
                    total_a += w * a
                    a = zero
                if w == 0:
                    for j in range(m):
                        d[j] += v * p[j]
                elif not wants_r and not (wants_error and v != 0):
                    if power == 2:
                        for j in range(m):
                            a += p[j] * p[j]
                elif not (wants_error and v != 0):
                    for j in range(m):
                        r[j] += w * p[j]
                        a += p[j] * p[j]
                elif not wants_r:
                    for j in range(m):
                        d[j] += v * p[j]
                        a += p[j] * p[j]
                else:
                    for j in range(m):
                        r[j] += w * p[j]
                        d[j] += v * p[j]
                        a += p[j] * p[j]
                if power == 2:
                    total_a += w * a
            a, t = zero, zero
            if alone:
                p = _view(stages[0] + offset, b, m)
                for j in range(m):
                    a += p[j] * p[j]
                    t += p[j]
                total_s += b[0] * b[0] * a
                total_t += b[0] * t
            elif wants_residue:
                for j in range(m):
                    a += r[j] * r[j]
                    t += r[j]
                total_s += a
                total_t += t
            a = zero
            if wants_error and rtol == 0:
                for j in range(m):
                    a += d[j] * d[j]
                a *= (size / atol) * (size / atol)
            if x0 != 0:
                x = _view(x0 + offset, b, m)
                if wants_error and rtol != 0:
                    for j in range(m):
                        high, low = abs(x[j] + size * r[j]), abs(x[j])
                        q = size * d[j] / (atol + rtol * (low if low > high else high))
                        a += q * q
                if x1 != 0:
                    out = _view(x1 + offset, b, m)
                    for j in range(m):
                        out[j] = x[j] + size * r[j]
            total_e += a
        sums[task, 0], sums[task, 1], sums[task, 2], sums[task, 3] = total_e, total_a, total_s, total_t


@_compiled
def _backward(x0, stages, b, e, scale, asked, h, h_number, grad, pulls, grad_x0, grads, features, tasks, power):
    """Gradients of x0 and the stages, at addresses that may be 0 where none is needed.

    With the pulls E, A, R and T of a sample, ``s`` the scale of the error and ``q = h eps / s``,
    ``g1 = grad - E q^2/s ds/dx1``, ``u = h g1 + R r + T``: ``g_x0 = g1 - E q^2/s ds/dx0``, and
    ``g_p = b u + e E q h/s + A b |p|^(power-1) sign(p)``.
    """
    wants_error, wants_action, wants_residue = asked[0], asked[1], asked[2]
    atol, rtol, bytes_each = scale[0], scale[1], b.itemsize
    scaled = wants_error and rtol != 0
    wants_r = wants_residue or scaled
    r, d, u, f = _scratch(b), _scratch(b), _scratch(b), _scratch(b)
    segments = (features + SEGMENT - 1) // SEGMENT
    zero, one = r[0], np.ones(1, b.dtype)[0]
    half = one / (one + one)
    for task in range(tasks[0], tasks[1]):
        row, begin = task // segments, (task % segments) * SEGMENT
        end, size = min(begin + SEGMENT, features), _size(h, h_number, row, b)
        pull_e, pull_a, pull_r, pull_t = pulls[row, 0], pulls[row, 1], pulls[row, 2], pulls[row, 3]
        for start in range(begin, end, BLOCK):
            m = min(BLOCK, end - start)
            offset = (row * features + start) * bytes_each
            if wants_r:
                r[:m] = zero
            if wants_error:
                d[:m] = zero
            for k in range(len(stages) if wants_r or wants_error else 0):
                if wants_r and b[k] != 0:
                    p = _view(stages[k] + offset, b, m)
                    for j in range(m):
                        r[j] += b[k] * p[j]
                if wants_error and e[k] != 0:
                    p = _view(stages[k] + offset, b, m)
                    for j in range(m):
                        d[j] += e[k] * p[j]
            if not scaled and not wants_residue and grad_x0 == 0:  # most often: one loop
                if grad != 0:
                    g = _view(grad + offset, b, m)
                    for j in range(m):
                        u[j] = size * g[j]
            else:
                if grad != 0:
                    g = _view(grad + offset, b, m)
                    for j in range(m):
                        u[j] = g[j]
                else:
                    u[:m] = zero
                if scaled:
                    x = _view(x0 + offset, b, m)
                    for j in range(m):
                        x1 = x[j] + size * r[j]
                        high, low = abs(x1), abs(x[j])
                        share = one if high > low else (half if high == low else zero)
                        s = atol + rtol * (low if low > high else high)
                        q = size * d[j] / s
                        back = pull_e * rtol * q * q / s
                        u[j] -= back * share * _sign(x1, zero, one)
                        d[j] = pull_e * q * size / s
                        f[j] = u[j] - back * (one - share) * _sign(x[j], zero, one)
                if grad_x0 != 0:
                    out, source = _view(grad_x0 + offset, b, m), f if scaled else u
                    for j in range(m):
                        out[j] = source[j]
                if wants_residue:
                    for j in range(m):
                        u[j] = size * u[j] + pull_r * r[j] + pull_t
                else:
                    for j in range(m):
                        u[j] *= size
            factor = one if scaled else pull_e * (size / atol) * (size / atol)
            for k in range(len(stages)):
                if grads[k] == 0:
                    continue
                out = _view(grads[k] + offset, b, m)
                p = _view(stages[k] + offset, b, m)
                w, v = b[k], (factor * e[k] if wants_error else zero)
                slope = pull_a * w
                if w == 0:
                    for j in range(m):
                        out[j] = v * d[j]
                elif not wants_action:
                    for j in range(m):
                        out[j] = w * u[j] + v * d[j]
                elif power == 2:
                    for j in range(m):
                        out[j] = w * u[j] + v * d[j] + slope * p[j]
                elif power == 1:
                    for j in range(m):
                        out[j] = w * u[j] + v * d[j] + slope * _sign(p[j], zero, one)
                else:
                    for j in range(m):
                        out[j] = w * u[j] + v * d[j] + slope * p[j] * abs(p[j])


@_compiled
def _values(sums, h, h_number, features, wanted, like):
    """The values of each sample from the sums of its tasks, at the addresses wanted: error, action, square, cosine."""
    segments = (features + SEGMENT - 1) // SEGMENT
    rows = len(sums) // segments
    for row in range(rows):
        e = a = s = t = 0.0
        for task in range(row * segments, (row + 1) * segments):
            e, a, s, t = e + sums[task, 0], a + sums[task, 1], s + sums[task, 2], t + sums[task, 3]
        if wanted[0] != 0:
            _view(wanted[0], like, rows)[row] = math.sqrt(e / features)
        if wanted[1] != 0:
            size = h_number if h == 0 else _view(h, like, rows)[row]
            _view(wanted[1], like, rows)[row] = a / features * size
        if wanted[2] != 0:
            _view(wanted[2], like, rows)[row] = s / features
            cosine = 0.0 if s == 0 else t / math.sqrt(s) / math.sqrt(features)
            _view(wanted[3], like, rows)[row] = cosine


def forward(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """What :func:`solvers.kernels.aten.expression` finds."""
    if asked == Asked(asked.b, asked.e, action=True) and torch.get_num_threads() > 1:
        return aten.sums_of_squares(stages, h, asked.b)  # what torch's own threads do as well
    operands = rows_of([*stages, *([] if x0 is None else [x0])])  # kept until all is done: kernels see addresses
    first, addresses = operands[0], _addresses(operands)
    batch, n = (1, first.numel()) if _one_row(h, asked) else (len(first), first[0].numel())
    x1 = torch.empty_like(first) if asked.state else None
    start, read = 0 if x0 is None else addresses[-1], addresses[: len(stages)]
    sizes, number = _steps(h, first)
    to, power, numbers = _address(x1), asked.power, _numbers(asked, first.dtype)
    sums = np.empty((batch * -(-n // SEGMENT), 4))

    def run(tasks: np.ndarray) -> None:
        _forward(start, read, *numbers, _address(sizes), number, to, n, tasks, sums, power)

    _share(run, len(sums), len(operands) * first.nbytes)
    wants = (asked.error, asked.action, asked.residue, asked.residue)
    values = [first.new_empty(batch) if want else None for want in wants]
    if any(wants):
        _values(sums, _address(sizes), number, n, _addresses(values), numbers[0])
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
    scaled = asked.scaled
    given = [x for x in (x0 if scaled else None, grads.x1) if x is not None]
    operands = rows_of([*stages, *given])  # kept until all is done: kernels see addresses
    first, addresses = operands[0], _addresses(operands)
    batch, n = (1, first.numel()) if _one_row(h, asked) else (len(first), first[0].numel())
    start, grad = addresses[len(stages)] if scaled else 0, addresses[-1] if grads.x1 is not None else 0
    sizes, number = _steps(h, first)
    pulls = _pulls(batch, n, number if sizes is None else sizes, asked, grads, values).astype(_kind(first.dtype))
    grad_x0 = torch.empty_like(first) if needs[0] else None
    found = [torch.empty_like(first) if need else None for need in needs[1:]]
    read, to_x0, to = addresses[: len(stages)], _address(grad_x0), _addresses(found)
    numbers, power = _numbers(asked, first.dtype), asked.power

    def run(tasks: np.ndarray) -> None:
        _backward(start, read, *numbers, _address(sizes), number, grad, pulls, to_x0, to, n, tasks, power)

    _share(run, batch * -(-n // SEGMENT), len(operands) * first.nbytes)
    return [grad_x0, *found]


def _pulls(batch: int, n: int, h: float | Tensor, asked: Asked, grads: Finish, values: Finish) -> np.ndarray:
    """The factors E, A, R and T of :func:`_backward`, ``(B, 4)``."""
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


def _kind(dtype: torch.dtype) -> type:
    return np.float32 if dtype == torch.float32 else np.float64


def _steps(h: float | Tensor, x: Tensor) -> tuple[Tensor | None, float]:
    """The step sizes in a row, in the dtype of x, or one number."""
    return (h.to(x.dtype).contiguous(), 0.0) if isinstance(h, Tensor) else (None, h)


@functools.lru_cache(maxsize=256)
def _numbers(asked: Asked, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """Weights, error weights and scale in the precision of the operands, and what is asked."""
    kind, error = _kind(dtype), asked.e if asked.error else (0.0,) * len(asked.b)
    wants = np.array((asked.error, asked.action, asked.residue))
    return np.array(asked.b, kind), np.array(error, kind), np.array((asked.atol, asked.rtol), kind), wants


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if x is None else x.data_ptr() for x in tensors], np.int64)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="odenets")


def _share(run: Callable[[np.ndarray], None], tasks: int, read: int) -> None:
    """Run the tasks on as many threads as torch uses, if they are worth it; one that is late takes fewer of them."""
    threads = min(torch.get_num_threads(), tasks) if read >= PARALLEL else 1
    if threads == 1:
        run(np.array((0, tasks)))
        return
    bounds = np.linspace(0, tasks, min(tasks, SHARES * threads) + 1).astype(np.int64)
    shares = deque(bounds[i : i + 2] for i in range(len(bounds) - 1))

    def work() -> None:
        while True:
            try:
                share = shares.popleft()
            except IndexError:
                return
            run(share)

    others = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():
            other.result()
