"""The gradients of the two operators, by their kernels, or by the expression where they are differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.reductions import reference
from solvers.reductions.reference import ReductionSpec
from solvers.validation import is_transformed

__all__ = ["FinishStep", "RowMoments", "keep_rows", "keep_step", "moments_backward", "step_backward"]


class FinishStep(torch.autograd.Function):
    """The operator with its gradients for eager calls: torch.library searches nested arguments, which takes longer."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor | None, sizes: Tensor | None, numbers: Any, *stages: Tensor) -> Any:  # type: ignore[override]  # torch's are (ctx, *args)
        """The values of the operator."""
        inputs = (x0, stages, sizes, *numbers)
        values = torch.ops.solvers.finish_step.default(*inputs)
        keep_step(ctx, inputs, values)
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:  # type: ignore[override]  # torch's are (ctx, *args)
        """The gradients of the states, the sizes and the stages."""
        of_x0, of_stages, of_sizes = _step_gradients(ctx, outer)
        return (of_x0, of_sizes, None, *of_stages)


class RowMoments(torch.autograd.Function):
    """As :class:`FinishStep`."""

    @staticmethod
    def forward(ctx: Any, numbers: Any, *rows: Tensor) -> Any:  # type: ignore[override]  # torch's are (ctx, *args)
        """The values of the operator."""
        values = torch.ops.solvers.row_moments.default(rows, *numbers)
        keep_rows(ctx, (rows, *numbers), values)
        return values

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> Any:  # type: ignore[override]  # torch's are (ctx, *args)
        """The gradients of the rows."""
        return (None, *_moments_gradients(ctx, outer))


def _needs(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def keep_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the gradients need: nothing for those of a state alone, which do not depend on what it is made of.

    The velocity of a single stage lies between the states, which the layers before and after the step keep anyway:
    their difference is it, but where a small step would leave nothing of it but rounding.
    """
    x0, stages, sizes, ctx.h, *numbers = inputs
    ctx.spec = spec = ReductionSpec.of(numbers)
    ctx.needs = [_needs(p) for p in stages], _needs(sizes)
    linear = not any(spec.computed[1:]) and not _needs(sizes)
    ctx.set_materialize_grads(False)
    single = len(stages) == 1 and stages[0].dtype in (torch.float32, torch.float64)
    ctx.between = single and not linear and spec.state and sizes is None and abs(ctx.h * spec.b[0]) >= 0.5
    ctx.save_for_backward(sizes, *(() if linear else (x0, output[0]) if ctx.between else (x0, *stages)))


def _step_gradients(ctx: Any, outer: Sequence[Tensor | None]) -> tuple[Any, list[Tensor | None], Any]:
    """The gradients of the state, the stages and the step sizes."""
    spec, (needs_stages, needs_sizes) = ctx.spec, ctx.needs
    grads = [grad if computed else None for grad, computed in zip(outer, spec.computed, strict=True)]
    if all(grad is None for grad in grads):
        return None, [None] * len(needs_stages), None
    reads_error = spec.error and grads[1] is not None
    read = [b != 0 or (reads_error and e != 0) for b, e in zip(spec.b, spec.e, strict=True)]
    needs_stages = [need and each for need, each in zip(needs_stages, read, strict=True)]
    sizes, *saved = ctx.saved_tensors
    x0, *stages = saved or [grads[0]] * (1 + len(needs_stages))  # of which the shape is read
    if ctx.between:
        part = ctx.h * spec.b[0]
        stages = [stages[0] - x0 if part == 1 else (stages[0] - x0) / part]
    if torch.is_grad_enabled() or needs_sizes or (spec.scaled and reads_error) or _mapped(grads):
        of_x0, of_sizes, *of_stages = _differentiable(
            lambda x0, h, *stages: reference.finish_step(x0, stages, h, spec).values,
            (x0, ctx.h if sizes is None else sizes, *stages),
            grads,
        )
        return of_x0, _only(of_stages, needs_stages), of_sizes
    if not any(needs_stages):
        return grads[0], [None] * len(needs_stages), None
    backward = torch.ops.solvers.finish_step_backward.default
    of_stages = backward(stages, sizes, ctx.h, *spec.numbers, grads, needs_stages)
    return grads[0], _only(of_stages, needs_stages), None


def _only(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """None for what is not needed, as a stage that nothing reads: a zero costs a pass backward through its field."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the gradients of :class:`RowMoments` need."""
    rows, *ctx.numbers = inputs
    ctx.needs = [_needs(x) for x in rows]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*rows)


def _moments_gradients(ctx: Any, outer: Sequence[Tensor | None]) -> list[Tensor | None]:
    rows, grads = ctx.saved_tensors, [outer[0], outer[1] if ctx.numbers[2] else None]
    if all(grad is None for grad in grads):
        return [None] * len(rows)
    if torch.is_grad_enabled() or _mapped(grads):
        return _differentiable(lambda *rows: reference.row_moments(rows, *ctx.numbers), rows, grads)
    return torch.ops.solvers.row_moments_backward.default(rows, *ctx.numbers, grads, ctx.needs)


def step_backward(ctx: Any, *outer: Tensor | None) -> Any:
    """The gradients of the operator that finishes a step, for each of its inputs."""
    return (*_step_gradients(ctx, outer), *(None,) * (1 + len(ctx.spec.numbers)))


def moments_backward(ctx: Any, *outer: Tensor | None) -> Any:
    """The gradients of the operator of moments, for each of its inputs."""
    return (_moments_gradients(ctx, outer), None, None, None)


def _mapped(grads: Sequence[Tensor | None]) -> bool:
    """Whether several gradients are taken at once: the older of torch's two ways knows no operators but its own."""
    legacy = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]  # as in validation
    return any(grad is not None and (is_transformed(grad) or legacy(grad)) for grad in grads)


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
