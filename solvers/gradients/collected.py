"""Gradients of what a field reads, collected over calls that a backward pass makes one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.gradients.captured import Captured
from solvers.gradients.reads import LaterReads

__all__ = ["Collected"]


class Collected:
    """The gradients of the tensors that a captured field reads, added up call by call.

    Args:
        captured: the field.
        params: its tensors, as its ``again`` yields them.

    Attributes:
        grads: of each of the tensors, None where no call has read it.
    """

    def __init__(self, captured: Captured, params: Sequence[Tensor]) -> None:
        self.grads: list[Tensor | None] = [None] * len(params)
        self._params = params
        self._later = LaterReads(params, captured.lost if captured.open else None)

    def pull(self, change: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of a state; those of all else are added to what is collected.

        Args:
            change: what a call made of it, with a graph.
            leaf: the state.
            gradient: of the change.

        Raises:
            RuntimeError: the call read a tensor whose gradient would be lost.
        """
        if not change.requires_grad:
            return torch.zeros_like(leaf)
        read = self._later.see(change, leaf)
        first, *others = torch.autograd.grad(
            change, (leaf, *(self._params[i] for i in read)), gradient, allow_unused=True
        )
        for i, grad in zip(read, others, strict=True):
            if grad is not None:
                before = self.grads[i]
                self.grads[i] = grad if before is None else before + grad
        return torch.zeros_like(leaf) if first is None else first

    def close(self) -> list[Tensor | None]:
        """The gradients, when the pass is over.

        Raises:
            RuntimeError: a tensor that one call read has outlived it.
        """
        self._later.close()
        return self.grads
