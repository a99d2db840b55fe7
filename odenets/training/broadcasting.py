"""Broadcasting that pairs each output with each target, where a loss of pairs is meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["refusing_pairs"]


@contextmanager
def refusing_pairs(output: Any, y: Any, function: object) -> Iterator[None]:
    """In which an operation on an output ``(B, 1)`` and targets ``(B,)`` that makes ``(B, B)`` of them raises.

    What takes them to one shape first, such as ``output.squeeze(1)`` or ``y.view_as(output)``, does not.

    Raises:
        ValueError: output and targets, floating tensors of one batch with different numbers of dimensions, are
            broadcast.
    """
    both = _broadcast(output, y)
    if both is None or torch.compiler.is_compiling():
        yield
        return
    name = getattr(function, "__name__", type(function).__name__)
    with warnings.catch_warnings(), _Refusing(output, y, both, name):
        warnings.filterwarnings("ignore", "Using a target size")  # which the error says
        yield


def _broadcast(output: Any, y: Any) -> torch.Size | None:
    """The shape that an output and its targets are broadcast to, where that may be in error."""
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)):
        return None
    if output.ndim == y.ndim or not (output.is_floating_point() and y.is_floating_point()):
        return None
    if not (output.ndim and y.ndim) or not len(output) == len(y) > 1:
        return None
    try:
        return torch.broadcast_shapes(output.shape, y.shape)
    except RuntimeError:
        return None


class _Refusing(TorchFunctionMode):
    """Raises where an operation has made one tensor of both."""

    def __init__(self, output: Tensor, y: Tensor, both: torch.Size, name: str) -> None:
        super().__init__()
        self.output, self.y, self.results, self.name = output.shape, y.shape, (both, torch.Size()), name

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape in self.results:
            shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if self.output in shapes and self.y in shapes:
                raise ValueError(
                    f"targets must have the shape of the output, {tuple(self.output)}, got {tuple(self.y)}, which "
                    f"{self.name} pairs with each other: {self._remedy}"
                )
        return result

    @property
    def _remedy(self) -> str:
        if len(self.y) and self.output == (*self.y, 1):
            return "pass targets y[:, None], or let the network return output.squeeze(1)"
        return "give both one shape, such as y.view_as(output)"
