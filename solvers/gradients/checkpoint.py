"""Gradients by recomputing: the memory of a square root of the steps, and of one step's stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers.field_calls import Field
from solvers.gradients.captured import BegunAnew, Captured
from solvers.runge_kutta import rk_step
from solvers.step import Step
from solvers.tableaus import ButcherTableau

__all__ = ["Read", "recomputed"]

Time = float | Tensor


class Read(NamedTuple):
    """What is read off a step: a function of it to tensors; and whether that needs its closing stage."""

    states: Callable[[Step], list[Tensor]]
    closing: bool


class _Again:
    """``captured.again()``, to be entered any number of times."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.entered = captured, list[AbstractContextManager[Any]]()

    def __enter__(self) -> None:
        self.entered.append(self.captured.again())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def recomputed(
    captured: Captured | None, field: Field, x: Tensor, steps: Sequence[tuple[Time, Time]], tableau: ButcherTableau,
    reads: Sequence[Read | None] = (), take: Callable[..., Step] = rk_step
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The state after steps ``(t, h)``, whose gradient keeps ``2 sqrt(n)`` states and the stages of one step.

    The n steps are cut into sqrt(n) runs. Of the forward pass the first state of each run is kept; the backward pass
    goes through a run again to find the first states of its steps, and through each of these again with its stages
    (Griewank and Walther, Evaluating derivatives, chapter 12; Chen et al., 2016). Field evaluations: those of the
    steps, three times.

    Args:
        captured: what the field reads, to be as in the forward pass; None in a graph of torch.compile, which holds it.
        field, x, tableau: the velocity, which calls it, the state at the start and the method; gradients flow to
            whatever the field reads.
        steps: start and size of each.
        reads: what is read off each step; None of any, if not given.
        take: what takes a step.

    Returns:
        The state, and what was read.
    """
    closes = tableau.dense is not None

    def one(x: Tensor, t: Time, h: Time, read: Read | None) -> tuple[Tensor, ...]:
        step = take(field, t, x, h, tableau, closing=closes and read is not None and read.closing)
        return (step.x1, *(read.states(step) if read is not None else ()))

    def several(x: Tensor, run: Sequence[tuple[Time, Time, Read | None]]) -> tuple[Tensor, ...]:
        states: list[Tensor] = []
        for t, h, read in run:
            x, *more = checkpoint(one, x, t, h, read, use_reentrant=False, **contexts)  # type: ignore[misc]
            states += more
        return (x, *states)

    contexts: Any = {} if captured is None else {"context_fn": lambda: (nullcontext(), _Again(captured))}
    length = math.isqrt(max(len(steps) - 1, 0)) + 1
    runs = [(t, h, reads[i] if reads else None) for i, (t, h) in enumerate(steps)]

    def whole(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        for i in range(0, len(runs), length):
            x, *more = checkpoint(several, x, runs[i : i + length], use_reentrant=False, **contexts)  # type: ignore[misc]
            states += more
        return x, states

    try:
        return whole(x)
    except BegunAnew:
        pass  # and goes: on older torch the hooks of what was begun last as long as its error
    return whole(x)
