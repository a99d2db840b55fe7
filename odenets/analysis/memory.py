"""Memory of a piece of work: the bytes of tensors it leaves, and the most alive at once, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Memory", "measure_memory"]


class Memory(NamedTuple):
    """Bytes over those there before, as :func:`measure_memory` measures them.

    Attributes:
        left: what stands when the work is done, its result and the graph behind it among it.
        peak: the most at any one time.
    """

    left: int
    peak: int


def measure_memory(work: Callable[[], object], device: torch.device | str = "cpu") -> Memory:
    """What a piece of work allocates, such as a forward or a backward pass; what was there before does not count.

    On a GPU torch's allocator tells. Elsewhere the storages that operations return are followed until they are freed,
    backward passes and gradients included; what an operation allocates and frees inside itself is not seen.

    Args:
        work: a function of no arguments, called once.
        device: where it computes.

    Returns:
        Bytes that are left, and the most at once.

    Raises:
        TypeError: no function.

    >>> x = torch.zeros(1000)
    >>> measure_memory(lambda: ((x + 1) * 2).sum())  # at most both temporaries, and in the end a number
    Memory(left=4, peak=8000)
    """
    if not callable(work):
        raise TypeError(f"work must be a function of no arguments, got {type(work).__name__}: lambda: network(x)")
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        left = torch.cuda.memory_allocated(device) - before
        del result
        return Memory(left, torch.cuda.max_memory_allocated(device) - before)
    with _Live() as live:
        result = work()
    left = live.now
    del result
    return Memory(left, live.peak)


class _Live(TorchDispatchMode):
    """Follows every storage from the operation that returns it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._meet(value, new=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._meet(value, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, value: object, *, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes() if new else 0
        if key in self.known:
            return
        self.now += size

        def freed(_: object) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)
