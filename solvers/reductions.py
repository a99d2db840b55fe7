"""Per-sample reductions of stages and residues: one number per sample, each operand read once, forward and backward.

Each is an operator of ``torch.library``, ``torch.ops.odenets.*``, behind a function that checks its arguments. Under
``torch.compile``, the transforms of ``torch.func`` and forward-mode differentiation the function uses the plain
expression instead, which a compiler fuses, and which can be transformed and has tangents. Sums are accumulated in
float32 or wider, and come in that precision.

What needs two sums of an operand walks it in blocks that stay in a CPU's cache. The backward pass is one multiplication
or multiply-add per operand, where the chain rule through the plain expression takes several full-size temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.states import is_transformed, real_dtype

__all__ = ["mean_square", "mean_square_and_cosine", "power_mean", "root_mean_square", "weighted_action"]

BLOCK = 1 << 20  # numbers: few enough for the last-level cache, enough to hide the cost of a call
RUN = 1 << 12  # numbers summed one after the other: rounding grows with them, and not with the row


def mean_square(r: Tensor) -> Tensor:
    """``<r^2>``, the mean over the features, ``(B,)``.

    Args:
        r: ``(B, *S)``, floating.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers.

    >>> mean_square(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([12.5000,  0.5000])
    """
    _check(r)
    if _plain(r):
        return _sums(r, 2.0) / _count(r)
    return torch.ops.odenets.mean_square(r)


def root_mean_square(r: Tensor) -> Tensor:
    """``sqrt(<r^2>)``, ``(B,)``; the gradient where r = 0 is 0. Arguments as for :func:`mean_square`."""
    _check(r)
    if _plain(r):
        wide = torch.promote_types(r.dtype, torch.float32)
        return torch.linalg.vector_norm(r, dim=_features(r), dtype=wide) / math.sqrt(max(_count(r), 1))
    return torch.ops.odenets.root_mean_square(r)


def power_mean(r: Tensor, p: float) -> Tensor:
    """``<|r|^p>``, the mean over the features, ``(B,)``: the general cost of section 3.

    Args:
        r: ``(B, *S)``, floating.
        p: at least 1.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers, or p below 1.
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be finite and at least 1, got {p}")
    if p == 2:
        return mean_square(r)
    _check(r)
    if _plain(r):
        return _sums(r, p) / _count(r)
    return torch.ops.odenets.power_mean(r, float(p))


def mean_square_and_cosine(r: Tensor) -> tuple[Tensor, Tensor]:
    """``<r^2>`` and the cosine of r with the vector of ones, both ``(B,)`` (eq. 34); the cosine is 0 where r = 0.

    Arguments as for :func:`mean_square`.
    """
    _check(r)
    if _plain(r):
        wide = r.to(torch.promote_types(r.dtype, torch.float32))
        norm, total = torch.linalg.vector_norm(wide, dim=_features(r)), wide.sum(_features(r))
        return norm.square() / _count(r), _cosine(norm, total, _count(r))
    return torch.ops.odenets.mean_square_and_cosine(r)


def weighted_action(stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``h sum_i b_i <p_i^2>``: the quadrature of the kinetic energy over a step, ``(B,)``.

    Args:
        stages: velocities, each ``(B, *S)``; those whose weight is 0 are not read.
        weights: one per stage; more may follow, all 0.
        h: step size, a number or one per sample.

    Raises:
        TypeError, ValueError: stages of several shapes, dtypes or devices, or not as many as the weights need.
    """
    if len(stages) < len(weights) and any(weights[len(stages) :]):
        raise ValueError(f"weights ask for {len(weights)} stages, got {len(stages)}")
    if len(stages) > len(weights):
        raise ValueError(f"weights must hold one per stage, got {len(weights)} for {len(stages)}")
    pairs = [(p, float(w)) for p, w in zip(stages, weights, strict=False) if w != 0]
    if not pairs:
        raise ValueError("weights must not all be 0")
    read, used = [p for p, _ in pairs], [w for _, w in pairs]
    _check(read[0], "stages")
    for p in read[1:]:
        if (p.shape, p.dtype, p.device) != (read[0].shape, read[0].dtype, read[0].device):
            raise ValueError(
                f"stages must have one shape, dtype and device, got {tuple(p.shape)} {p.dtype} {p.device} beside "
                f"{tuple(read[0].shape)} {read[0].dtype} {read[0].device}"
            )
    if any(_plain(p) for p in read):
        total = sum(w * _sums(p, 2.0) for p, w in pairs) / _count(read[0])
    else:
        total = torch.ops.odenets.weighted_mean_square(read, used)
    return total * (h.reshape(-1) if isinstance(h, Tensor) and h.ndim else h)  # type: ignore[return-value]


# -- what all share -----------------------------------------------------------------------------------------------


def _check(r: Tensor, name: str = "r") -> None:
    if not isinstance(r, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, *S), got {type(r).__name__}")
    if not (r.is_floating_point() or r.is_complex()):
        raise TypeError(f"{name} must be of a floating dtype, got {r.dtype}")
    if r.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *S) with at least one feature dimension, got {tuple(r.shape)}")


def _plain(r: Tensor) -> bool:
    """Whether the plain expression serves: for a compiler, for torch.func and tangents, for complex numbers."""
    if torch.compiler.is_compiling() or r.is_complex() or is_transformed(r):
        return True
    return forward_ad.unpack_dual(r).tangent is not None


def _features(r: Tensor) -> tuple[int, ...]:
    return tuple(range(1, r.ndim))


def _count(r: Tensor) -> int:
    return math.prod(r.shape[1:])


def _empty(r: Tensor) -> Tensor:
    return r.new_empty(len(r), dtype=torch.promote_types(real_dtype(r), torch.float32))


def _sums(r: Tensor, p: float) -> Tensor:
    """``sum |r|^p`` over the features, with a gradient where r = 0."""
    wide = torch.promote_types(r.dtype, torch.float32)
    return torch.linalg.vector_norm(r, p, dim=_features(r), dtype=wide) ** p


def _rows(r: Tensor) -> Tensor:
    """The numbers of each sample in one row, ``(B, N)``, in whatever order they lie in memory; a copy if they must."""
    if r.is_contiguous() or r.numel() == 0:
        return r.reshape(len(r), _count(r))
    order = sorted(range(1, r.ndim), key=lambda d: (r.stride(d), r.shape[d]), reverse=True)
    return r.permute(0, *order).flatten(1)


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of whole rows, of about :data:`BLOCK` numbers, and where they lie."""
    n = max(1, BLOCK // max(rows.shape[1], 1))
    for i in range(0, len(rows), n):
        yield slice(i, i + n), rows[i : i + n]


def _power_sums(rows: Tensor, p: float) -> Tensor:
    """``sum |r|^p`` of each row, in float32 or wider, by runs of :data:`RUN` numbers whose sums are then added."""
    wide = torch.promote_types(rows.dtype, torch.float32)

    def sums(part: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(part, p, dim=-1, dtype=wide)
        return norm.square_() if p == 2 else norm.pow_(p)

    runs = rows.shape[1] // RUN
    if runs < 2:
        return sums(rows)
    total = sums(rows[:, : runs * RUN].unflatten(1, (runs, RUN))).sum(1)
    return total.add_(sums(rows[:, runs * RUN :])) if rows.shape[1] % RUN else total


def _along(values: Tensor, r: Tensor) -> Tensor:
    """A value per sample as it broadcasts against r."""
    return values.reshape(-1, *[1] * (r.ndim - 1))


def _scaled(r: Tensor, factor: Tensor) -> Tensor:
    """``r`` times a number per sample, in the dtype of r."""
    return (r * _along(factor, r)).to(r.dtype)


def _cosine(norm: Tensor, total: Tensor, n: int) -> Tensor:
    rest = norm == 0
    return torch.where(rest, 0, total) / torch.where(rest, 1, norm * math.sqrt(n))


def _operator(
    name: str, schema: str, fake: Callable[..., Any], setup: Callable[..., Any], back: Callable[..., Any]
) -> Any:
    """Decorator: register a function as the operator ``odenets::name``, with all that torch asks of one."""

    def register(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"odenets::{name}", function, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        operator.register_autograd(back, setup_context=setup)
        operator.register_vmap(_mapped(operator))
        return operator

    return register


def _mapped(operator: Any) -> Callable[..., Any]:
    """The batching rule: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: Any, operand: Any, *numbers: Any) -> Any:
        several = isinstance(operand, list | tuple)
        operands, dims = (operand, in_dims[0]) if several else ([operand], [in_dims[0]])
        size = info.batch_size
        moved = [
            r.expand(size, *r.shape) if d is None else r.movedim(d, 0) for r, d in zip(operands, dims, strict=True)
        ]
        joined = [r.reshape(size * r.shape[1], *r.shape[2:]) for r in moved]
        found = operator(joined if several else joined[0], *numbers)
        if isinstance(found, tuple):
            return tuple(f.reshape(size, -1) for f in found), (0,) * len(found)
        return found.reshape(size, -1), 0

    return rule


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    operands = inputs[0] if isinstance(inputs[0], list | tuple) else [inputs[0]]
    ctx.numbers, ctx.operands = inputs[1:], len(operands)
    ctx.save_for_backward(*operands, *outputs)


# -- the operators ------------------------------------------------------------------------------------------------


def _mean_square_back(ctx: Any, grad: Tensor) -> Tensor:
    r, _ = ctx.saved_tensors
    return _scaled(r, grad * (2 / max(_count(r), 1)))


@_operator("mean_square", "(Tensor r) -> Tensor", _empty, _save, _mean_square_back)
def _mean_square(r: Tensor) -> Tensor:
    return _power_sums(_rows(r), 2.0).div_(_count(r))


def _root_mean_square_back(ctx: Any, grad: Tensor) -> Tensor:
    r, rms = ctx.saved_tensors
    rest = rms == 0
    return _scaled(r, torch.where(rest, 0, grad) / torch.where(rest, 1, rms * max(_count(r), 1)))


@_operator("root_mean_square", "(Tensor r) -> Tensor", _empty, _save, _root_mean_square_back)
def _root_mean_square(r: Tensor) -> Tensor:
    return _power_sums(_rows(r), 2.0).div_(max(_count(r), 1)).sqrt_()


def _power_mean_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    r, _ = ctx.saved_tensors
    (p,) = ctx.numbers
    return _scaled(r.sign() * r.abs() ** (p - 1), grad * (p / max(_count(r), 1))), None


@_operator("power_mean", "(Tensor r, float p) -> Tensor", lambda r, p: _empty(r), _save, _power_mean_back)
def _power_mean(r: Tensor, p: float) -> Tensor:
    return _power_sums(_rows(r), p).div_(_count(r))


def _mean_square_and_cosine_back(ctx: Any, grad: Tensor, grad_cosine: Tensor) -> Tensor:
    r, square, cosine = ctx.saved_tensors
    n = max(_count(r), 1)
    rest = square == 0
    pull = torch.where(rest, 0, grad_cosine) / torch.where(rest, 1, square * n)  # over |r|^2
    slope = 2 / n * grad - pull * cosine
    shift = pull * torch.where(rest, 1, square).sqrt()
    return torch.addcmul(_along(shift, r), r, _along(slope, r)).to(r.dtype)


@_operator(
    "mean_square_and_cosine",
    "(Tensor r) -> (Tensor, Tensor)",
    lambda r: (_empty(r), _empty(r)),
    _save,
    _mean_square_and_cosine_back,
)
def _mean_square_and_cosine(r: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(r)
    square, total = _empty(r), _empty(r)
    for part, block in _blocks(rows):
        square[part] = _power_sums(block, 2.0)
        torch.sum(block, 1, dtype=total.dtype, out=total[part])
    cosine = _cosine(square.sqrt(), total, rows.shape[1])
    return square.div_(rows.shape[1]), cosine


def _weighted_mean_square_back(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    *stages, _ = ctx.saved_tensors
    (weights,) = ctx.numbers
    return [_scaled(p, grad * (2 * w / max(_count(p), 1))) for p, w in zip(stages, weights, strict=True)], None


@_operator(
    "weighted_mean_square",
    "(Tensor[] stages, float[] weights) -> Tensor",
    lambda stages, weights: _empty(stages[0]),
    _save,
    _weighted_mean_square_back,
)
def _weighted_mean_square(stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = _power_sums(_rows(stages[0]), 2.0).mul_(weights[0])
    for p, w in zip(stages[1:], weights[1:], strict=True):
        total.add_(_power_sums(_rows(p), 2.0), alpha=w)
    return total.div_(_count(stages[0]))
