"""Per-sample reductions of stages and residues, and the finish of a step: each operand read once, forward and backward.

All are one operator of ``torch.library``, ``torch.ops.odenets.finish_step``, asked for one thing or another, behind
functions that check their arguments. Its kernels are loops over cached blocks on CPUs (``pip install odenets[cpu]``;
torch's own operations on blocks without it) and Triton kernels on GPUs. Under ``torch.compile``, the transforms of
``torch.func`` and forward-mode differentiation, and for the few numbers that a call of the operator would cost more
than it saves, the functions use the plain expression, which a compiler fuses, and which can be transformed and has
tangents. Sums are accumulated in float32 or wider, and come in that precision; for a given shape they are the same to
the bit whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.kernels.aten import combination, expression
from solvers.kernels.contract import Asked, Finish
from solvers.kernels.operator import finish
from solvers.tableaus import ButcherTableau
from solvers.validation import is_transformed, real_dtype

__all__ = [
    "combine",
    "displaced",
    "finish_step",
    "mean_square",
    "mean_square_and_cosine",
    "power_mean",
    "root_mean_square",
    "weighted_action",
    "weighted_root_mean_square",
]

SMALL = 1 << 14  # numbers of an operand on a CPU up to which the plain expression is the faster one

MEAN_SQUARE = Asked((1.0,), action=True)
ROOT_MEAN_SQUARE = Asked((0.0,), (1.0,), error=True)
RESIDUE = Asked((1.0,), residue=True)
DISPLACEMENT = Asked((1.0, -1.0), residue=True)


def mean_square(r: Tensor) -> Tensor:
    """``<r^2>``, the mean over the features, ``(B,)``.

    Args:
        r: ``(B, *S)``, floating.

    Raises:
        TypeError, ValueError: r is no batch of floating numbers.

    >>> mean_square(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([12.5000,  0.5000])
    """
    return _asked(_finish(None, [_checked(r)], 1.0, MEAN_SQUARE).action)


def root_mean_square(r: Tensor) -> Tensor:
    """``sqrt(<r^2>)``, ``(B,)``; the gradient where r = 0 is 0. Arguments as for :func:`mean_square`."""
    return _asked(_finish(None, [_checked(r)], 1.0, ROOT_MEAN_SQUARE).error)


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
    return _asked(_finish(None, [_checked(r)], 1.0, MEAN_SQUARE._replace(power=float(p))).action)


def mean_square_and_cosine(r: Tensor) -> tuple[Tensor, Tensor]:
    """``<r^2>`` and the cosine of r with the vector of ones, both ``(B,)`` (eq. 34); the cosine is 0 where r = 0.

    Arguments as for :func:`mean_square`.
    """
    found = _finish(None, [_checked(r)], 1.0, RESIDUE)
    return _asked(found.square), _asked(found.cosine)


def displaced(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mean_square_and_cosine` of ``x1 - x0``, which is not formed, nor kept for gradients.

    Args:
        x0, x1: ``(B, *S)``, floating, of one shape, dtype and device.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not _same(_checked(x1, "x1"), _checked(x0, "x0")):
        raise ValueError(f"x0 and x1 must have one shape, dtype and device, got {_kind(x0)} and {_kind(x1)}")
    found = _finish(None, [x1, x0], 1.0, DISPLACEMENT)
    return _asked(found.square), _asked(found.cosine)


def weighted_action(stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``h sum_i b_i <p_i^2>``: the quadrature of the kinetic energy over a step, ``(B,)``.

    Args:
        stages: velocities, each ``(B, *S)``; those whose weight is 0 are not read.
        weights: one per stage; more may follow, all 0.
        h: step size, a number or one per sample.

    Raises:
        TypeError, ValueError: stages of several shapes, dtypes or devices, or not as many as the weights need.
    """
    read, used = _read(stages, weights)
    if not read:
        raise ValueError("weights must not all be 0")
    return _asked(_finish(None, read, _per_sample(h, read[0]), Asked(used, action=True)).action)


def weighted_root_mean_square(stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``sqrt(<(h sum_i w_i p_i)^2>)``, ``(B,)``: of the displacement with the weights b, of the embedded error with its
    own; the gradient where it is 0 is 0. Arguments as for :func:`weighted_action`.
    """
    read, used = _read(stages, weights)
    if not read:
        raise ValueError("weights must not all be 0")
    asked = Asked((0.0,) * len(used), used, error=True)
    return _asked(_finish(None, read, _per_sample(h, read[0]), asked).error)


def combine(x: Tensor, stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``x + h sum_i w_i p_i``, ``(B, *S)``.

    Args:
        x: state, ``(B, *S)``.
        stages: velocities, each ``(B, *S)``; as many as the non-zero weights need.
        weights: one per stage.
        h: step size, a number or a tensor that broadcasts against ``x``.
    """
    if not torch.compiler.is_compiling() and x.numel() > SMALL and x.ndim > 1 and not _plain([x, *stages]):
        pairs = [(p, float(w)) for p, w in zip(stages, weights, strict=False) if w]
        sizes = _sizes(h, x)
        if len(pairs) > 1 and sizes is not None and all(_same(p, x) for p, _ in pairs):
            asked = Asked(tuple(w for _, w in pairs), state=True)
            return _asked(finish(x, [p for p, _ in pairs], sizes, asked).x1)
    return combination(x, stages, weights, h)


def finish_step(
    x0: Tensor,
    stages: Sequence[Tensor],
    tableau: ButcherTableau,
    h: float | Tensor,
    *,
    state: bool = True,
    error: bool = False,
    action: bool = False,
    residue: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The state at the end of a step, ``(B, *S)``, and what is asked of the step by name, each ``(B,)``.

    Each operand is read once and the state written once; the backward pass gives the gradients of the state and of
    every stage at once.

    Args:
        x0: state at the start, ``(B, *S)``.
        stages: velocities, each ``(B, *S)``: all of the method's, or all but the closing one where that is not needed.
        tableau: the method.
        h: step size, a number or one per sample.
        state: whether the state is asked; None comes in its place otherwise.
        error: "error", the root mean square of the embedded error over the features; divided, if rtol or atol is
            given, by ``atol + rtol * max(|x0|, |x1|)``.
        action: "action", ``h sum_i b_i <p_i^2>``.
        residue: "residue" and "cosine" of ``r = (x1 - x0) / h``: its mean square, and its cosine with the ones.
        rtol, atol: numbers, not negative and not both 0; one alone leaves the other at 0.

    Raises:
        TypeError, ValueError: operands of several shapes, dtypes or devices, not as many stages as the method has, no
            embedded error, or tolerances out of range.

    >>> from solvers import get_tableau
    >>> x = torch.ones(2, 3)
    >>> x1, found = finish_step(x, [-x, -0.9 * x], get_tableau("heun"), 0.1, error=True, action=True)
    >>> x1[0, 0].item(), found["error"], found["action"]
    (0.9049999713897705, tensor([0.0050, 0.0050]), tensor([0.0905, 0.0905]))
    """
    _checked(x0, "x0")
    if len(stages) not in (tableau.stages, tableau.interior):
        raise ValueError(f"stages must be the {tableau.stages} of {tableau.name}, got {len(stages)}")
    for p in stages:
        if not isinstance(p, Tensor) or not _same(p, x0):
            raise ValueError(
                "stages must have the shape, dtype and device of x0, "
                f"{_kind(x0)}, got {_kind(p) if isinstance(p, Tensor) else type(p).__name__}"
            )
    weights = tableau.error_weights
    if error and weights is None:
        raise ValueError(f"{tableau.name} carries no embedded error; use one of bs23, dopri5, heun, midpoint")
    if error and len(stages) < tableau.stages:
        raise ValueError(f"error needs the closing stage of {tableau.name}: give all {tableau.stages} stages")
    scaled = rtol is not None or atol is not None
    rtol, atol = (rtol or 0.0, atol or 0.0) if scaled else (0.0, 1.0)
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be finite, not negative and not both 0, got {rtol} and {atol}")
    asked = Asked(
        tableau.b[: len(stages)], (weights or ())[: len(stages)], float(rtol), float(atol),
        state=state, error=error, action=action, residue=residue,
    )  # fmt: skip
    if not any((state, error, action, residue)):
        return None, {}
    found = _finish(x0, list(stages), _per_sample(h, x0), asked)
    values = {"error": found.error, "action": found.action, "residue": found.square, "cosine": found.cosine}
    return found.x1, {name: value for name, value in values.items() if value is not None}


def _finish(x0: Tensor | None, stages: list[Tensor], h: float | Tensor, asked: Asked) -> Finish:
    """By the operator where it serves, else by the plain expression."""
    p = stages[0]
    operands = stages if x0 is None else [x0, *stages]
    if torch.compiler.is_compiling() or (p.numel() <= SMALL and p.device.type == "cpu") or _plain(operands):
        return expression(x0, stages, h, asked)
    return finish(x0, stages, h, asked)


def _plain(operands: Sequence[Tensor]) -> bool:
    """Whether only the plain expression serves: for torch.func and tangents, and for complex numbers."""
    if operands[0].is_complex() or any(is_transformed(x) for x in operands):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in operands)


def _asked(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _checked(r: Tensor, name: str = "r") -> Tensor:
    if not isinstance(r, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, *S), got {type(r).__name__}")
    if not (r.is_floating_point() or r.is_complex()):
        raise TypeError(f"{name} must be of a floating dtype, got {r.dtype}")
    if r.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *S) with at least one feature dimension, got {tuple(r.shape)}")
    return r


def _read(stages: Sequence[Tensor], weights: Sequence[float]) -> tuple[list[Tensor], tuple[float, ...]]:
    """The stages whose weight is not 0, and those weights."""
    if len(stages) < len(weights) and any(weights[len(stages) :]):
        raise ValueError(f"weights ask for {len(weights)} stages, got {len(stages)}")
    if len(stages) > len(weights):
        raise ValueError(f"weights must hold one per stage, got {len(weights)} for {len(stages)}")
    pairs = [(_checked(p, "stages"), float(w)) for p, w in zip(stages, weights, strict=False) if w != 0]
    for p, _ in pairs[1:]:
        if not _same(p, pairs[0][0]):
            raise ValueError(
                f"stages must have one shape, dtype and device, got {_kind(p)} beside {_kind(pairs[0][0])}"
            )
    return [p for p, _ in pairs], tuple(w for _, w in pairs)


def _same(p: Tensor, x: Tensor) -> bool:
    return p.shape == x.shape and p.dtype == x.dtype and p.device == x.device


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} {x.device}"


def _sizes(h: float | Tensor, x: Tensor) -> float | Tensor | None:
    """The step size as a number or ``(B,)`` on the device of x, or None: a tensor of another shape."""
    if not isinstance(h, Tensor):
        return h
    if h.device != x.device and h.ndim:
        return None
    h = h.to(x.device, torch.promote_types(real_dtype(x), torch.float32))
    if h.numel() == 1:
        return h.reshape(1).expand(len(x))
    return h.reshape(-1) if h.numel() == len(x) == len(h) else None


def _per_sample(h: float | Tensor, x: Tensor) -> float | Tensor:
    sizes = _sizes(h, x)
    if sizes is None:
        raise ValueError(
            f"h must be a number or one per sample on {x.device}, got shape {tuple(h.shape)} on {h.device} "  # type: ignore[union-attr]
            f"for {len(x)} samples"
        )
    return sizes
