"""The reductions on a GPU: one Triton kernel forward, one backward.

A program takes a tile: several rows where they are short, one row or a part of a long one. Parts of a row leave their
sums to a second kernel, which adds them in order: nothing depends on what runs first, or on the size of the device.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from solvers.reductions.reference import Reductions, ReductionSpec, rows_of, wide_dtype

__all__ = ["finish_step", "finish_step_backward", "row_moments", "row_moments_backward"]

TILE = 1 << 10  # numbers of an operand that a program holds at a time
PART = 1 << 13  # numbers of a row from which it may be cut
PROGRAMS = 1 << 11  # programs wanted of a launch

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _power(p, power: tl.constexpr):
    if power == 2:
        return p * p
    if power == 1:
        return tl.abs(p)
    return tl.where(p == 0, 0, tl.exp2(power * tl.log2(tl.where(p == 0, 1, tl.abs(p)))))


@triton.jit
def _sizes(sizes, h, rows, inside, sized: tl.constexpr, wide: tl.constexpr, ROWS: tl.constexpr):
    """The step size of each row."""
    if sized:
        return tl.load(sizes + rows, inside, 0).to(wide)
    return (tl.zeros((ROWS,), tl.float64) + h).to(wide)


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)  # of the dtype of x, as every branch of _slope


@triton.jit
def _slope(p, power: tl.constexpr):
    """``sgn(p) |p|^(power-1)``."""
    if power == 2:
        return p
    if power == 1:
        return _sign(p)
    return _sign(p) * _power(p, power - 1)


@triton.jit
def _store_values(
    e, a, s, t, size, rows, inside, n, error, action, square, mean,
    has_error: tl.constexpr, has_action: tl.constexpr, has_residue: tl.constexpr,
):  # fmt: skip
    """The values of each row from its sums."""
    count = tl.full(e.shape, 0, e.dtype) + n
    if has_error:
        tl.store(error + rows, e / count, inside)
    if has_action:
        tl.store(action + rows, a / count * size, inside)
    if has_residue:
        tl.store(square + rows, s / count, inside)
        tl.store(mean + rows, t / count, inside)


@triton.jit
def _finish(
    x0, stages, sizes, h: tl.float64, x1, error, action, square, mean, sums, batch, n,
    b: tl.constexpr, e: tl.constexpr, rtol: tl.constexpr, atol: tl.constexpr, power: tl.constexpr,
    has_state: tl.constexpr, has_error: tl.constexpr, has_action: tl.constexpr, has_residue: tl.constexpr,
    sized: tl.constexpr, parts: tl.constexpr, span: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < batch
    begin = tl.program_id(1) * span
    end = min(begin + span, n)
    size = _sizes(sizes, h, rows, inside, sized, wide, ROWS)
    sum_e = tl.zeros((ROWS, COLS), wide)
    sum_a = tl.zeros((ROWS, COLS), wide)
    sum_s = tl.zeros((ROWS, COLS), wide)
    sum_t = tl.zeros((ROWS, COLS), wide)
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        where = rows[:, None] * n + cols[None, :]
        mask = inside[:, None] & (cols < end)[None, :]
        r = tl.zeros((ROWS, COLS), wide)
        d = tl.zeros((ROWS, COLS), wide)
        for k in tl.static_range(len(b)):
            if b[k] != 0 or (has_error and e[k] != 0):
                p = tl.load(stages[k] + where, mask, 0).to(wide)
                if b[k] != 0:
                    r += b[k] * p
                    if has_action:
                        sum_a += b[k] * p * p
                if has_error and e[k] != 0:
                    d += e[k] * p
        if has_residue:
            sum_s += _power(r, power)
            sum_t += r
        if has_state or (has_error and rtol != 0):
            x = tl.load(x0 + where, mask, 0).to(wide)
            end_state = x + size[:, None] * r
            if has_state:
                tl.store(x1 + where, end_state.to(x1.dtype.element_ty), mask)
            if has_error and rtol != 0:
                low, high = tl.abs(x), tl.abs(end_state)
                d = d * size[:, None] / (atol + rtol * tl.where(low > high, low, high))
        if has_error:
            if rtol == 0:
                d = d * size[:, None] / atol
            sum_e += tl.where(mask, d * d, 0)
    total_e, total_a = tl.sum(sum_e, 1), tl.sum(sum_a, 1)
    total_s, total_t = tl.sum(sum_s, 1), tl.sum(sum_t, 1)
    if parts == 1:
        _store_values(
            total_e, total_a, total_s, total_t, size, rows, inside, n, error, action, square, mean,
            has_error, has_action, has_residue,
        )  # fmt: skip
    elif has_error or has_action or has_residue:
        to = sums + tl.program_id(1) * 4 * batch + rows
        tl.store(to, total_e, inside)
        tl.store(to + batch, total_a, inside)
        tl.store(to + 2 * batch, total_s, inside)
        tl.store(to + 3 * batch, total_t, inside)


@triton.jit
def _add_parts(
    sums, sizes, h: tl.float64, error, action, square, mean, batch, n,
    has_error: tl.constexpr, has_action: tl.constexpr, has_residue: tl.constexpr,
    sized: tl.constexpr, parts: tl.constexpr, ROWS: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The values of rows that were cut into parts."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < batch
    size = _sizes(sizes, h, rows, inside, sized, wide, ROWS)
    e = tl.zeros((ROWS,), wide)
    a = tl.zeros((ROWS,), wide)
    s = tl.zeros((ROWS,), wide)
    t = tl.zeros((ROWS,), wide)
    for part in range(parts):
        source = sums + part * 4 * batch + rows
        e += tl.load(source, inside, 0)
        a += tl.load(source + batch, inside, 0)
        s += tl.load(source + 2 * batch, inside, 0)
        t += tl.load(source + 3 * batch, inside, 0)
    _store_values(e, a, s, t, size, rows, inside, n, error, action, square, mean, has_error, has_action, has_residue)


@triton.jit
def _finish_backward(
    stages, sizes, h: tl.float64, grad, g_error, g_action, g_square, g_mean, grads, batch, n, tiles,
    b: tl.constexpr, e: tl.constexpr, atol: tl.constexpr, power: tl.constexpr,
    has_grad: tl.constexpr, has_error: tl.constexpr, has_action: tl.constexpr, has_square: tl.constexpr,
    has_mean: tl.constexpr, needs: tl.constexpr, sized: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Gradients as :func:`solvers.reductions.aten.finish_step_backward` writes them down."""
    rows = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    inside = rows < batch
    where = rows[:, None] * n + cols[None, :]
    mask = inside[:, None] & (cols < n)[None, :]
    size = _sizes(sizes, h, rows, inside, sized, wide, ROWS)
    count = tl.full((ROWS,), 0, wide) + n
    step = size[:, None]
    r = tl.zeros((ROWS, COLS), wide)
    d = tl.zeros((ROWS, COLS), wide)
    u = tl.zeros((ROWS, COLS), wide)
    if has_square or has_error:
        for k in tl.static_range(len(b)):
            if (has_square and b[k] != 0) or (has_error and e[k] != 0):
                p = tl.load(stages[k] + where, mask, 0).to(wide)
                if has_square and b[k] != 0:
                    r += b[k] * p
                if has_error and e[k] != 0:
                    d += e[k] * p
    if has_grad:
        u += tl.load(grad + where, mask, 0).to(wide)
    if has_error:
        pull = 2 * tl.load(g_error + rows, inside, 0) / count
        d = d * (step / atol) * pull[:, None] * (step / atol)  # in an order that neither overflows nor underflows
    u *= step
    if has_square:
        u += (power * tl.load(g_square + rows, inside, 0) / count)[:, None] * _slope(r, power)
    if has_mean:
        u += (tl.load(g_mean + rows, inside, 0) / count)[:, None]
    if has_action:
        slope_a = (2 * tl.load(g_action + rows, inside, 0) * size / count)[:, None]
    for k in tl.static_range(len(b)):
        if needs[k]:
            out = b[k] * u
            if b[k] == 0:
                out = tl.zeros((ROWS, COLS), wide)
            if has_action and b[k] != 0:
                p = tl.load(stages[k] + where, mask, 0).to(wide)
                out += b[k] * slope_a * p
            if has_error and e[k] != 0:
                out += e[k] * d
            tl.store(grads[k] + where, out.to(grads[k].dtype.element_ty), mask)


