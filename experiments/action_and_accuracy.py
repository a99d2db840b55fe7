"""Does a network that moves its data less generalize better? (Figs 11 and 6)

Networks start from many initializations, orthogonal and normal with several gains, and are trained on the task alone.
Fig. 11 sets the action on test images against the accuracy on them, with a linear regression over all networks; since
what an initialization does to both is confounded with it, the correlation within each initialization stands beside that
over all. Fig. 6 shows for one initialization what each block does: how far it moves the state, relative to its size,
and whether it goes down the loss.

    python experiments/action_and_accuracy.py
    python experiments/action_and_accuracy.py --dataset mnist --folder DIR --train-size 5000
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from lab.runs import Run
from lab.statistics import correlation, mean_interval
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, initialize, measures, models, plotting
from odenets.analysis.refinement import iterative_refinement
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        train_size: training images; all if 0.
        orthogonal, normal: gains of the initializations.
        instances: per initialization.
        epochs: of training.
        batch_size: of training.
        learning_rate: of SGD with momentum 0.9.
        quick: few instances and epochs: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    train_size: int = 500
    orthogonal: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0, 2.0)
    normal: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    instances: int = 10
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    quick: bool = False
    output: Path = Path("runs/action_and_accuracy")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if self.instances < 3:
            raise ValueError(f"instances must be at least 3 for a correlation, got {self.instances}")


@dataclass(frozen=True)
class Job:
    """The instances of one initialization."""

    initializer: str
    gain: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.initializer}_{self.gain:g}"


def build(config: Config, dataset: data.TensorData, job: Job, seed: int) -> Network:
    """ResNet-9 with the seed's weights, drawn as the job says."""
    torch.manual_seed(seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    features = {"digits": 16, "mnist": 32, "cifar10": 100}[config.dataset]
    normalize = models.Normalize(list(dataset.mean), list(dataset.std))
    network = models.resnet9(channels, dataset.classes, features=features, size=size, normalize=normalize)
    return initialize(network, job.initializer, job.gain)


def parts_of(config: Config) -> tuple[data.TensorData, data.TensorData]:
    """Training and test images."""
    train, test = datasets.load(config.dataset, config.folder)
    return datasets.subsample(train, config.train_size) if config.train_size else train, test


def train(config: Config, job: Job, report: Report) -> None:
    """Train the instances of an initialization; what was found stands in its summary."""
    run = Run(config.output / job.name, asdict(job) | science(config), resume=True)
    images, test = parts_of(config)
    found = fit_instances(
        [build(config, images, job, seed) for seed in range(config.instances)],
        [data.Batches(images, config.batch_size, seed=seed) for seed in range(config.instances)],
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=config.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=CrossEntropy,
        report=report,
    )
    looked = data.Batches(test, 500)
    blocks = [iterative_refinement(network, looked) for network in found.networks]
    run.finish(
        asdict(job)
        | {
            "accuracy": [evaluate(network, looked).accuracy for network in found.networks],
            "action": [action(network, looked) for network in found.networks],
            "ratio": torch.stack([each.ratio for each in blocks]).tolist(),
            "cosine": torch.stack([each.cosine for each in blocks]).tolist(),
        },
        seeds=list(range(config.instances)),
    )


@torch.no_grad()
def action(network: Network, batches: data.Batches) -> float:
    """Mean action of the network on a data set, in eval mode."""
    network.eval()
    totals = [network.record(x, action=measures.action)[1]["action"].sum() for x in batches.inputs()]
    return (torch.stack(totals).sum() / len(batches.data)).item()


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job beside its own settings."""
    names = ("dataset", "train_size", "instances", "epochs", "batch_size", "learning_rate")
    return {name: getattr(config, name) for name in names}


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per initialization, and one over all: accuracy, action, and the correlation of accuracy with its log."""
    rows = []
    for r in results:
        logs = np.log10(r["action"]).tolist()
        row: dict[str, Any] = {"initializer": r["initializer"], "gain": r["gain"]}
        row |= {"accuracy": mean_interval([100 * a for a in r["accuracy"]]), "log10_action": mean_interval(logs)}
        rows.append(row | {"correlation": correlation(logs, r["accuracy"])})
    logs = [v for r in results for v in np.log10(r["action"]).tolist()]
    accuracy = [a for r in results for a in r["accuracy"]]
    row = {"initializer": "all", "gain": None, "accuracy": mean_interval([100 * a for a in accuracy])}
    return [*rows, row | {"log10_action": mean_interval(logs), "correlation": correlation(logs, accuracy)}]


COLUMNS = {
    "initialization": "{initializer}",
    "gain": "{gain:g}",
    "test accuracy": "{accuracy:.2f}",
    "log10 action on test": "{log10_action:.2f}",
    "correlation": "{correlation[0]:.2f}",
    "p": "{correlation[1]:.2g}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences."""
    *each, whole = rows
    r, p = whole["correlation"]
    within = [row for row in each if row["correlation"][1] < 0.05]
    negative = sum(row["correlation"][0] < 0 for row in within)
    return [
        f"over all networks the accuracy correlates with the logarithm of the action by {r:.2f} (p = {p:.2g})",
        f"within an initialization it does so (p < 0.05) in {len(within)} of {len(each)}, negatively in {negative}",
    ]


def main(config: Config) -> None:
    """Train every initialization, print one table, write the run folder with its figures."""
    if config.quick:
        config = replace(config, orthogonal=(0.1, 1.0), normal=(0.1,), instances=3, epochs=1, train_size=100)
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    gains = {"orthogonal": config.orthogonal, "normal": config.normal}
    run = Run(config.output, science(config) | gains, resume=config.resume)
    jobs = [Job(name, gain) for name, values in gains.items() for gain in values]

    def folder(job: Job) -> Path:
        return config.output / job.name

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        work, cost = partial(train, config), (lambda job: config.epochs * config.instances)
        results = workers.complete(work, jobs, folder, cost=cost, label="initializations")
    rows = summarize(results)
    points = {job.name.replace("_", " "): (r["action"], r["accuracy"]) for job, r in zip(jobs, results, strict=True)}
    blocks = {job.name.replace("_", " "): (r["ratio"], r["cosine"]) for job, r in zip(jobs, results, strict=True)}
    figures = {"fig_11": plotting.action_against_accuracy(points), "fig_6": plotting.refinement_by_block(blocks)}
    plotting.save(figures, run.folder / "figures")
    seeds = range(config.instances)
    trainings = [{"name": job.name, "job": job.name, "seed": seed} for job in jobs for seed in seeds]
    print(run.conclude(trainings, ("job",), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
