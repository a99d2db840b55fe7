"""Calls of a velocity field, checked: what it returns, and that it writes neither there nor into its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling

__all__ = [
    "Field", "call_field", "check_unchanged", "checked", "countable", "counting", "overwritten", "uncounted",
    "velocity", "versions_of",
]  # fmt: skip

Field = Callable[[float | Tensor, Tensor], Tensor]
"""A velocity field ``v(t, x)``, of a time (a number, or a tensor that broadcasts) and a state ``(B, *S)``."""


def checked(p: Tensor, x: Tensor, stage: int) -> Tensor:
    """The stage, in the dtype of x: autocast computes it in a narrower one."""
    if isinstance(p, Tensor) and p.shape == x.shape and p.dtype == x.dtype and p.device == x.device:
        return p
    if not isinstance(p, Tensor):
        raise TypeError(f"field must return a tensor, got {type(p).__name__} at stage {stage}")
    if p.shape != x.shape:
        raise ValueError(
            f"field must keep the shape of x: stage {stage} has shape {tuple(p.shape)}, x has {tuple(x.shape)}"
        )
    if p.device != x.device:
        raise ValueError(f"field must keep the device of x: stage {stage} is on {p.device}, x on {x.device}")
    if p.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"field must keep the dtype of x: stage {stage} is {p.dtype}, x is {x.dtype}")
    return p.to(x.dtype)


def velocity(field: Field, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
    """One call of the field, checked as :func:`~solvers.rk_step` checks it.

    Raises:
        ValueError, TypeError: as there.
    """
    if not is_compiling() and is_inference_mode_enabled():
        with counting():
            return velocity(field, t, countable(x), stage)
    return call_field(field, t, x, stage, uncounted(x))


def call_field(field: Field, t: float | Tensor, x: Tensor, stage: int, uncounted: bool, own: bool = False) -> Tensor:
    """:func:`velocity`, where torch may count no writes (``uncounted``) and x may be the step's ``own``."""
    if uncounted:  # copies, lest a write reaches x, unless it is the step's own, or what has come back
        return checked(field(t, x if own else x.clone()), x, stage).clone()
    version = x._version
    p = field(t, x)
    if x._version != version:
        raise overwritten(stage)
    p = checked(p, x, stage)
    return p.clone() if p.is_inference() else p


def uncounted(x: Tensor) -> bool:
    """Whether torch counts no writes: in a compiled graph, under torch.func, and for tensors of inference mode."""
    return is_compiling() or maybe_current_level() is not None or x.is_inference()


@contextmanager
def counting() -> Iterator[None]:
    """In inference mode: torch counts writes again, and keeps no graph all the same."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def countable(x: Tensor) -> Tensor:
    """The tensor, or a copy of one of inference mode: the first state of a solve, the others are none."""
    return x.clone() if x.is_inference() else x


def versions_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often torch counted a write into each, for :func:`check_unchanged`; None where it does not count."""
    try:
        return None if is_compiling() else [p._version for p in tensors]
    except RuntimeError:  # tensors of inference mode
        return None


def check_unchanged(stages: Sequence[Tensor], versions: Sequence[int] | None) -> None:
    """Raise if a stage was written into since its version was taken.

    Raises:
        ValueError: it was; the message names the stage.
    """
    for i, version in enumerate(versions or ()):
        if stages[i]._version != version:
            raise ValueError(
                f"field must not write into what it has returned: stage {i} was overwritten while it was in use; let "
                "the field return a new tensor at every call, as with p.clone()"
            )


def overwritten(stage: int) -> ValueError:
    """The error of a field that writes into its input."""
    return ValueError(
        f"field must not write into its input: stage {stage} changed x in place; let it begin with x = x.clone(), or "
        "make its first operation a new tensor, as nn.ReLU(inplace=False)"
    )
