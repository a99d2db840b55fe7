"""What autograd saves for a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["saved_uncounted"]


def saved_uncounted() -> Any:
    """A context in which tensors are saved past hooks outside, of which a checkpoint's count what is saved.

    What is saved is detached: an operation in place saves its own output, which would keep the graph that keeps it.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
