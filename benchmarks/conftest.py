"""What every benchmark shares: one thread, warm-up, synchronisation, and what was measured where."""

from collections.abc import Callable

import pytest
import torch
import torchdiffeq

from odenets.runs import environment


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request) -> str:
    """The devices at hand."""
    return request.param


@pytest.fixture
def measure(benchmark, device):
    """``measure(run, evaluations=n, **info)``: times ``run`` and stores its problem and the field calls it makes."""
    torch.set_num_threads(1)

    def timed(run: Callable[[], object], **info: object) -> None:
        def synchronised() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        versions = environment()["versions"] | {"torchdiffeq": torchdiffeq.__version__}
        benchmark.extra_info.update(info, device=device, versions=versions, threads=torch.get_num_threads())
        benchmark.pedantic(synchronised, rounds=20, iterations=3, warmup_rounds=3)

    return timed