def finish_step(
    x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec, power: float = 2.0
) -> Reductions:
    """As :func:`solvers.reductions.reference.finish_step`, with ``<|r|^power>`` for the mean square."""
    operands = rows_of([*stages, *([] if x0 is None else [x0])])
    first, batch = operands[0], len(operands[0])
    n, wide = first[0].numel(), wide_dtype(first)
    rows, cols, parts = _tiling(batch, n)
    span = triton.cdiv(triton.cdiv(n, parts), cols) * cols
    x1 = torch.empty_like(first) if spec.state else None
    computed = (spec.error, spec.action, spec.residue, spec.residue)
    values = [first.new_empty(batch, dtype=wide) if each else None for each in computed]
    pointers = [first if v is None else v for v in values]  # one of None is not followed
    sums = first.new_empty((parts, 4, batch), dtype=wide) if parts > 1 and any(computed) else first
    size, number = (h, 0.0) if isinstance(h, Tensor) else (first, h)
    shape: dict[str, Any] = {"sized": isinstance(h, Tensor), "parts": parts, "wide": WIDE[wide]}
    flags = {"has_error": spec.error, "has_action": spec.action, "has_residue": spec.residue}
    with _on(first):
        _finish[(triton.cdiv(batch, rows), parts)](
            operands[-1], tuple(operands[: len(stages)]), size, number, first if x1 is None else x1, *pointers, sums,
            batch, n, spec.b, spec.e, spec.rtol, spec.atol, power, has_state=spec.state,
            span=span, ROWS=rows, COLS=cols, **flags, **shape,
        )  # fmt: skip
        if parts > 1 and any(computed):
            _add_parts[(triton.cdiv(batch, 128),)](sums, size, number, *pointers, batch, n, ROWS=128, **flags, **shape)
    return Reductions.of([x1, *values])


