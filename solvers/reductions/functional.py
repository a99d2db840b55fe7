"""Per-sample reductions of stages and residues, and the finish of a step: each operand read once, forward and backward.

The functions check their arguments and call one of two operators of ``torch.library``,
``torch.ops.solvers.row_moments`` and ``torch.ops.solvers.finish_step``, whose kernels are torch's own operations on
cached blocks on CPUs and Triton kernels on GPUs. Under ``torch.compile``, the transforms of ``torch.func`` and
forward-mode differentiation, for complex numbers, and for the few numbers that a call of an operator would cost more
than it saves, they use the plain expression, which a compiler fuses, and which can be transformed and has tangents.
Sums are accumulated in float32 or wider, and come in that precision. The operators' are taken over segments that the
shape alone decides: on a CPU they are the same to the bit whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.reductions import aten, operator, reference
from solvers.reductions.operands import alike, check_batch, described, read_stages, size_per_sample, sizes_of
from solvers.reductions.reference import Reductions, ReductionSpec, combination, wide
from solvers.tableaus import ButcherTableau
from solvers.validation import is_transformed

__all__ = [
    "combine", "displaced", "error_ratios", "finish_step", "mean_square", "mean_square_and_cosine", "power_mean",
    "root_mean_square", "weighted_action", "weighted_root_mean_square",
]  # fmt: skip

SMALL = 1 << 14
"""Numbers of an operand on a CPU up to which the plain expression is the faster one."""
SMALL_ON_GPU = 1 << 25  # the same of all operands on a GPU, where a call of an operator keeps the host busy for longer


def mean_square(r: Tensor) -> Tensor:
    """``<r^2>``, the mean over the features, ``(B,)``.

    Args:
        r: ``(B, *S)``, floating or complex.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers.

    >>> mean_square(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([12.5000,  0.5000])
    """
    return _row_moments([check_batch(r)])[0]


def root_mean_square(r: Tensor) -> Tensor:
    """``sqrt(<r^2>)``, ``(B,)``; the gradient where r = 0 is 0. Arguments as for :func:`mean_square`.

    >>> root_mean_square(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    tensor([3., 0.])
    """
    return _root(mean_square(r))


def power_mean(r: Tensor, p: float) -> Tensor:
    """``<|r|^p>``, the mean over the features, ``(B,)``: the general cost of [K24, section 3].

    Args:
        r: ``(B, *S)``, floating or complex.
        p: at least 1.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers, or p below 1.

    >>> power_mean(torch.tensor([[-2.0, 2.0]]), 3)
    tensor([8.])
    """
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be finite and at least 1, got {p}")
    return _row_moments([check_batch(r)], power=float(p))[0]


def mean_square_and_cosine(r: Tensor) -> tuple[Tensor, Tensor]:
    """``<r^2>`` and the cosine of r with the vector of ones, both ``(B,)`` [K24, eq. 34]; the cosine is 0 where r = 0.

    Without features the mean is NaN, as torch's is, and the cosine 0. Arguments as for :func:`mean_square`.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers.

    >>> mean_square_and_cosine(torch.tensor([[2.0, 2.0], [1.0, -1.0]]))
    (tensor([4., 1.]), tensor([1., 0.]))
    """
    return _square_and_cosine(r, *_row_moments([check_batch(r)], mean=True))


def displaced(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mean_square_and_cosine` of ``x1 - x0``, which is not formed, nor kept for gradients.

    Args:
        x0, x1: ``(B, *S)``, floating, of one shape, dtype and device.

    Returns:
        Mean square and cosine, both ``(B,)``.

    Raises:
        TypeError, ValueError: they are not.

    >>> displaced(torch.zeros(1, 2), torch.full((1, 2), 3.0))
    (tensor([9.]), tensor([1.]))
    """
    if not alike(check_batch(x1, "x1"), check_batch(x0, "x0")):
        raise ValueError(f"x0 and x1 must have one shape, dtype and device, got {described(x0)} and {described(x1)}")
    return _square_and_cosine(x0, *_row_moments([x1, x0], (1.0, -1.0), mean=True))


def weighted_action(stages: Sequence[Tensor], weights: Sequence[float] | Tensor, h: float | Tensor) -> Tensor:
    """``h sum_i b_i <p_i^2>``: the quadrature of the kinetic energy over a step, ``(B,)``.

    Args:
        stages: velocities, each ``(B, *S)``; those whose weight is 0 are not read.
        weights: one per stage; more may follow, all 0. A tensor ``(stages,)`` gets gradients.
        h: step size, a number or one per sample.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider.

    Raises:
        TypeError, ValueError: stages of several shapes, dtypes or devices, or not as many as the weights need.

    >>> weighted_action([torch.full((1, 4), 2.0), torch.zeros(1, 4)], (0.5, 0.5), h=0.1)
    tensor([0.2000])
    """
    read, used = read_stages(stages, weights)
    spec = ReductionSpec(b=used, e=(0.0,) * len(used), action=True)
    return _finish_step(None, read, size_per_sample(h, read[0]), spec).action  # type: ignore[return-value]  # spec computes it


def weighted_root_mean_square(stages: Sequence[Tensor], weights: Sequence[float] | Tensor, h: float | Tensor) -> Tensor:
    """``sqrt(<(h sum_i w_i p_i)^2>)``, ``(B,)``; the gradient where it is 0 is 0.

    That of the displacement with the weights b, of the embedded error with its own. The arguments ``stages``,
    ``weights`` and ``h`` are those of :func:`weighted_action`.

    Raises:
        TypeError, ValueError: as there.

    >>> weighted_root_mean_square([torch.ones(1, 4), -torch.ones(1, 4)], (1.0, -1.0), h=0.5)
    tensor([1.])
    """
    read, used = read_stages(stages, weights)
    spec = ReductionSpec(b=(0.0,) * len(used), e=used, error=True)
    return _root(_finish_step(None, read, size_per_sample(h, read[0]), spec).error)  # type: ignore[arg-type]  # spec computes it


def combine(x: Tensor, stages: Sequence[Tensor], weights: Sequence[float] | Tensor, h: float | Tensor) -> Tensor:
    """``x + h sum_i w_i p_i``, ``(B, *S)``.

    Args:
        x: state, ``(B, *S)``.
        stages: velocities, each ``(B, *S)``; as many as the non-zero weights need.
        weights: one per stage; a tensor ``(stages,)`` gets gradients.
        h: step size, a number or a tensor that broadcasts against ``x``.

    Returns:
        The state, ``(B, *S)``, in the dtype of x.

    >>> combine(torch.zeros(1, 2), [torch.ones(1, 2), torch.ones(1, 2)], (0.25, 0.75), h=0.5)
    tensor([[0.5000, 0.5000]])
    """
    if isinstance(weights, Tensor):
        return reference.weighted_combination(x, stages, weights, h)
    pairs = [(p, float(w)) for p, w in zip(stages, weights) if w]  # noqa: B905 - torch 2.8's compiler takes strict=False for True
    if len(pairs) < 2 or x.ndim < 2 or not _large([x, *stages]) or not all(alike(p, x) for p, _ in pairs):
        return combination(x, stages, weights, h)
    if x.device.type == "cpu":
        return _combine_in_place(x, pairs, h)
    sizes = sizes_of(h, x)
    if sizes is None:
        return combination(x, stages, weights, h)
    used = tuple(w for _, w in pairs)
    spec = ReductionSpec(b=used, e=(0.0,) * len(used), state=True)
    return operator.finish_step(x, [p for p, _ in pairs], sizes, spec).x1  # type: ignore[return-value]  # spec computes it


def finish_step(
    x0: Tensor, stages: Sequence[Tensor], tableau: ButcherTableau, h: float | Tensor, *, state: bool = True,
    error: bool = False, action: bool = False, residue: bool = False, rtol: float | None = None,
    atol: float | None = None
) -> tuple[Tensor | None, dict[str, Tensor]]:  # fmt: skip
    """The state at the end of a step, ``(B, *S)``, and reductions of the step by name, each ``(B,)``.

    Each operand is read once and the state written once; the backward pass gives the gradients of the state and of
    every stage at once.

    Args:
        x0: state at the start, ``(B, *S)``.
        stages: velocities, each ``(B, *S)``: all of the method's, or all but the closing one where that is not needed.
        tableau: the method.
        h: step size, a number or one per sample.
        state: whether the state is computed; None comes in its place otherwise.
        error: "error", the root mean square of the embedded error over the features; divided, if rtol or atol is
            given, by ``atol + rtol * max(|x0|, |x1|)``.
        action: "action", ``h sum_i b_i <p_i^2>``.
        residue: "residue" and "cosine" of ``r = (x1 - x0) / h``: its mean square, and its cosine with the ones.
        rtol, atol: numbers, not negative and not both 0; one alone leaves the other at 0.

    Returns:
        The state, ``(B, *S)``, or None, and the reductions by name, each ``(B,)``, in float32 or wider.

    Raises:
        TypeError, ValueError: operands of several shapes, dtypes or devices, not as many stages as the method has, no
            embedded error, or tolerances out of range.

    >>> from solvers import get_tableau
    >>> x = torch.ones(2, 3)
    >>> x1, values = finish_step(x, [-x, -0.9 * x], get_tableau("heun"), 0.1, error=True, action=True)
    >>> x1[0, 0].item(), values["error"], values["action"]
    (0.9049999713897705, tensor([0.0050, 0.0050]), tensor([0.0905, 0.0905]))
    """
    check_batch(x0, "x0")
    if len(stages) not in (tableau.stages, tableau.interior):
        raise ValueError(f"stages must be the {tableau.stages} of {tableau.name}, got {len(stages)}")
    for p in stages:
        if not isinstance(p, Tensor) or not alike(p, x0):
            raise ValueError(
                "stages must have the shape, dtype and device of x0, "
                f"{described(x0)}, got {described(p) if isinstance(p, Tensor) else type(p).__name__}"
            )
    weights = tableau.error_weights
    if error and weights is None:
        raise ValueError(f"{tableau.name} carries no embedded error: take bs23, dopri5, dopri8 or kvaerno5")
    if error and len(stages) < tableau.stages:
        raise ValueError(f"error needs the closing stage of {tableau.name}: give all {tableau.stages} stages")
    scaled = rtol is not None or atol is not None
    rtol, atol = (rtol or 0.0, atol or 0.0) if scaled else (0.0, 1.0)
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be finite, not negative and not both 0, got {rtol} and {atol}")
    spec = ReductionSpec(
        b=tableau.b[: len(stages)], e=(weights or (0.0,) * tableau.stages)[: len(stages)], rtol=float(rtol),
        atol=float(atol), state=state, error=error, action=action, residue=residue,
    )  # fmt: skip
    if not any(spec.computed):
        return None, {}
    size = size_per_sample(h, x0)
    if spec.computed == (True, False, False, False, False) and not isinstance(size, Tensor):
        return combine(x0, stages, spec.b, size), {}
    step = _finish_step(x0, stages, size, spec)
    values = {} if step.error is None else {"error": _root(step.error)}
    values |= {} if step.action is None else {"action": step.action}
    if step.square is not None and step.mean is not None:
        values["residue"], values["cosine"] = _square_and_cosine(x0, step.square, step.mean)
    return step.x1, values


def error_ratios(
    x0: Tensor, x1: Tensor, stages: Sequence[Tensor], tableau: ButcherTableau, h: Any, rtol: float, atol: float
) -> Tensor:
    """The scaled "error" of :func:`finish_step` without gradients, ``(B,)``, where the end of the step, x1, is known.

    The arguments ``x0``, ``x1``, ``stages`` (all of the ``tableau``), ``h``, ``rtol`` and ``atol`` are those of it.

    Raises:
        ValueError: h is no number and not one per sample, or as :func:`finish_step`.
    """
    if _large([x0, x1, *stages], on_gpu=0):
        weights = tableau.error_weights
        assert weights is not None
        spec = ReductionSpec(b=tableau.b, e=weights, rtol=rtol, atol=atol, error=True)
        size = size_per_sample(h, x0)
        if x0.device.type == "cpu":
            return aten.scaled_error(x0, x1, stages, size, spec).sqrt_()
        error = operator.finish_step(x0, stages, size, spec).error
        assert error is not None
        return error.sqrt()
    return finish_step(x0, stages, tableau, h, state=False, error=True, rtol=rtol, atol=atol)[1]["error"]


def _finish_step(x0: Tensor | None, stages: Sequence[Tensor], h: float | Tensor, spec: ReductionSpec) -> Reductions:
    learned = isinstance(spec.b, Tensor) or isinstance(spec.e, Tensor)
    by = operator if not learned and _large(stages if x0 is None else [x0, *stages]) else reference
    return by.finish_step(x0, stages, h, spec)


def _row_moments(
    rows: Sequence[Tensor], weights: Sequence[float] = (1.0,), power: float = 2.0, mean: bool = False
) -> tuple[Tensor, Tensor | None]:
    by = operator if _large(rows) else reference
    return by.row_moments(rows, weights, power, mean)


def _large(operands: Sequence[Tensor], on_gpu: int | None = None) -> bool:
    """Whether an operator serves and pays: not for graphs, torch.func and tangents, nor for few or complex numbers."""
    x = operands[0]
    numbers, few = x.numel(), SMALL
    if x.device.type != "cpu":
        numbers, few = numbers * len(operands), SMALL_ON_GPU if on_gpu is None else on_gpu
    if torch.compiler.is_compiling() or numbers <= few:
        return False
    if not operator.has_kernel(x) or any(is_transformed(x) for x in operands):
        return False
    return all(forward_ad.unpack_dual(x).tangent is None for x in operands)


def _combine_in_place(x: Tensor, pairs: Sequence[tuple[Tensor, float]], h: float | Tensor) -> Tensor:
    """:func:`combination` into one new tensor: an allocation costs more than an addition."""
    (p, weight), *rest = [(wide(p), w) for p, w in pairs]
    if not isinstance(h, Tensor):
        total = torch.add(x.to(p.dtype), p, alpha=h * weight)
        for p, weight in rest:
            total.add_(p, alpha=h * weight)
        return total.to(x.dtype)
    total = p * weight
    for p, weight in rest:
        total.add_(p, alpha=weight)
    return total.mul_(h).add_(x).to(x.dtype)


def _root(square: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    rest = square == 0
    return torch.where(rest, 0, torch.where(rest, 1, square).sqrt())


def _square_and_cosine(r: Tensor, square: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean square and the cosine with the ones, which is 0 where the mean square is, and if r has no features."""
    assert mean is not None
    rest = square == 0 if r.numel() else torch.ones_like(square, dtype=torch.bool)
    return square, torch.where(rest, 0, mean) / torch.where(rest, 1, square).sqrt()
