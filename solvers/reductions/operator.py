"""``torch.ops.solvers.finish_step`` and ``row_moments``: operators of torch.library, with a kernel per device.

Their values are those of :mod:`solvers.reductions.reference`; a value that is left out is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from solvers.reductions import aten, reference
from solvers.reductions.reference import HALF, Reductions, ReductionSpec, wide_dtype

__all__ = ["finish_step", "has_kernel", "row_moments"]

_SPEC = "float[] b, float[] e, float rtol, float atol, bool state, bool error, bool action, bool residue"
_STEP = f"Tensor? x0, Tensor[] stages, Tensor? sizes, float h, {_SPEC}"
_ROWS = "Tensor[] rows, float[] weights, float power, bool mean"
_library = torch.library.Library("solvers", "DEF")
for _schema in (
    f"finish_step({_STEP}) -> (Tensor x1, Tensor error, Tensor action, Tensor square, Tensor mean)",
    f"finish_step_backward({_STEP}, Tensor?[] grads, bool[] needs, bool ends) -> Tensor[]",
    f"row_moments({_ROWS}) -> (Tensor power, Tensor mean)",
    f"row_moments_backward({_ROWS}, Tensor?[] grads, bool[] needs) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def has_kernel(x: Tensor) -> bool:
    """Whether the operators have a kernel for the device and the dtype of x."""
    kind = x.device.type
    return x.dtype in (torch.float32, torch.float64, *HALF) and (kind == "cpu" or (kind == "cuda" and _has_triton()))


def finish_step(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec) -> Reductions:
    """As :func:`solvers.reductions.reference.finish_step`, in one pass over memory, forward and backward."""
    sizes, number = (h, 1.0) if isinstance(h, Tensor) else (None, float(h))
    x0 = x0 if spec.state or spec.scaled else None
    if torch.is_grad_enabled():
        values = _FinishStep.apply(x0, sizes, (number, *spec.numbers), *stages)
    else:
        values = torch.ops.solvers.finish_step.default(x0, stages, sizes, number, *spec.numbers)
    return Reductions.of(value if wanted else None for value, wanted in zip(values, spec.wanted, strict=True))


def row_moments(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`solvers.reductions.reference.row_moments`, in one pass over memory, forward and backward."""
    if torch.is_grad_enabled():
        of_power, of_mean = _RowMoments.apply((weights, power, mean), *rows)
    else:
        of_power, of_mean = torch.ops.solvers.row_moments.default(rows, weights, power, mean)
    return of_power, of_mean if mean else None


# -- kernels ------------------------------------------------------------------------------------------------------


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(x: Tensor) -> Any:
    """The module with the kernels for the device of x."""
    return aten if x.device.type == "cpu" else import_module("solvers.reductions.triton")


def _full(values: Iterable[Tensor | None], x: Tensor) -> list[Tensor]:
    return [x.new_empty(0) if value is None else value for value in values]


def _finish_step(x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *numbers: Any) -> Any:
    p, size = stages[0], h if sizes is None else sizes
    return tuple(_full(_kernels(p).finish_step(x0, stages, size, ReductionSpec.of(numbers)).values, p))


def _finish_step_backward(x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *rest: Any) -> Any:
    *numbers, grads, needs, ends = rest
    p, size, spec = stages[0], h if sizes is None else sizes, ReductionSpec.of(numbers)
    return _full(_kernels(p).finish_step_backward(x0, stages, size, spec, Reductions.of(grads), needs, ends), p)


def _row_moments(rows: list[Tensor], *numbers: Any) -> Any:
    return tuple(_full(_kernels(rows[0]).row_moments(rows, *numbers), rows[0]))


def _row_moments_backward(
    rows: list[Tensor], weights: list[float], power: float, mean: bool, grads: list[Tensor | None], needs: list[bool]
) -> Any:
    return _full(_kernels(rows[0]).row_moments_backward(rows, weights, power, *grads, needs), rows[0])


