"""The operands of reductions, checked: batches of floating numbers, stages with their weights, step sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from solvers.reductions.reference import wide_dtype

__all__ = ["alike", "check_batch", "described", "read_stages", "size_per_sample", "sizes_of"]


def check_batch(r: Tensor, name: str = "r") -> Tensor:
    """The tensor, which is a batch of floating numbers ``(B, *S)``.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(r, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, *S), got {type(r).__name__}")
    if not (r.is_floating_point() or r.is_complex()):
        raise TypeError(f"{name} must be of a floating dtype, got {r.dtype}")
    if r.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *S) with at least one feature dimension, got {tuple(r.shape)}")
    return r


def read_stages(stages: Sequence[Tensor], weights: Sequence[float] | Tensor) -> tuple[list[Tensor], Any]:
    """The stages whose weight is not 0, and those weights.

    Raises:
        TypeError, ValueError: there are none, they are not alike, or there are not as many stages as weights.
    """
    if len(stages) < len(weights) and (isinstance(weights, Tensor) or any(weights[len(stages) :])):
        raise ValueError(f"weights ask for {len(weights)} stages, got {len(stages)}")
    if len(stages) > len(weights):
        raise ValueError(f"weights must hold one per stage, got {len(weights)} for {len(stages)}")
    if isinstance(weights, Tensor):
        return [check_batch(p, "stages") for p in stages], weights
    pairs = [(check_batch(p, "stages"), float(w)) for p, w in zip(stages, weights) if w != 0]  # noqa: B905 - torch 2.8's compiler takes strict=False for True
    for p, _ in pairs[1:]:
        if not alike(p, pairs[0][0]):
            raise ValueError(
                f"stages must have one shape, dtype and device, got {described(p)} beside {described(pairs[0][0])}"
            )
    if not pairs:
        raise ValueError("weights must not all be 0")
    return [p for p, _ in pairs], tuple(w for _, w in pairs)


def alike(p: Tensor, x: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and device."""
    return p.shape == x.shape and p.dtype == x.dtype and p.device == x.device


def described(x: Tensor) -> str:
    """Shape, dtype and device, for errors."""
    return f"{tuple(x.shape)} {x.dtype} {x.device}"


def sizes_of(h: float | Tensor, x: Tensor) -> float | Tensor | None:
    """The step size as a number or ``(B,)`` on the device of x, or None: a tensor of another shape."""
    if not isinstance(h, Tensor):
        return h
    if h.device != x.device and h.ndim:
        return None
    h = h.to(x.device, wide_dtype(x))
    if h.numel() == 1:
        return h.reshape(1).expand(len(x))
    return h.reshape(-1) if h.numel() == len(x) == len(h) else None


def size_per_sample(h: float | Tensor, x: Tensor) -> float | Tensor:
    """The step size as a number or ``(B,)``.

    Raises:
        ValueError: it is neither.
    """
    sizes = sizes_of(h, x)
    if sizes is None:
        raise ValueError(
            f"h must be a number or one per sample on {x.device}, got shape {tuple(h.shape)} on {h.device} "  # type: ignore[union-attr]  # a tensor, else there are sizes
            f"for {len(x)} samples"
        )
    return sizes
