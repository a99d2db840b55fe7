"""Whether a field that is called again is the same field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solvers.gradients.snapshot import Snapshot
from solvers.saved_tensors import saved_uncounted

__all__ = ["FirstCall", "random_state", "set_random_state"]


class FirstCall:
    """A call of a field that may change its buffers: batch norm does and returns the same again, spectral norm not.

    Args:
        snapshot: of the field, before the call.
        device: of its state.
    """

    def __init__(self, snapshot: Snapshot, device: torch.device) -> None:
        self.snapshot, self.device, self.before = snapshot, device, snapshot.buffers()
        self.drawn = random_state(device) if self.before else []

    def other(self, field: Callable[..., Any], args: Sequence[Any], outputs: Sequence[Tensor]) -> str | None:
        """Why it is another field when called again, None if it is not; buffers stay as the first call left them.

        Args:
            field: what was called.
            args: with what.
            outputs: the tensors that it returned.
        """
        now = self.snapshot.buffers() if self.before else []
        if [(id(x), version) for _, _, x, version in now] == [(id(x), version) for _, _, x, version in self.before]:
            return None
        values = [(held, name, x, x.clone()) for held, name, x, _ in now if not x.is_inference()]
        drawn = random_state(self.device)
        set_random_state(self.drawn, self.device)
        with saved_uncounted():
            again = [x for x in tree_leaves(field(*args)) if isinstance(x, Tensor)]
        set_random_state(drawn, self.device)
        with torch.no_grad():
            for held, name, x, value in values:
                held[name] = x.copy_(value)
            if all(_close(v, w) for v, w in zip(outputs, again, strict=True)):
                return None
        return "changes at every call, by a buffer that it reads and writes (spectral norm in training mode?)"


def _close(v: Tensor, w: Tensor) -> bool:
    """Whether they differ by rounding only; NaN differs from nothing."""
    return not v.numel() or not bool((v - w).abs().max() > 100 * torch.finfo(v.dtype).eps * v.abs().max())


def random_state(device: torch.device) -> list[Tensor]:
    """Of the host and of a device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
