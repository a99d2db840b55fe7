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

from solvers.reductions import aten, autograd
from solvers.reductions.reference import HALF, Reductions, ReductionSpec, rows_of, wide_dtype

__all__ = ["finish_step", "has_kernel", "row_moments"]

_SPEC = "float[] b, float[] e, float rtol, float atol, bool state, bool error, bool action, bool residue"
_STAGES = f"Tensor[] stages, Tensor? sizes, float h, {_SPEC}"
_ROWS = "Tensor[] rows, float[] weights, float power, bool mean"
_library = torch.library.Library("solvers", "DEF")
for _schema in (
    f"finish_step(Tensor? x0, {_STAGES}) -> (Tensor x1, Tensor error, Tensor action, Tensor square, Tensor mean)",
    f"finish_step_backward({_STAGES}, Tensor?[] grads, bool[] needs) -> Tensor[]",
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
        values = autograd.FinishStep.apply(x0, sizes, (number, *spec.numbers), *stages)
    else:
        values = torch.ops.solvers.finish_step.default(x0, stages, sizes, number, *spec.numbers)
    return Reductions.of(value if computed else None for value, computed in zip(values, spec.computed, strict=True))


def row_moments(
    rows: Sequence[Tensor], weights: Sequence[float], power: float, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`solvers.reductions.reference.row_moments`, in one pass over memory, forward and backward."""
    if torch.is_grad_enabled():
        of_power, of_mean = autograd.RowMoments.apply((weights, power, mean), *rows)
    else:
        of_power, of_mean = torch.ops.solvers.row_moments.default(rows, weights, power, mean)
    return of_power, of_mean if mean else None


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


def _finish_step_backward(stages: list[Tensor], sizes: Tensor | None, h: float, *rest: Any) -> Any:
    *numbers, grads, needs = rest
    p, size, spec = stages[0], h if sizes is None else sizes, ReductionSpec.of(numbers)
    return _full(_kernels(p).finish_step_backward(stages, size, spec, Reductions.of(grads), needs), p)


def _row_moments(rows: list[Tensor], *numbers: Any) -> Any:
    return tuple(_full(_kernels(rows[0]).row_moments(rows, *numbers), rows[0]))


def _row_moments_backward(
    rows: list[Tensor], weights: list[float], power: float, mean: bool, grads: list[Tensor | None], needs: list[bool]
) -> Any:
    return _full(_kernels(rows[0]).row_moments_backward(rows, weights, power, *grads, needs), rows[0])


def _fake_step(x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *numbers: Any) -> Any:
    p = rows_of([*stages, *([] if x0 is None else [x0])])[0]
    state, *others = ReductionSpec.of(numbers).computed
    values = (p.new_empty(len(p), dtype=wide_dtype(p)) if computed else None for computed in others)
    return tuple(_full([torch.empty_like(p) if state else None, *values], p))


def _fake_moments(rows: list[Tensor], weights: list[float], power: float, mean: bool) -> Any:
    x = rows[0]
    return tuple(_full([x.new_empty(len(x), dtype=wide_dtype(x)) if each else None for each in (True, mean)], x))


def _fake_step_backward(stages: list[Tensor], *rest: Any) -> list[Tensor]:
    grads, needs = rest[-2:]
    p = rows_of(stages if grads[0] is None else [*stages, grads[0]])[0]
    return _full([torch.empty_like(p) if need else None for need in needs], p)


def _fake_moments_backward(rows: list[Tensor], *rest: Any) -> list[Tensor]:
    p = rows_of(rows)[0]
    return _full([torch.empty_like(p) if need else None for need in rest[-1]], p)


def _mapped(name: str) -> Callable[..., Any]:
    """The batching rule of an operator: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        def joined(x: Any, dim: Any) -> Any:
            if isinstance(x, (list, tuple)) and any(isinstance(each, Tensor) for each in x):
                return [joined(each, d) for each, d in zip(x, dim, strict=True)]
            if not isinstance(x, Tensor):
                return x
            return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        operator = getattr(torch.ops.solvers, name).default
        values = operator(*(joined(x, dim) for x, dim in zip(arguments, in_dims, strict=True)))
        kind = type(values)
        return kind(v.unflatten(0, (info.batch_size, -1)) for v in values), kind([0] * len(values))

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
    torch.library.register_vmap(f"solvers::{_name}", _mapped(_name), lib=_library)
for _name, _backward, _keep in (
    ("finish_step", autograd.step_backward, autograd.keep_step),
    ("row_moments", autograd.moments_backward, autograd.keep_rows),
):
    torch.library.register_autograd(f"solvers::{_name}", _backward, setup_context=_keep, lib=_library)
