"""The finish of a step in torch's own operations: the reference, what is differentiated, and the kernel of last resort.

:func:`expression` is the mathematics. A compiler fuses it; the transforms of ``torch.func``, forward-mode and higher
derivatives go through it. :func:`forward` and :func:`backward` apply it to a few samples at a time, so that its
temporaries stay in a CPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from solvers.kernels.contract import Asked, Finish

__all__ = ["backward", "combination", "expression", "forward"]

HALF = (torch.float16, torch.bfloat16)
BLOCK = 1 << 16  # numbers of one operand: several operands and temporaries of a block fit the second-level cache


def expression(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """What is asked of a step.

    Args:
        x0: state ``(B, *S)``, if the state or a scaled error is asked.
        stages: velocities ``(B, *S)``.
        h: step size, a number or one per sample, ``(B,)``.
        asked: what is asked.
    """
    p = stages[0]
    n, features = math.prod(p.shape[1:]), tuple(range(1, p.ndim))
    size = h.reshape(-1, *[1] * (p.ndim - 1)) if isinstance(h, Tensor) else h
    r = x1 = error = action = square = cosine = wide_x0 = wide_x1 = None
    if asked.residue:
        r = _weighted(stages, asked.b)
    if asked.state or asked.scaled:
        assert x0 is not None
        wide_x0 = x0.float() if x0.dtype in HALF else x0
        wide_x1 = combination(wide_x0, stages, asked.b, size)
        x1 = wide_x1.to(p.dtype) if x0.dtype in HALF else wide_x1
    if asked.error:
        scaled = _weighted(stages, asked.e) * size
        if asked.scaled:
            assert wide_x0 is not None
            assert wide_x1 is not None
            scaled = scaled / (asked.atol + asked.rtol * torch.maximum(wide_x0.abs(), wide_x1.abs()))
        elif asked.atol != 1:
            scaled = scaled / asked.atol
        error = _root(_squares(scaled).sum(features) / n)
    if asked.action:
        powers = (_powers(q, asked.power).sum(features) * b for q, b in zip(stages, asked.b, strict=True) if b)
        action = h * (sum(powers) / n)
    if asked.residue:
        assert r is not None
        squares = _squares(r).sum(features)
        square = squares / n
        rest = squares == 0
        cosine = torch.where(rest, 0, r.sum(features)) / torch.where(rest, 1, _root(squares) * math.sqrt(n))
    return Finish(x1 if asked.state else None, error, action, square, cosine)  # type: ignore[arg-type]


def combination(x: Tensor, stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``x + h sum_i w_i p_i`` in the dtype of x, one operation per weight that is not 0, in float32 or wider.

    Args:
        x, stages: ``(B, *S)``.
        weights: one per stage; more of either are not read.
        h: a number, or a tensor that broadcasts against x.
    """
    if x.dtype in HALF:
        return combination(x.float(), stages, weights, h).to(x.dtype)
    for p, weight in zip(stages, weights, strict=False):
        if weight:
            if isinstance(h, Tensor):
                x = torch.addcmul(x, p.float() if p.dtype in HALF else p, h, value=weight).to(x.dtype)
            else:
                x = torch.add(x, p, alpha=h * weight)
    return x


def forward(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """:func:`expression` without a graph, a few samples at a time."""
    parts = [expression(*part, asked) for _, *part in _blocks(x0, stages, h)]  # type: ignore[arg-type]
    if len(parts) == 1:
        return parts[0]
    return Finish(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))


def backward(
    x0: Tensor | None,
    stages: Sequence[Tensor],
    h: float | Tensor,
    asked: Asked,
    grads: Finish,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x0 and of each stage, None where none is needed, a few samples at a time.

    Args:
        x0, stages, h, asked: as for :func:`expression`; a state that is not needed may be None.
        grads: of what was found, None for 0.
        needs: whether x0 and each stage needs a gradient.
    """
    found: list[Tensor | None] = [
        torch.empty_like(x) if x is not None and need else None for x, need in zip((x0, *stages), needs, strict=True)
    ]
    for samples, x0_part, stage_parts, size in _blocks(x0, stages, h):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (x0_part, *stage_parts)]
        with torch.enable_grad(), _autograd():
            values = expression(leaves[0], leaves[1:], size, asked)  # type: ignore[arg-type]
        pairs = [(v, g[samples]) for v, g in zip(values, grads, strict=True) if v is not None and g is not None]
        inputs = [(i, leaf) for i, leaf in enumerate(leaves) if leaf is not None and found[i] is not None]
        outs = torch.autograd.grad(
            [v for v, _ in pairs], [leaf for _, leaf in inputs], [g for _, g in pairs], materialize_grads=True
        )
        for (i, _), grad in zip(inputs, outs, strict=True):
            found[i][samples] = grad  # type: ignore[index]
    return found


def _autograd() -> AbstractContextManager[None]:
    """Lets a graph be made below autograd too, where an operator runs that a dispatch mode has let through."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _blocks(
    x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor
) -> Iterator[tuple[slice, Tensor | None, list[Tensor], float | Tensor]]:
    """A few samples at a time: where they lie, their state, stages and step sizes."""
    batch = len(stages[0])
    rows = max(1, BLOCK // max(1, math.prod(stages[0].shape[1:])))
    for i in range(0, max(batch, 1), rows):
        part = slice(i, i + rows)
        size = h[part] if isinstance(h, Tensor) else h
        yield part, None if x0 is None else x0[part], [p[part] for p in stages], size


def _weighted(stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i p_i`` over the weights that are not 0, in float32 or wider."""
    (p, weight), *rest = [(p, w) for p, w in zip(stages, weights, strict=True) if w != 0]
    wide = torch.promote_types(p.dtype, torch.float32)
    total = p.to(wide) if weight == 1 else p.to(wide) * weight
    for p, weight in rest:
        total = torch.add(total, p.to(wide), alpha=weight)
    return total


def _squares(x: Tensor) -> Tensor:
    """``|x|^2``, of real or complex numbers."""
    return (x.real.square() + x.imag.square()) if x.is_complex() else x.square()


def _powers(x: Tensor, p: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _squares(x) if p == 2 else x.abs() if p == 1 else x.abs().pow(p)


def _root(x: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    rest = x == 0
    return torch.where(rest, 0, torch.where(rest, 1, x).sqrt())
