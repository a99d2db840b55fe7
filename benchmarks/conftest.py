"""What every benchmark shares: one thread, warm-up, synchronization, the floor, and what was measured where."""

import statistics
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torchdiffeq

from lab.runs import environment


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """A device, if it is at hand."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """Versions, commit and processor, on one thread."""
    torch.set_num_threads(1)
    made = environment()
    made["versions"]["torchdiffeq"] = torchdiffeq.__version__
    return made


@pytest.fixture
def measure(
    device: str, benchmark: Any, request: pytest.FixtureRequest, machine: dict[str, Any]
) -> Callable[..., None]:
    """``measure(run, floor, **info)``: times ``run`` and ``floor`` in turns, and stores the ratio of their medians.

    pytest-benchmark's own figures are those of ``run``. There are as many rounds as ``--benchmark-max-time`` allows.
    The clock is pytest-benchmark's: ``--benchmark-timer=time.process_time`` leaves out what else the machine does.
    """
    options: Any = request.config.option
    clock: Callable[[], float] = resolve_name(str(options.benchmark_timer))
    fewest, limit = int(options.benchmark_min_rounds), float(options.benchmark_max_time)

    def timed(run: Callable[[], object], floor: Callable[[], object], **info: object) -> None:
        floors = []

        def synchronized() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        def before_each_round() -> None:
            started = clock()
            floor()
            if device == "cuda":
                torch.cuda.synchronize()
            floors.append(clock() - started)

        seconds = 0.0
        for _ in range(3):  # warm-up
            started = clock()
            before_each_round()
            synchronized()
            seconds = clock() - started
            if seconds > 0.3:
                break
        floors.clear()
        rounds = max(fewest, min(200, int(limit / seconds)))
        benchmark.pedantic(synchronized, setup=before_each_round, rounds=rounds)
        benchmark.extra_info.update(
            info, device=device, machine=machine, rounds=rounds, floor=statistics.median(floors)
        )
        if benchmark.stats is not None:
            benchmark.extra_info["ratio"] = benchmark.stats.stats.median / benchmark.extra_info["floor"]

    return timed
