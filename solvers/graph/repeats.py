"""Loops of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch.utils._pytree import tree_leaves

__all__ = ["at_least_once", "plain"]


def at_least_once(goes: Callable[..., Any], one: Callable[..., Any], begun: tuple[Any, ...]) -> Any:
    """``torch.while_loop``, with a first pass in any case, which changes nothing where ``goes`` is false.

    A loop without a pass returns, where it is compiled to C++ (torch 2.14), the memory of what it was given, which the
    compiler takes for free and writes over.
    """
    device = next(x.device for x in tree_leaves(begun))

    def again(once: Any, *carried: Any) -> Any:
        return ~once | goes(*carried)

    def body(once: Any, *carried: Any) -> Any:
        return (torch.ones_like(once), *one(*carried))

    return while_loop(again, body, (torch.zeros((), dtype=torch.bool, device=device), *begun))[1:]


def plain(x: Tensor) -> Tensor:
    """A copy in the order of its dimensions: a loop returns what is laid out as what it was given."""
    return x.clone(memory_format=torch.contiguous_format)
