"""``torch.ops.odenets.finish_step``: the finish of a step as an operator of torch.library, with a kernel per device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from solvers.kernels import aten
from solvers.kernels.aten import expression
from solvers.kernels.contract import Asked, Finish, wide_dtype

__all__ = ["finish"]

STATE, ERROR, ACTION, RESIDUE = 1, 2, 4, 8

_library = torch.library.Library("odenets", "DEF")
_ARGUMENTS = (
    "Tensor? x0, Tensor[] stages, Tensor? sizes, float h, float[] b, float[] e, float rtol, float atol, float power, "
    "int asked"
)
_library.define(
    f"finish_step({_ARGUMENTS}) -> (Tensor x1, Tensor error, Tensor action, Tensor square, Tensor cosine)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"finish_step_backward({_ARGUMENTS}, Tensor?[] grads, Tensor[] values, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def finish(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """What is asked of a step, in one pass over memory, forward and backward.

    Args:
        x0: state ``(B, *S)``, if the state or a scaled error is asked.
        stages: velocities ``(B, *S)``, one per weight.
        h: step size, a number or one per sample, ``(B,)``.
        asked: what is asked.
    """
    x0 = x0 if asked.state or asked.scaled else None
    unseen = _unseen((x0, *stages, h), stages[0].device.type)
    if unseen and not _in_graph((x0, *stages, h)):
        kernels = _kernels(stages, h, asked)
        return (aten if kernels is None else kernels).forward(x0, stages, h, asked)
    sizes, number = (h, 1.0) if isinstance(h, Tensor) else (None, float(h))
    bits = STATE * asked.state + ERROR * asked.error + ACTION * asked.action + RESIDUE * asked.residue
    rest = (number, asked.b, asked.e or (0.0,) * len(asked.b), asked.rtol, asked.atol, asked.power, bits)
    if unseen:
        found = _Eager.apply(rest, x0, sizes, *stages)
    else:
        found = torch.ops.odenets.finish_step.default(x0, stages, sizes, *rest)
    wanted = (asked.state, asked.error, asked.action, asked.residue, asked.residue)
    return Finish(*(value if want else None for value, want in zip(found, wanted, strict=True)))


def _unseen(operands: Sequence[Any], device: str) -> bool:
    """Whether nobody is to know of a call: no mode that traces or counts, no autocast, no subclass of tensors."""
    if any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in operands):
        return False
    return not torch._C._len_torch_dispatch_stack() and not torch.is_autocast_enabled(device)  # type: ignore[attr-defined]


def _in_graph(operands: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in operands)


# -- kernels ------------------------------------------------------------------------------------------------------


@functools.cache
def _numba() -> ModuleType | None:
    """The kernels for CPUs, where Numba is installed and knows this NumPy."""
    try:
        return importlib.import_module("solvers.kernels.cpu")
    except ImportError:
        return None


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels for GPUs, where Triton is installed."""
    try:
        return importlib.import_module("solvers.kernels.gpu")
    except ImportError:
        return None


