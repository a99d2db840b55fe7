"""Trainings on images: seconds of an epoch, memory, accuracy; the action, half precision, and a loop by hand beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from benchmarks.gpu.timing import synchronize
from odenets import adapt, models
from odenets.adapting import AdaptedModel
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit

__all__ = ["trainings"]

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def images(file: Path | None) -> tuple[TensorData, TensorData]:
    """CIFAR-10, by torchvision or from an array file of images ``(N, 32, 32, 3)`` and labels."""
    if file is None:
        return datasets.load("cifar10")
    arrays = np.load(file)
    parts = []
    for x, y in (("train_x", "train_y"), ("test_x", "test_y")):
        pixels = torch.from_numpy(arrays[x]).permute(0, 3, 1, 2).float().div_(255).contiguous()
        parts.append(TensorData(pixels, torch.from_numpy(arrays[y]).long(), "cifar10", 10, MEAN, STD))
    return parts[0], parts[1]


def networks() -> dict[str, Callable[[], Any]]:
    """Networks with the seed's weights, by name; torchvision's ResNet-18 begins as for small images."""
    normalize = models.Normalize([*MEAN], [*STD])

    def adapted() -> AdaptedModel:
        model = resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment] - any modules
        return adapt(model)

    options = {"features": 100, "size": 32, "normalize": normalize}
    return {
        "ResNet-9, Euler": partial(models.resnet9, 3, 10, solver="euler", **options),
        "ResNet-18, adapted": adapted,
        "ResNet-9, BS23": partial(models.resnet9, 3, 10, solver="bs23", **options),
    }


def by_hand(network: nn.Module, batches: Batches, epochs: int, fabric: Fabric) -> list[float]:
    """The seconds of each epoch of a loop that one writes."""
    seconds = []
    module, optimizer = fabric.setup(network, SGD(network.parameters()))
    module.train()
    for epoch in range(epochs):
        started = time.perf_counter()
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            fabric.backward(cross_entropy(module(x), y))
            optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def start_of_memory() -> int:
    """The bytes that stand, from which on the highest are looked for; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def trainings(device: str, file: Path | None = None, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each network, precision and loop."""
    train, test = (part.to(device) for part in images(file))
    if quick:
        train, test = train.subset(torch.arange(256)), test.subset(torch.arange(200))
    epochs = 2
    batches, tested = Batches(train, 128, seed=0, crop=4, flip=True), Batches(test, 500)
    for name, make in networks().items():
        for precision in ("32-true", "bf16-mixed"):
            for who in (
                ("by hand", "fit", "fit, least action") if precision == "32-true" else ("fit", "fit, least action")
            ):
                torch.manual_seed(0)
                network = make().to(device)
                network(train.x[:2])
                fabric = Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type] - one of its
                before = start_of_memory()
                if who == "by hand":
                    seconds = by_hand(network, batches, epochs, fabric)
                else:
                    objective = LeastAction() if who != "fit" else None
                    done = fit(network, batches, epochs=epochs, optimizer=SGD, objective=objective, fabric=fabric)
                    ends = [0.0, *(row["seconds"] for row in done.rows)]
                    seconds = [end - start for start, end in pairwise(ends)]
                row = {"network": name, "precision": precision, "who": who, "seconds": seconds}
                row["images a second"] = len(train) / min(seconds[1:])
                row["peak"] = torch.cuda.max_memory_allocated() - before
                with fabric.autocast():
                    row["accuracy"] = evaluate(network, tested).accuracy
                yield row