def _fake_step(x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *numbers: Any) -> Any:
    p, (state, *others) = stages[0], ReductionSpec.of(numbers).wanted
    values = (p.new_empty(len(p), dtype=wide_dtype(p)) if wanted else None for wanted in others)
    return tuple(_full([torch.empty_like(p) if state else None, *values], p))


def _fake_moments(rows: list[Tensor], weights: list[float], power: float, mean: bool) -> Any:
    x = rows[0]
    return tuple(_full([x.new_empty(len(x), dtype=wide_dtype(x)) if wanted else None for wanted in (True, mean)], x))


def _fake_step_backward(x0: Tensor | None, stages: list[Tensor], *rest: Any) -> list[Tensor]:
    return _full([torch.empty_like(stages[0]) if need else None for need in rest[-2]], stages[0])


def _fake_moments_backward(rows: list[Tensor], *rest: Any) -> list[Tensor]:
    return _full([torch.empty_like(rows[0]) if need else None for need in rest[-1]], rows[0])


# -- gradients ----------------------------------------------------------------------------------------------------


class _FinishStep(torch.autograd.Function):
    """The operator with its gradients for eager calls: torch.library searches nested arguments, which takes longer."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor | None, sizes: Tensor | None, numbers: Any, *stages: Tensor) -> Any:  # type: ignore[override]
        inputs = (x0, stages, sizes, *numbers)
        values = torch.ops.solvers.finish_step.default(*inputs)
        _keep_step(ctx, inputs, values)
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:  # type: ignore[override]
        of_x0, of_stages, of_sizes = _step_gradients(ctx, outer)
        return (of_x0, of_sizes, None, *of_stages)


class _RowMoments(torch.autograd.Function):
    """As :class:`_FinishStep`."""

    @staticmethod
    def forward(ctx: Any, numbers: Any, *rows: Tensor) -> Any:  # type: ignore[override]
        values = torch.ops.solvers.row_moments.default(rows, *numbers)
        _keep_rows(ctx, (rows, *numbers), values)
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:  # type: ignore[override]
        return (None, *_moments_gradients(ctx, outer))


def _needs(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the gradients need.

    Those of a state alone do not depend on what it is made of, and nothing is kept. The velocity of a single stage lies
    between the states, which the layers before and after the step keep anyway.
    """
    x0, stages, sizes, ctx.h, *numbers = inputs
    ctx.spec = spec = ReductionSpec.of(numbers)
    ctx.needs = _needs(x0), [_needs(p) for p in stages], _needs(sizes)
    linear = not any(spec.wanted[1:]) and not _needs(sizes)
    exact = len(stages) == 1 and stages[0].dtype in (torch.float32, torch.float64)
    ctx.ends = exact and not linear and spec.state and sizes is None and ctx.h * spec.b[0] != 0
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sizes, *(() if linear else (x0, output[0]) if ctx.ends else (x0, *stages)))


def _step_gradients(ctx: Any, outer: Sequence[Tensor | None]) -> tuple[Any, list[Tensor | None], Any]:
    """The gradients of the state, the stages and the step sizes."""
    spec, (needs_x0, needs_stages, needs_sizes) = ctx.spec, ctx.needs
    grads = [grad if wanted else None for grad, wanted in zip(outer, spec.wanted, strict=True)]
    if all(grad is None for grad in grads):
        return None, [None] * len(needs_stages), None
    sizes, *kept = ctx.saved_tensors
    x0, *stages = kept or [grads[0]] * (1 + len(needs_stages))  # of which the shape is read
    if torch.is_grad_enabled() or needs_sizes or (spec.scaled and grads[1] is not None):
        stages = [(stages[0] - x0) / (ctx.h * spec.b[0])] if ctx.ends else stages
        of_x0, of_sizes, *of_stages = _differentiable(
            lambda x0, h, *stages: reference.finish_step(x0, stages, h, spec).values,
            (x0, ctx.h if sizes is None else sizes, *stages),
            grads,
        )
        return of_x0, of_stages, of_sizes
    of_x0 = grads[0] if needs_x0 else None
    if not any(needs_stages):
        return of_x0, [None] * len(needs_stages), None
    backward = torch.ops.solvers.finish_step_backward.default
    of_stages = backward(x0, stages, sizes, ctx.h, *spec.numbers, grads, needs_stages, ctx.ends)
    return of_x0, [grad if need else None for grad, need in zip(of_stages, needs_stages, strict=True)], None


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, *ctx.numbers = inputs
    ctx.needs = [_needs(x) for x in rows]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*rows)


