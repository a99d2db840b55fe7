"""Copies of the inputs of a model, into which a pass may write, as into a cache of earlier tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["copied"]


class _Cloning(TorchFunctionMode):
    """Copies tensors that are results of others too, which have no deep copies otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            x, memo = args
            return memo.setdefault(id(x), x.clone())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def copied(inputs: Any) -> Any:
    """The ``inputs``, each copied once, without gradients; what has no copy is itself.

    >>> x = torch.zeros(2)
    >>> (one,), named = copied(((x,), {"x": x}))
    >>> one is named["x"], one is x
    (True, False)
    """
    memo: dict[int, Any] = {}

    def copy_of(x: Any) -> Any:
        try:
            return copy.deepcopy(x, memo)
        except Exception:
            return x

    with _Cloning():
        return tree_map(copy_of, inputs)
