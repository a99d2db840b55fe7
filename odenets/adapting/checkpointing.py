"""Measures of what activation checkpointing computes again: they are computed once, and keep what they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from odenets.measures import StepFunction, measure, needs_closing
from odenets.measures.marking import Measure
from solvers import Step

__all__ = ["measured_once", "outside_checkpoints"]


def _checkpointed() -> bool:
    """Whether something else than autograd holds what gradients need, as ``torch.utils.checkpoint`` does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]


@contextmanager
def outside_checkpoints() -> Iterator[None]:
    """What is computed within is kept for its gradient, and not computed again.

    ``torch.utils.checkpoint`` runs the function again in the backward pass, without what was computed in hooks beside
    it, and compares what is saved for gradients in both runs.

    >>> from torch.utils.checkpoint import checkpoint
    >>> values = []
    >>> def block(x):
    ...     y = x.sin()
    ...     if not values:  # in the forward pass alone
    ...         with outside_checkpoints():
    ...             values.append(y.square().mean())
    ...     return y
    >>> x = torch.ones(3, requires_grad=True)
    >>> (checkpoint(block, x, use_reentrant=False).sum() + values[0]).backward()
    >>> x.grad.shape
    torch.Size([3])
    """
    if not _checkpointed():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_keep, _kept):
        yield


def _keep(x: Tensor) -> tuple[Tensor, int]:
    return x.detach(), x._version  # an output that is kept itself would keep the graph that keeps it


def _kept(saved: tuple[Tensor, int]) -> Tensor:
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} that the gradient of a measure needs has been changed in place: give "
            "the layers after it inplace=False"
        )
    return x


def measured_once(name: str, function: StepFunction) -> StepFunction:
    """The measure ``function`` of flows, which is not computed again where it is in a checkpoint.

    Its values and gradients are those of the measure. Elsewhere it is the measure itself.

    Raises:
        ValueError: when it is called with a closing stage, which the second run would lack, or is integrated beside
            the state.
    """
    if not _checkpointed():
        return function

    @wraps(function)
    def once(step: Step, **options: Any) -> Tensor:
        if len(step.stages) > step.tableau.interior:
            raise ValueError(
                f"measure {name!r} may read the closing stage of {step.tableau.name}, which activation checkpointing "
                "would not compute again: leave checkpointing off around the flow, or mark the measure with "
                "measure(closing=False) if it does not"
            )
        with outside_checkpoints():
            return function(step._replace(reductions=None), **options)

    def refuse(v: Tensor, **_: Any) -> Tensor:
        raise ValueError(
            f"measure {name!r} is integrated beside the state of a neural ODE, which activation checkpointing would "
            "not do again: leave checkpointing off around it, which has gradient='checkpoint' of its own"
        )

    if isinstance(function, Measure):
        integrand = None if function.integrand is None else refuse
        return replace(function, function=once, options=(), reductions=frozenset(), integrand=integrand)
    return measure(closing=needs_closing(function))(once)
