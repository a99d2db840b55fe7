"""A training step of ResNet-110 in modules, beside one end to end.

    pytest benchmarks/bench_module_wise.py --benchmark-only --benchmark-json=FILE.json
    python -m benchmarks.table FILE.json

Each is timed in turn with what it is compared with, on the same batch; modules have the heads of the thesis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from odenets import models
from odenets.module_wise import end_to_end_step, greedy, module_wise, parallel_step, trgl

SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)


def step_of(who: str, K: int, device: str) -> Callable[[], object]:
    """A training step on a batch."""
    torch.manual_seed(0)
    x, y = torch.rand(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
    network = module_wise(models.resnet110().to(device), K, x[:2]).train()
    if who in ("end-to-end", "checkpointed"):
        optimizer = SGD(network.parameters())
        return partial(end_to_end_step, network, greedy()(0, 1), optimizer, x, y, checkpointed=who == "checkpointed")
    make = trgl(0.5) if who == "TRGL" else greedy()
    optimizers = [SGD(module.parameters()) for module in network.modules_in_order]
    return partial(parallel_step, network, [make(k, K) for k in range(K)], optimizers, x, y)


@pytest.mark.parametrize("K", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("who", "over"),
    [("VanGL", "end-to-end"), ("TRGL", "end-to-end"), ("checkpointed", "end-to-end"), ("TRGL", "VanGL")],
)
def bench_module_wise(benchmark: Any, device: str, measure: Callable[..., None], who: str, over: str, K: int) -> None:
    """Time of a step over that of another."""
    benchmark.group = f"ResNet-110, K = {K}, {device}"
    measure(step_of(who, K, device), step_of(over, K, device), who=who, over=over, K=K, step="ResNet-110")
