"""Seconds on the device and on the host, waits for the device, and launches."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["in_turns", "launches", "on_device", "per_call", "synchronize", "waits"]

Run = Callable[[], object]


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def on_device(run: Run, milliseconds: int = 40) -> float:
    """Median seconds that the device takes, by its own clock, with nothing of the operands in its cache."""
    if not torch.cuda.is_available():
        return per_call(run, 3)
    from triton.testing import do_bench

    median: Any = do_bench(run, warmup=10, rep=milliseconds, return_mode="median")
    return median / 1e3


def per_call(run: Run, calls: int = 50) -> float:
    """Seconds from one call to the next, many in a row: of the device or of the host, whichever is slower."""
    run()
    synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - started) / calls


def in_turns(*runs: Run, seconds: float = 0.2) -> list[float]:
    """Median seconds of each of some pieces of work, taken in turns until the device is done."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(2):
        for run in runs:
            run()
    synchronize()
    begun = time.perf_counter()
    while len(taken[0]) < 3 or (time.perf_counter() - begun < seconds and len(taken[0]) < 50):
        for run, times in zip(runs, taken, strict=True):
            started = time.perf_counter()
            run()
            synchronize()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def waits(run: Run) -> int:
    """How often the host waits for the device."""
    run()
    synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def launches(run: Run) -> int:
    """Kernels and copies that the device is given."""
    run()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events() or ())
