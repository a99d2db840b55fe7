"""A step of `fit` beside that of the loop that one would write: what the training loop costs.

pytest benchmarks/bench_training.py --benchmark-only
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from odenets import adapt
from odenets.training import fit

BATCH, STEPS = 64, {"cpu": 210, "cuda": 1010}
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def model() -> nn.Module:
    """torchvision's ResNet-18."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def steps_of(network: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """A step of the loop that one would write, with its loss and accuracy."""
    optimizer, totals = SGD(network.train().parameters()), [0.0, 0.0]

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        output = network(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        totals[0] += loss.item() * len(y)
        totals[1] += (output.argmax(1) == y).sum().item()

    return step


class Interleaved:
    """Batches, before each of which the other step is taken; seconds of the processor for both."""

    def __init__(self, step: Callable[[Tensor, Tensor], None], device: str) -> None:
        self.step, self.device = step, device
        self.pairs: list[tuple[float, float]] = []

    def clock(self) -> float:
        """Seconds of the processor; of a GPU's host until the GPU is done."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.rand(BATCH, 3, 32, 32, device=self.device), torch.arange(BATCH, device=self.device) % 10
        for _ in range(STEPS[self.device]):
            started = self.clock()
            self.step(x, y)
            between = self.clock()
            yield x, y
            self.pairs.append((between - started, self.clock() - between))


@pytest.mark.parametrize("beside", ["the same network", "the model as it is"])
def bench_training(benchmark: Any, machine: dict[str, Any], device: str, beside: str) -> None:
    """ResNet-18 on batches of 64 images of 32 x 32: the median of the ratios of neighboring steps."""
    from lightning_fabric import Fabric

    example = torch.rand(2, 3, 32, 32)
    network, other = adapt(model(), example).to(device), model()
    if beside == "the same network":
        other = adapt(other, example)
    batches = Interleaved(steps_of(other.to(device)), device)
    fabric = Fabric(accelerator=device, devices=1)
    benchmark.group = f"ResNet-18, {device}"
    benchmark.pedantic(partial(fit, network, batches, epochs=1, optimizer=SGD, fabric=fabric), rounds=1)
    pairs = batches.pairs[10:]
    low, ratio, high = statistics.quantiles([mine / floor for floor, mine in pairs], n=4)
    floor = statistics.median(floor for floor, _ in pairs)
    benchmark.extra_info.update(
        beside=beside, device=device, machine=machine, batch=BATCH, pairs=len(pairs), floor=floor, ratio=ratio
    )
    benchmark.extra_info.update(quartiles=[low, high])