def _moments_gradients(ctx: Any, outer: Sequence[Tensor | None]) -> list[Tensor | None]:
    rows, grads = ctx.saved_tensors, [outer[0], outer[1] if ctx.numbers[2] else None]
    if all(grad is None for grad in grads):
        return [None] * len(rows)
    if torch.is_grad_enabled():
        return _differentiable(lambda *rows: reference.row_moments(rows, *ctx.numbers), rows, grads)
    of_rows = torch.ops.solvers.row_moments_backward.default(rows, *ctx.numbers, grads, ctx.needs)
    return [grad if need else None for grad, need in zip(of_rows, ctx.needs, strict=True)]


def _step_backward(ctx: Any, *outer: Tensor | None) -> Any:
    return (*_step_gradients(ctx, outer), *(None,) * (1 + len(ctx.spec.numbers)))


def _moments_backward(ctx: Any, *outer: Tensor | None) -> Any:
    return (_moments_gradients(ctx, outer), None, None, None)


def _differentiable(
    function: Callable[..., Iterable[Tensor | None]], operands: Sequence[Any], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of each operand that is a tensor, by operations that can be differentiated again."""
    where = [i for i, x in enumerate(operands) if isinstance(x, Tensor)]

    def values(*tensors: Tensor) -> tuple[Tensor, ...]:
        by_place = dict(zip(where, tensors, strict=True))
        results = function(*(by_place.get(i, x) for i, x in enumerate(operands)))
        return tuple(v for v, grad in zip(results, grads, strict=True) if v is not None and grad is not None)

    pull: Any = torch.func.vjp(values, *(operands[i] for i in where))[1]
    by_place = dict(zip(where, pull(tuple(grad for grad in grads if grad is not None)), strict=True))
    return [by_place.get(i) for i in range(len(operands))]


# -- mapping ------------------------------------------------------------------------------------------------------


def _mapped(name: str) -> Callable[..., Any]:
    """The batching rule of an operator: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        def joined(x: Any, dim: Any) -> Any:
            if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
                return [joined(each, d) for each, d in zip(x, dim, strict=True)]
            if not isinstance(x, Tensor):
                return x
            return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        operator = getattr(torch.ops.solvers, name).default
        values = operator(*(joined(x, dim) for x, dim in zip(arguments, in_dims, strict=True)))
        return tuple(v.unflatten(0, (info.batch_size, -1)) for v in values), (0,) * len(values)

    return rule


for _name, _kernel, _fake in (
    ("finish_step", _finish_step, _fake_step),
    ("finish_step_backward", _finish_step_backward, _fake_step_backward),
    ("row_moments", _row_moments, _fake_moments),
    ("row_moments_backward", _row_moments_backward, _fake_moments_backward),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"solvers::{_name}", _fake, lib=_library)
torch.library.register_autograd("solvers::finish_step", _step_backward, setup_context=_keep_step, lib=_library)
torch.library.register_autograd("solvers::row_moments", _moments_backward, setup_context=_keep_rows, lib=_library)
for _name in ("finish_step", "row_moments"):
    torch.library.register_vmap(f"solvers::{_name}", _mapped(_name), lib=_library)
