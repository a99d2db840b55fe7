"""The states before the steps of reversible schemes, and gradients that undo them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from odenets.schemes.reversible import ReversibleScheme
from odenets.schemes.scheme import Memory
from solvers.gradients.captured import Captured
from solvers.gradients.repeats import random_state
from solvers.gradients.reversible import check_precision
from solvers.gradients.shears import Shear, loss, undone, with_gradients

__all__ = ["check_memory", "end_state", "first_state", "undoes"]

Shears = Sequence[tuple[Shear, ...]]


def _shears(scheme: ReversibleScheme, start: float, sizes: Sequence[float], before: float | None) -> Shears:
    """Those of each step; sizes as :meth:`Flow.h` and times as its steps have them."""
    shears, t = [], start
    for h in sizes:
        shears.append(scheme.shears(t, h, before))
        t, before = t + h, h
    return shears


def undoes(scheme: Any) -> bool:
    """Whether a pass of a ``scheme`` undoes steps for gradients; none does that is compiled or transformed."""
    if not (isinstance(scheme, ReversibleScheme) and scheme.reversible and torch.is_grad_enabled()):
        return False
    return not torch.compiler.is_compiling() and maybe_current_level() is None and forward_ad._current_level < 0


def end_state(
    scheme: ReversibleScheme, velocity: Callable[..., Tensor], start: float, sizes: Sequence[float], x: Tensor,
    memory: Memory | None, args: Sequence[Any], watch: bool,
) -> tuple[Tensor, Tensor | None, bool]:  # fmt: skip
    """The state behind steps, the value of its memory, with gradients that undo the steps, and whether to watch again.

    Args:
        scheme: of the steps.
        velocity: of a time, a state, the number of a step, that of the call in it, and ``args``.
        start: time of the first step.
        sizes: of the steps.
        x: state there.
        memory: of a step before.
        args: what the velocity takes besides.
        watch: what every block reads, which may be other tensors than its weights.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`solvers.gradients.shears.with_gradients`.
    """
    instead = f"solver={type(scheme).__name__}(..., reversible=False)"
    captured = Captured(velocity, None, args, names=("flow", "args", instead), random=True)
    before, value = (None, None) if memory is None else (memory.h, memory.value)
    steps = _shears(scheme, start, sizes, before)
    parts = with_gradients(captured, steps, scheme.parts(x, value), args, f"solver={scheme.name!r}", watch)
    return *scheme.whole(parts), not captured.as_it_says


def first_state(
    scheme: ReversibleScheme, velocity: Callable[..., Tensor], start: float, sizes: Sequence[float], x: Tensor,
    value: Tensor | None, before: float | None, args: Sequence[Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The state before steps, and the value of its memory, from those behind them.

    Args:
        scheme, velocity, start, sizes, args: as in :func:`end_state`.
        x, value: the state behind the last step, and the value of its memory.
        before: the size of a step before the first.

    Raises:
        TypeError: a state of half precision.
        ValueError: undoing would lose more than half of the digits, or the velocity draws random numbers.
    """
    check_precision(x, f"inverse of solver={scheme.name!r}")
    steps, factor = _shears(scheme, start, sizes, before), 1.0
    for shears in steps if before is not None else steps[1:]:
        factor *= loss(shears)
    if not factor <= (most := torch.finfo(x.dtype).eps ** -0.5):
        raise ValueError(
            f"inverse would make {factor:.2g} times of rounding in {len(steps)} steps of {scheme.name}, more than "
            f"{most:.2g}, half of the digits: take float64, fewer blocks, or a scheme that forgets less, as with a "
            "larger gamma of Momentum or a smaller one of HeavyBall"
        )
    parts = scheme.parts(x, value)
    drawn = random_state(x.device)
    for m in range(len(steps) - 1, -1, -1):
        parts = undone(steps[m], parts, lambda shear, x, m=m: velocity(shear.t, x, m, shear.call, *args))
    if not all(map(torch.equal, drawn, random_state(x.device))):
        raise ValueError(
            "inverse: the flow draws random numbers, others than those of the forward pass (dropout in training "
            "mode?): call flow.eval() before both"
        )
    return scheme.whole(parts)


def check_memory(scheme: ReversibleScheme, x: Tensor, memory: Any) -> None:
    """That a ``memory`` is given where a ``scheme`` has one, and is one of the state ``x``.

    Raises:
        ValueError: it is not.
    """
    if not scheme.memory:
        if memory is not None:
            raise ValueError(f"memory must not be given with {scheme.name}, whose steps read the state alone")
        return
    if not isinstance(memory, Tensor) or memory.shape != x.shape or memory.dtype != x.dtype:
        got = f"shape {tuple(memory.shape)}, {memory.dtype}" if isinstance(memory, Tensor) else type(memory).__name__
        raise ValueError(
            f"memory must be the residue of the last step, of the shape and dtype of the state, as {scheme.name} has a "
            f"velocity beside it, got {got}: *_, last = flow.steps(x); flow.inverse(last.x1, memory=last.residue)"
        )
