"""Train on DataLoaders in as many processes as ``torchrun`` starts, by ddp or sharded, and write what came out.

Beside it one process alone trains on the batches of all together.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchvision.models.resnet import BasicBlock

from odenets import Flow, adapt, models
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.least_action import LeastAction
from odenets.training import BestWeights, Run, fit

X = torch.rand(24, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 10
DATASET = TensorDataset(X, Y)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


norm = partial(nn.GroupNorm, 4)


def flow_network() -> Any:
    torch.manual_seed(0)
    return models.small_network(features=8, solver="bs23", depth=2).double()


def adapted() -> Any:
    """Without batch norms, which see each process' own samples."""
    torch.manual_seed(0)
    down = nn.Conv2d(8, 16, 1, stride=2)
    blocks = [BasicBlock(8, 8, norm_layer=norm), BasicBlock(8, 16, 2, down, norm_layer=norm)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return adapt(nn.Sequential(nn.Conv2d(1, 8, 3), *blocks, *head)).double()


NETWORKS = {"flow": (flow_network, 1, 2), "adapted": (adapted, 2, 1000)}
"""With parts of a batch, and the steps between two changes of lambda, which grows with the loss of one part."""


class Parallelize:
    """Shards units each by itself, and what is left."""

    units: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)

    def __call__(self, recording: Any, mesh: Any) -> Any:
        for module in recording.modules():
            if isinstance(module, self.units):
                fully_shard(module, mesh=mesh["data_parallel"])
        return fully_shard(recording, mesh=mesh["data_parallel"])


parallelize = Parallelize()
UNITS = {"layers": (nn.Conv2d, nn.Linear), "blocks": (Flow, BasicBlock), "root": ()}


def shuffled(processes: int) -> DataLoader:
    """Batches of six in all; alone in the order of Fabric's distributed sampler."""
    if processes > 1:
        return DataLoader(DATASET, 6 // processes, shuffle=True)
    return DataLoader(DATASET, 6, sampler=DistributedSampler(DATASET, num_replicas=1, rank=0))


class Uneven(IterableDataset):
    """Batches of several sizes, of which the first process has one more."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self):
        for start, size in [(0, 5), (5, 2), (20, 4)] if self.rank == 0 else [(7, 3), (10, 6)]:
            yield X[start : start + size], Y[start : start + size]


class Pairs(BatchSampler):
    """That Fabric cannot make anew."""

    def __init__(self) -> None:
        pass

    def __iter__(self):
        yield from ([i, i + 1] for i in range(0, 24, 2))

    def __len__(self) -> int:
        return 12


def record(folder: Path, fabric: Fabric, name: str, network: Any, rows: list[dict[str, Any]], objective: Any) -> None:
    """What the tests compare: weights, rows, lambda."""
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in network.state_dict().items()}
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "h")} for row in rows]
    torch.save(state, folder / f"{name}_{fabric.global_rank}.pt")
    text = json.dumps([kept, objective.multiplier.item()])
    (folder / f"{name}_{fabric.global_rank}.json").write_text(text)


def train(folder: Path, fabric: Fabric, which: str) -> None:
    """Three epochs at once, and begun anew after one."""
    for name, ends in (("whole", (3,)), ("resumed", (1, 3))):
        for epochs in ends:
            torch.manual_seed(epochs + 10 * fabric.global_rank)
            make, accumulate, every = NETWORKS[which]
            network, objective = make(), LeastAction(tau=0.5, update="after", every=every)
            run = Run(folder / f"{which}_{name}", {}, resume=True) if fabric.is_global_zero else None
            training = fit(
                network,
                shuffled(fabric.world_size),
                epochs=epochs,
                optimizer=SGD,
                lr_scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
                objective=objective,
                validation=DataLoader(DATASET, 12),
                callbacks=[BestWeights("train_loss")],
                clip_norm=0.5,
                accumulate=accumulate,
                run=run,
                fabric=fabric,
            )
        record(folder, fabric, f"{which}_{name}", network, training.rows, objective)


def validate(folder: Path, fabric: Fabric, which: str) -> None:
    """Epochs after a validation, of networks in other units: nothing between them makes the parameters parts again."""
    for units, kinds in UNITS.items():
        parallelize.units = kinds
        network, objective = NETWORKS[which][0](), LeastAction(tau=0.5)
        training = fit(
            network,
            shuffled(fabric.world_size),
            epochs=2,
            optimizer=SGD,
            objective=objective,
            validation=DataLoader(DATASET, 12),
            fabric=fabric,
        )
        record(folder, fabric, f"{which}_{units}", network, training.rows, objective)
    parallelize.units = UNITS["layers"]


def uneven(folder: Path, fabric: Fabric) -> None:
    """The third batch of the first process is of no round."""
    network, objective = flow_network(), LeastAction(tau=0.5)
    rounds = [[*range(5), *range(7, 10)], [5, 6, *range(10, 16)]]
    batches: Any = [(X[index], Y[index]) for index in rounds]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if fabric.world_size > 1:
            batches = DataLoader(Uneven(fabric.global_rank), batch_size=None)
        training = fit(network, batches, epochs=2, optimizer=SGD, objective=objective, fabric=fabric)
    record(folder, fabric, "uneven", network, training.rows, objective)
    (folder / f"warnings_{fabric.global_rank}.txt").write_text("\n".join(str(w.message) for w in caught))


def listed(folder: Path, fabric: Fabric) -> None:
    """Of the batches of a list each process takes its share."""
    network, objective = flow_network(), LeastAction(tau=0.5)
    training = fit(
        network, [(X[:9], Y[:9]), (X[9:], Y[9:])], epochs=2, optimizer=SGD, objective=objective, fabric=fabric
    )
    record(folder, fabric, "listed", network, training.rows, objective)


def refused(folder: Path, fabric: Fabric) -> None:
    """What cannot be distributed, or sharded."""
    edits = AdaptiveDepth(DepthRule(1e-9), lambda: [X])
    calls = {
        "batch sampler": lambda: fit(
            flow_network(), DataLoader(DATASET, batch_sampler=Pairs()), epochs=1, optimizer=SGD, fabric=fabric
        ),
        "edits": lambda: fit(flow_network(), shuffled(2), epochs=1, optimizer=SGD, callbacks=[edits], fabric=fabric),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    if isinstance(fabric.strategy, ModelParallelStrategy):
        idle = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(parallelize))
        idle.launch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(flow_network(), shuffled(2), epochs=1, optimizer=SGD, fabric=idle)
        errors["default sizes"] = "\n".join(str(w.message) for w in caught)
    (folder / f"errors_{fabric.global_rank}.json").write_text(json.dumps(errors))


def main(folder: Path, fabric: Fabric) -> None:
    """All of it."""
    folder.mkdir(exist_ok=True)
    for which in NETWORKS:
        train(folder, fabric, which)
        validate(folder, fabric, which)
    if not isinstance(fabric.strategy, ModelParallelStrategy):
        uneven(folder, fabric)
        listed(folder, fabric)
    if fabric.world_size > 1:
        refused(folder, fabric)


if __name__ == "__main__":
    torch.set_num_threads(1)
    strategy = (
        "ddp"
        if sys.argv[2] == "ddp"
        else ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    main(Path(sys.argv[1]), fabric)