def finish_step_backward(
    stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec, grads: Reductions, needs: Sequence[bool],
    power: float = 2.0
) -> list[Tensor | None]:  # fmt: skip
    """As :func:`solvers.reductions.aten.finish_step_backward`, with ``<|r|^power>`` for the mean square."""
    operands = rows_of(list(stages) if grads.x1 is None else [*stages, grads.x1])
    first, batch = operands[0], len(operands[0])
    n, wide = first[0].numel(), wide_dtype(first)
    rows, cols, _ = _tiling(batch, n)
    tiles = triton.cdiv(n, cols)
    out = [torch.empty_like(first) if need else None for need in needs]
    to = [first if grad is None else grad for grad in out]
    size, number = (h, 0.0) if isinstance(h, Tensor) else (first, h)
    pulls = [first if g is None else g.contiguous() for g in grads.values[1:]]
    with _on(first):
        _finish_backward[(triton.cdiv(batch, rows) * tiles,)](
            tuple(operands[: len(stages)]), size, number, operands[-1], *pulls, tuple(to), batch, n, tiles,
            spec.b, spec.e, spec.atol, power,
            has_grad=grads.x1 is not None, has_error=grads.error is not None, has_action=grads.action is not None,
            has_square=grads.square is not None, has_mean=grads.mean is not None,
            needs=tuple(bool(need) for need in needs), sized=isinstance(h, Tensor),
            ROWS=rows, COLS=cols, wide=WIDE[wide],
        )  # fmt: skip
    return out


def row_moments(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`solvers.reductions.reference.row_moments`."""
    values = finish_step(None, rows, 1.0, _residue(weights), power)
    return values.square, values.mean if mean else None  # type: ignore[return-value]  # spec computes it


def row_moments_backward(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, grad_power: Tensor | None, grad_mean: Tensor | None,
    needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """As :func:`solvers.reductions.aten.row_moments_backward`."""
    grads = Reductions(square=grad_power, mean=grad_mean)
    return finish_step_backward(rows, 1.0, _residue(weights), grads, needs, power=power)


def _residue(weights: Sequence[float]) -> ReductionSpec:
    return ReductionSpec(b=tuple(weights), e=(0.0,) * len(weights), residue=True)


def _tiling(batch: int, n: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the parts of a row, from the shape alone."""
    cols = min(triton.next_power_of_2(n), TILE)
    rows = max(1, TILE // cols) if batch > 1 else 1
    parts = max(1, min(n // PART, PROGRAMS // batch)) if n >= 2 * PART else 1
    return rows, cols, parts


def _on(x: Tensor) -> Any:
    """The device of x as the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
