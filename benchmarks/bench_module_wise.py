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
from odenets.module_wise import end_to_end_step, greedy, parallel_step, split_into_modules, trgl

SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)


def step_of(who: str, K: int, device: str, batch_size: int = 16, size: int = 32) -> Callable[[], object]:
    """A training step on a batch of square images."""
    torch.manual_seed(0)
    x = torch.rand(batch_size, 3, size, size, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    network = split_into_modules(models.resnet110().to(device), K, x[:2]).train()
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


@pytest.mark.parametrize("K", [4, 16])
def bench_action_on_large_images(benchmark: Any, device: str, measure: Callable[..., None], K: int) -> None:
    """Time of a step with the action over one without, on images of 96 x 96, where Python weighs less."""
    benchmark.group = f"ResNet-110 on 96 x 96, K = {K}, {device}"
    step = partial(step_of, K=K, device=device, batch_size=8, size=96)
    measure(step("TRGL"), step("VanGL"), who="TRGL", over="VanGL", K=K, step="ResNet-110, 96 x 96")