def _kernels(stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Any:
    """The module whose kernels serve these operands, or None: torch's own operations do."""
    p = stages[0]
    found = _numba() if p.device.type == "cpu" else _triton() if p.device.type == "cuda" else None
    return found if found is not None and p.numel() and found.serves(stages, h, asked) else None


def _read(b: Sequence[float], e: Sequence[float], rtol: float, atol: float, power: float, bits: int) -> Asked:
    wants = (bool(bits & bit) for bit in (STATE, ERROR, ACTION, RESIDUE))
    return Asked(tuple(b), tuple(e), rtol, atol, power, *wants)


def _finish_step(
    x0: Tensor | None, stages: Sequence[Tensor], sizes: Tensor | None, h: float, *asks: Any
) -> tuple[Tensor, ...]:
    asked = _read(*asks)
    size = h if sizes is None else sizes
    kernels = _kernels(stages, size, asked)
    return _full((aten if kernels is None else kernels).forward(x0, stages, size, asked), stages[0])


def _fake(x0: Tensor | None, stages: Sequence[Tensor], sizes: Tensor | None, h: float, *asks: Any) -> Any:
    asked, p = _read(*asks), stages[0]
    x1 = torch.empty_like(p) if asked.state else None
    values = (
        p.new_empty(len(p), dtype=wide_dtype(p)) if want else None
        for want in (asked.error, asked.action, asked.residue, asked.residue)
    )
    return _full(Finish(x1, *values), p)


def _full(found: Finish, p: Tensor) -> tuple[Tensor, ...]:
    """An empty tensor for each value that was not asked."""
    return tuple(p.new_empty(0) if value is None else value for value in found)


def _finish_step_backward(
    x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *rest: Any
) -> list[Tensor]:
    *asks, grads, values, needs = rest
    asked, size = _read(*asks), h if sizes is None else sizes
    kernels = _kernels(stages, size, asked)
    if kernels is None:
        found = aten.backward(x0, stages, size, asked, Finish(*grads), needs)
    else:
        found = kernels.backward(x0, stages, size, asked, Finish(*grads), Finish(None, *values), needs)
    return [stages[0].new_empty(0) if grad is None else grad for grad in found]


def _fake_backward(x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, h: float, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(stages[0]) if need else stages[0].new_empty(0) for need in rest[-1]]


# -- gradients ----------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """The operator where nobody is to know of the call: the same, without the way through torch.library."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rest: tuple[Any, ...], x0: Tensor | None, sizes: Tensor | None, *stages: Tensor
    ) -> tuple[Tensor, ...]:
        found = _finish_step(x0, stages, sizes, *rest)
        _remember(ctx, x0, stages, sizes, rest, found)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        _, needs_x0, needs_sizes, *needs_stages = ctx.needs_input_grad
        of_x0, of_stages, of_sizes = _gradients(ctx, outer, needs_x0, needs_stages, needs_sizes)
        return (None, of_x0, of_sizes, *of_stages)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x0, stages, sizes, *rest = inputs
    _remember(ctx, x0, stages, sizes, rest, output)


def _backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
    of_x0, of_stages, of_sizes = _gradients(ctx, outer, *ctx.needs_input_grad[:3])
    return (of_x0, of_stages, of_sizes, *(None,) * 7)


def _remember(
    ctx: Any,
    x0: Tensor | None,
    stages: Sequence[Tensor],
    sizes: Tensor | None,
    rest: Sequence[Any],
    output: tuple[Tensor, ...],
) -> None:
    """Keep what the gradients need."""
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.count = rest, len(stages)
    ctx.linear = rest[-1] == STATE and (sizes is None or not sizes.requires_grad)
    ctx.ends = _of_its_ends(x0, stages, sizes, rest)
    # Gradients of a state alone do not depend on what it was made of: nothing is kept. The velocity of a single stage
    # is what lies between the states, which the layers before and after the step keep anyway.
    kept = [x0, output[0]] if ctx.ends else [x0, *stages]
    ctx.save_for_backward(sizes, *(() if ctx.linear else (*kept, *output[1:])))


def _of_its_ends(x0: Tensor | None, stages: Sequence[Tensor], sizes: Tensor | None, numbers: Sequence[Any]) -> bool:
    """Whether the one stage can be found again as ``(x1 - x0) / h``."""
    h, b, *_, bits = numbers
    exact = len(stages) == 1 and stages[0].dtype in (torch.float32, torch.float64)
    return exact and bool(bits & STATE) and x0 is not None and sizes is None and h * b[0] != 0


