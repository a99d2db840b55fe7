"""What a call of a field reads: the tensors with a gradient that its outputs were computed from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LaterReads", "mark", "reads"]


def mark() -> int:
    """A number that is less than those of all nodes made from here on, on this thread."""
    with torch.enable_grad():
        return torch.zeros((), dtype=torch.float32, requires_grad=True).view(()).grad_fn._sequence_nr()  # type: ignore[union-attr]


class LaterReads:
    """Looks in a backward pass at what each call reads, for what no watched call has, whose gradient would be lost.

    A tensor that the field makes itself is another at every call.

    Args:
        params: what gets gradients.
        lost: says of a tensor that it is lost; None where no other is to get one.
    """

    def __init__(self, params: Sequence[Tensor], lost: Callable[[str], str] | None) -> None:
        self._begun, self._lost = mark(), lost
        self._known = {id(x): i for i, x in enumerate(params) if x.grad_fn is None}
        self._stops = {(x.grad_fn, x.output_nr): i for i, x in enumerate(params) if x.grad_fn is not None}
        self._seen = dict[int, weakref.ref[Tensor]]()
        self._last = set[int]()

    def see(self, output: Tensor, state: Tensor) -> list[int]:
        """Which of the parameters an output of a call with a state was computed from.

        Raises:
            RuntimeError: it was also from a tensor that gets no gradient and is not the call's own.
        """
        leaves, outside = reads([output], self._begun, set(self._stops))
        read = [self._known[id(x)] for x in leaves if id(x) in self._known]
        read += [self._stops[edge] for edge in outside if edge in self._stops]
        if self._lost is not None:
            if others := [node for node, number in outside if (node, number) not in self._stops]:
                raise RuntimeError(self._lost(f"a tensor computed outside of it ({type(others[0]).__name__})"))
            new = {id(x): x for x in leaves if x is not state and id(x) not in self._known}
            for key, x in new.items():
                if key in self._seen and self._seen[key]() is x:
                    self._raise(x)
            self._seen |= {key: weakref.ref(x) for key, x in new.items()}
            self._last = set(new)
        return read

    def close(self) -> None:
        """The pass is over.

        Raises:
            RuntimeError: a tensor that one call read has outlived it.
        """
        for key, reference in self._seen.items():
            if key not in self._last and (x := reference()) is not None:
                self._raise(x)

    def _raise(self, x: Tensor) -> None:
        assert self._lost is not None
        raise RuntimeError(self._lost(f"a tensor of shape {tuple(x.shape)}"))


def reads(
    outputs: list[Tensor], begun: int, stops: set[Any], edges: Sequence[tuple[Any, int]] = ()
) -> tuple[list[Tensor], list[tuple[Any, int]]]:
    """The leaves that tensors depend on, and the edges to what was computed before ``begun`` or is in ``stops``."""
    leaves: dict[int, Tensor] = {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    stack = [*edges, *((x.grad_fn, x.output_nr) for x in outputs if x.grad_fn is not None)]
    outside, seen = list[tuple[Any, int]](), set[Any]()
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if edge in stops:
            outside.append(edge)
        elif type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = node.variable
        elif hasattr(node, "_sequence_nr") and node._sequence_nr() < begun:
            outside.append(edge)
        else:
            stack.extend(node.next_functions)
    return list(leaves.values()), outside
