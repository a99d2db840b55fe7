"""What a piece of work allocates: the bytes it leaves, and the most it ever holds."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Memory", "allocated"]


class Memory(NamedTuple):
    """Bytes over those there before.

    Attributes:
        left: what stands when the work is done, its result among it.
        peak: the most at any one time.
    """

    left: int
    peak: int


def allocated(work: Callable[[], object], device: str = "cpu") -> Memory:
    """Run ``work`` once, and follow torch's allocator.

    >>> import torch
    >>> x = torch.zeros(256)
    >>> allocated(lambda: (x + 1) * 2)
    Memory(left=1024, peak=2048)
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del kept
        return Memory(after - before, torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    del kept
    results = record.profiler.kineto_results if record.profiler is not None else None
    if results is None:
        raise RuntimeError("torch's profiler recorded nothing")
    now = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, now)
    return Memory(now, peak)