def _gradients(
    ctx: Any, outer: tuple[Tensor | None, ...], needs_x0: bool, needs_stages: Sequence[bool], needs_sizes: bool
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """The gradients of the state, the stages and the step sizes."""
    (h, *asks), (sizes, *saved) = ctx.numbers, ctx.saved_tensors
    asked = _read(*asks)
    wants = (asked.state, asked.error, asked.action, asked.residue, asked.residue)
    grads = [grad if want else None for grad, want in zip(outer, wants, strict=True)]
    if all(grad is None for grad in grads):
        return None, [None] * ctx.count, None
    if ctx.linear:
        saved = [grads[0]] * (1 + ctx.count)  # read for their shape
    x0, stages, values = saved[0], saved[1 : 1 + ctx.count], saved[1 + ctx.count :]
    by_ends = ctx.ends and not ctx.linear  # stages holds the state at the end instead
    length = h * asked.b[0]
    if torch.is_grad_enabled() or needs_sizes:
        stages = [(stages[0] - x0) / length] if by_ends else stages
        return _differentiable(x0, stages, h if sizes is None else sizes, asked, Finish(*grads))
    passed_on = grads[1] is None or not asked.scaled  # the gradient of x0 is then that of x1, as it is
    needs = [needs_x0 and not passed_on, *needs_stages]
    of_x0, of_stages = (grads[0] if needs_x0 else None), [None] * ctx.count
    if not any(needs):
        return of_x0, of_stages, None
    if by_ends and length == 1 and asked.power == 2 and grads[1] is None:
        # of r = x1 - x0, which is not formed: its action is its mean square, and it adds to x1 as x1 would
        _, _, of_action, of_square, of_cosine = grads
        of_square = of_square if of_action is None else of_action if of_square is None else of_action + of_square
        grads, stages, needs = (
            [grads[0], None, None, of_square, of_cosine],
            [stages[0], x0],
            [False, *needs_stages, False],
        )
        h, asks = 1.0, [(1.0, -1.0), (0.0, 0.0), 0.0, 1.0, 2.0, STATE | RESIDUE]
    elif by_ends:
        stages = [(stages[0] - x0) / length]
    unseen = _unseen((x0, *stages, *grads), stages[0].device.type)
    backward = _finish_step_backward if unseen else torch.ops.odenets.finish_step_backward.default
    found = backward(x0, stages, sizes, h, *asks, grads, values, needs)
    changed, *of_stages = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return (of_x0 if passed_on else changed), of_stages[: ctx.count], None


def _differentiable(
    x0: Tensor | None, stages: list[Tensor], h: float | Tensor, asked: Asked, grads: Finish
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """The gradients of the state, the stages and the step sizes, by operations that can be differentiated again."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x0, h, *stages = leaves = [leaf(x) for x in (x0, h, *stages)]
        values = expression(x0, stages, h, asked)
    pairs = [(v, grad) for v, grad in zip(values, grads, strict=True) if v is not None and grad is not None]
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    outs = iter(
        torch.autograd.grad(
            [v for v, _ in pairs], inputs, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    )
    of_x0, of_h, *of_stages = [next(outs) if isinstance(x, Tensor) else None for x in leaves]
    return of_x0, of_stages, of_h


# -- what torch.library is told -----------------------------------------------------------------------------------


def _mapped(info: Any, in_dims: Any, x0: Tensor | None, stages: list[Tensor], sizes: Tensor | None, *rest: Any) -> Any:
    """The batching rule: the mapped dimension joins the batch."""
    size = info.batch_size

    def joined(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    of_x0, of_stages, of_sizes, *_ = in_dims
    operands = [joined(p, dim) for p, dim in zip(stages, of_stages, strict=True)]
    found = torch.ops.odenets.finish_step.default(joined(x0, of_x0), operands, joined(sizes, of_sizes), *rest)
    asked = _read(*rest[1:])
    wants = (asked.state, asked.error, asked.action, asked.residue, asked.residue)
    return tuple(
        value.unflatten(0, (size, -1)) if want else value.expand(size, 0)
        for value, want in zip(found, wants, strict=True)
    ), (0,) * len(found)


def _autocast(x0: Tensor | None, stages: Sequence[Tensor], *rest: Any) -> Any:
    """Under autocast the operands may be of several precisions: the state, or else the widest, says which."""
    dtype = x0.dtype if x0 is not None else functools.reduce(torch.promote_types, [p.dtype for p in stages])
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)  # type: ignore[attr-defined]
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return torch.ops.odenets.finish_step.default(x0, [p.to(dtype) for p in stages], *rest)


_library.impl("finish_step", _finish_step, "CompositeExplicitAutograd")
_library.impl("finish_step_backward", _finish_step_backward, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("finish_step", _autocast, _key)
torch.library.register_fake("odenets::finish_step", _fake, lib=_library)
torch.library.register_fake("odenets::finish_step_backward", _fake_backward, lib=_library)
torch.library.register_autograd("odenets::finish_step", _backward, setup_context=_setup, lib=_library)
torch.library.register_vmap("odenets::finish_step", _mapped, lib=_library)
