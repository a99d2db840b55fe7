"""Loops over the operands of a step in blocks that stay in the first-level cache, compiled by Numba for a CPU.

Numba brings its own code generator, and what it has compiled is kept on disk. A loop is handed one row of integers:
the addresses of the operands and what is asked (:class:`At`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic

from solvers.kernels.threads import FUNCTION, TASKS, next_share

__all__ = ["SEGMENT", "loop"]

BLOCK = 1 << 7  # numbers at a time: blocks of all operands and temporaries share the first-level cache, few to a set
ALONE = 1 << 11  # and where nothing but sums of powers is asked, which have no temporaries
SEGMENT = 1 << 15  # numbers per task

# Where a loop finds what it is given: first the tasks, then addresses (0 for what is not there) and what is asked,
# then the address of each stage and, for the backward loop, of each stage's gradient.
X0, OUT, TO_X0, SUMS, SIZES, SIZE = 3, 4, 5, 6, 7, 8  # of x0, x1 or its gradient, ..., sums or pulls, h; or h itself
VALUES = 9  # of the errors, actions, mean squares and cosines of the samples
FEATURES, COUNT, B, E, SCALE = 13, 14, 15, 16, 17  # numbers per row and stages; of weights, error weights, (atol, rtol)
POWER, ERROR, ACTION, RESIDUE = 18, 19, 20, 21
STAGES = 22


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
def _size(given, row, like):
    """The step size of a sample, one of many or the same for all."""
    one = np.empty(1, like.dtype)
    one[0] = (
        given[SIZE : SIZE + 1].view(np.float64)[0] if given[SIZES] == 0 else _view(given[SIZES], like, row + 1)[row]
    )
    return one[0]


@numba.njit
def _sign(x, zero, one):
    return (one if x > zero else zero) - (one if x < zero else zero)


@_compiled
def _squares(p, zero):
    """Sum of the squares."""
    a = zero
    for j in range(len(p)):
        a += p[j] * p[j]
    return a


@_compiled
def _squares_and_sum(p, zero):
    """Sum of the squares, and sum."""
    a = t = zero
    for j in range(len(p)):
        a += p[j] * p[j]
        t += p[j]
    return a, t


@_compiled
def _forward(given, like, first, last):
    """Sums of each task: ``(h eps / s)^2``, ``sum_i b_i |p_i|^power``, ``r^2`` and r; addresses of x0, x1 may be 0."""
    x0, x1, features, power = given[X0], given[OUT], given[FEATURES], given[POWER]
    wants_error, wants_action, wants_residue = given[ERROR] != 0, given[ACTION] != 0, given[RESIDUE] != 0
    count, scale = given[COUNT], _view(given[SCALE], like, 2)
    stages, b, e = given[STAGES:], _view(given[B], like, count), _view(given[E], like, count)
    alone = wants_residue and count == 1 and x0 == 0 and not wants_error and not wants_action
    wants_r = x1 != 0 or x0 != 0 or (wants_residue and not alone)
    atol, rtol, bytes_each = scale[0], scale[1], like.itemsize
    r, d, sums = _scratch(like), _scratch(like), _view(given[SUMS], np.empty(0), 4 * last)
    segments = (features + SEGMENT - 1) // SEGMENT
    zero = r[0]
    block = BLOCK if wants_r or wants_error else ALONE
    for task in range(first, last):
        row, begin = task // segments, (task % segments) * SEGMENT
        end, size = min(begin + SEGMENT, features), _size(given, row, like)
        total_e = total_a = total_s = total_t = 0.0
        for start in range(begin, end, block):
            m = min(block, end - start)
            offset = (row * features + start) * bytes_each
            if wants_r:
                r[:m] = zero
            if wants_error:
                d[:m] = zero
            for k in range(0 if alone else count):
                w, v = b[k], e[k]
                if w == 0 and (v == 0 or not wants_error):
                    continue
                p = _view(stages[k] + offset, like, m)
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
                        a = _squares(p, zero)
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
                a, t = _squares_and_sum(_view(stages[0] + offset, like, m), zero)
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
                x = _view(x0 + offset, like, m)
                if wants_error and rtol != 0:
                    for j in range(m):
                        high, low = abs(x[j] + size * r[j]), abs(x[j])
                        q = size * d[j] / (atol + rtol * (low if low > high else high))
                        a += q * q
                if x1 != 0:
                    out = _view(x1 + offset, like, m)
                    for j in range(m):
                        out[j] = x[j] + size * r[j]
            total_e += a
        sums[4 * task], sums[4 * task + 1], sums[4 * task + 2], sums[4 * task + 3] = total_e, total_a, total_s, total_t


@_compiled
def _backward(given, like, first, last):
    """Gradients of x0 and the stages, at addresses that may be 0 where none is needed.

    With the pulls E, A, R and T of a sample, ``s`` the scale of the error and ``q = h eps / s``,
    ``g1 = grad - E q^2/s ds/dx1``, ``u = h g1 + R r + T``: ``g_x0 = g1 - E q^2/s ds/dx0``, and
    ``g_p = b u + e E q h/s + A b |p|^(power-1) sign(p)``.
    """
    x0, grad, grad_x0, features = given[X0], given[OUT], given[TO_X0], given[FEATURES]
    wants_error, wants_action, wants_residue = given[ERROR] != 0, given[ACTION] != 0, given[RESIDUE] != 0
    count, scale, power = given[COUNT], _view(given[SCALE], like, 2), given[POWER]
    stages, grads = given[STAGES:], given[STAGES + count :]
    b, e = _view(given[B], like, count), _view(given[E], like, count)
    atol, rtol, bytes_each = scale[0], scale[1], like.itemsize
    scaled = wants_error and rtol != 0
    wants_r = wants_residue or scaled
    r, d, u, f = _scratch(like), _scratch(like), _scratch(like), _scratch(like)
    segments = (features + SEGMENT - 1) // SEGMENT
    zero, one = r[0], np.ones(1, like.dtype)[0]
    half = one / (one + one)
    for task in range(first, last):
        row, begin = task // segments, (task % segments) * SEGMENT
        end, size = min(begin + SEGMENT, features), _size(given, row, like)
        pulls = _view(given[SUMS] + 4 * row * bytes_each, like, 4)
        pull_e, pull_a, pull_r, pull_t = pulls[0], pulls[1], pulls[2], pulls[3]
        for start in range(begin, end, BLOCK):
            m = min(BLOCK, end - start)
            offset = (row * features + start) * bytes_each
            if wants_r:
                r[:m] = zero
            if wants_error:
                d[:m] = zero
            for k in range(count if wants_r or wants_error else 0):
                if wants_r and b[k] != 0:
                    p = _view(stages[k] + offset, like, m)
                    for j in range(m):
                        r[j] += b[k] * p[j]
                if wants_error and e[k] != 0:
                    p = _view(stages[k] + offset, like, m)
                    for j in range(m):
                        d[j] += e[k] * p[j]
            if not scaled and not wants_residue and grad_x0 == 0:  # most often: one loop
                if grad != 0:
                    g = _view(grad + offset, like, m)
                    for j in range(m):
                        u[j] = size * g[j]
            else:
                if grad != 0:
                    g = _view(grad + offset, like, m)
                    for j in range(m):
                        u[j] = g[j]
                else:
                    u[:m] = zero
                if scaled:
                    x = _view(x0 + offset, like, m)
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
                    out, source = _view(grad_x0 + offset, like, m), f if scaled else u
                    for j in range(m):
                        out[j] = source[j]
                if wants_residue:
                    for j in range(m):
                        u[j] = size * u[j] + pull_r * r[j] + pull_t
                else:
                    for j in range(m):
                        u[j] *= size
            factor = one if scaled else pull_e * (size / atol) * (size / atol)
            for k in range(count):
                if grads[k] == 0:
                    continue
                out = _view(grads[k] + offset, like, m)
                p = _view(stages[k] + offset, like, m)
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
def _values(given, like):
    """The values of each sample from the sums of its tasks."""
    features, tasks = given[FEATURES], given[TASKS]
    segments = (features + SEGMENT - 1) // SEGMENT
    rows, sums = tasks // segments, _view(given[SUMS], np.empty(0), 4 * tasks)
    errors, actions, squares, cosines = given[VALUES], given[VALUES + 1], given[VALUES + 2], given[VALUES + 3]
    size = _size(given, 0, like)
    for row in range(rows):
        e = a = s = t = 0.0
        for i in range(4 * row * segments, 4 * (row + 1) * segments, 4):
            e, a, s, t = e + sums[i], a + sums[i + 1], s + sums[i + 2], t + sums[i + 3]
        if errors != 0:
            _view(errors, like, rows)[row] = math.sqrt(e / features)
        if actions != 0:
            size = size if given[SIZES] == 0 else _size(given, row, like)
            _view(actions, like, rows)[row] = a / features * size
        if squares != 0:
            _view(squares, like, rows)[row] = s / features
            _view(cosines, like, rows)[row] = 0.0 if s == 0 else t / math.sqrt(s) / math.sqrt(features)


@_compiled
def _forward_shares(given, like):
    while True:
        first, last = next_share(given)
        if first >= last:
            return
        _forward(given, like, first, last)


@_compiled
def _backward_shares(given, like):
    while True:
        first, last = next_share(given)
        if first >= last:
            return
        _backward(given, like, first, last)


@numba.njit
def _given(at):
    given = carray(at, (STAGES,))
    return carray(at, (STAGES + 2 * given[COUNT],))


def _forward_single(at):
    _forward_shares(_given(at), np.empty(0, np.float32))


def _forward_double(at):
    _forward_shares(_given(at), np.empty(0, np.float64))


def _backward_single(at):
    _backward_shares(_given(at), np.empty(0, np.float32))


def _backward_double(at):
    _backward_shares(_given(at), np.empty(0, np.float64))


def _values_single(at):
    _values(_given(at), np.empty(0, np.float32))


def _values_double(at):
    _values(_given(at), np.empty(0, np.float64))


LOOPS = {
    ("forward", torch.float32): _forward_single,
    ("forward", torch.float64): _forward_double,
    ("values", torch.float32): _values_single,
    ("values", torch.float64): _values_double,
    ("backward", torch.float32): _backward_single,
    ("backward", torch.float64): _backward_double,
}


@functools.cache
def loop(name: str, dtype: torch.dtype) -> Any:
    """The loop "forward", "values" or "backward" as a function of C that takes what it is given by address."""
    function, signature = LOOPS[name, dtype], types.void(types.CPointer(types.int64))
    try:
        found = numba.cfunc(signature, cache=True)(function)
    except RuntimeError:  # no directory to keep compiled code in
        found = numba.cfunc(signature)(function)
    address: Any = found.address
    as_function: Any = FUNCTION(address)
    as_function.compiled = found  # lives as long
    return as_function
