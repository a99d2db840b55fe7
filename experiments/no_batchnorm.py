"""Depth without batch norm (Fig. 14): the plain network, least action, and steps of h = 0.1.

The thesis finds that residual networks without batch norm hardly train once they are deep, and that least action, like
small steps, lets them. In its code the second activation read the state instead of the first convolution's output, so
that the baselines had a dead convolution; here it is alive. Each method's learning rate (and first lambda) is chosen on
validation images for each depth; what is reported is the accuracy on test images after the last epoch, and how many of
the instances failed to train: loss not finite, or accuracy below twice that of guessing.

    python experiments/no_batchnorm.py
    python experiments/no_batchnorm.py --depths 9 20 30 40 50 --dataset cifar10 --folder DIR
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from lab.plotting import intervals
from lab.runs import Run
from lab.statistics import mean_interval
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, initialize, models, plotting
from odenets.least_action import LeastAction
from odenets.training import data, datasets
from odenets.training.instances import fit_instances
from odenets.training.loop import evaluate
from odenets.training.objectives import CrossEntropy, Objective

METHODS = ("vanilla", "least action", "h = 0.1", "batch norm")


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        depths: numbers of blocks.
        train_size: training images.
        instances: that are reported, per method and depth.
        tuning: instances on which settings are chosen.
        epochs: of training.
        batch_size: of training.
        learning_rates: tried for every method.
        lambdas: first lambdas tried for least action, with tau = 1 and a change every 5 steps.
        gain: of the orthogonal initialization.
        quick: two shallow depths, few instances and epochs: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    depths: tuple[int, ...] = (9, 30)
    train_size: int = 300
    instances: int = 10
    tuning: int = 3
    epochs: int = 20
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    lambdas: tuple[float, ...] = (0.1, 1.0)
    gain: float = 1.0
    quick: bool = False
    output: Path = Path("runs/no_batchnorm")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must hold numbers of at least 1 block, got {self.depths}")
        if min(self.instances, self.tuning) < 2:
            raise ValueError(f"instances and tuning must be at least 2, got {self.instances} and {self.tuning}")


@dataclass(frozen=True)
class Job:
    """Some instances of one method at one depth, learning rate and first lambda, trained together."""

    depth: int
    method: str
    learning_rate: float
    first_lambda: float
    seeds: tuple[int, ...]
    tuning: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        method = self.method.replace(" ", "")
        return f"{self.depth}/{method}_lr{self.learning_rate:g}_l{self.first_lambda:g}_seeds{self.seeds[0]}"


def objective(job: Job) -> Objective:
    """What a method minimizes."""
    if job.method == "least action":
        return LeastAction(lambda0=job.first_lambda, tau=1.0, every=5)
    return CrossEntropy()


def build(config: Config, dataset: data.TensorData, job: Job, seed: int) -> Network:
    """ResNet of the job's depth with the seed's weights."""
    torch.manual_seed(seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    network = models.resnet9(
        channels,
        dataset.classes,
        features={"digits": 16, "mnist": 32, "cifar10": 100}[config.dataset],
        size=size,
        depth=job.depth,
        norm="batch" if job.method == "batch norm" else None,
        h=0.1 if job.method == "h = 0.1" else 1.0,
        normalize=models.Normalize(list(dataset.mean), list(dataset.std)),
    )
    return initialize(network, "orthogonal", config.gain)


def parts_of(config: Config) -> data.Split:
    """The data, cut the same for every job."""
    return datasets.split(*datasets.load(config.dataset, config.folder))


def train(config: Config, job: Job, report: Report) -> None:
    """Train the instances of a job; what was found stands in its summary."""
    run = Run(config.output / job.name, asdict(job) | science(config), resume=True)
    parts = parts_of(config)
    found = fit_instances(
        [build(config, parts.train, job, seed) for seed in job.seeds],
        [
            data.Batches(datasets.subsample(parts.train, config.train_size, seed=seed), config.batch_size, seed=seed)
            for seed in job.seeds
        ],
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=lambda: objective(job),
        report=lambda n: report(n * job.depth),
    )
    looked = data.Batches(parts.validation if job.tuning else parts.test, 500)
    accuracy = [evaluate(network, looked).accuracy for network in found.networks]
    guess = 1 / parts.train.classes
    failed = [
        not loss.isfinite().item() or right < 2 * guess
        for loss, right in zip(found.train_loss[:, -1], accuracy, strict=True)
    ]
    run.finish(asdict(job) | {"accuracy": accuracy, "failed": failed}, seeds=list(job.seeds))


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job beside its own settings."""
    names = ("dataset", "train_size", "epochs", "batch_size", "gain")
    return {name: getattr(config, name) for name in names}


def candidates(config: Config) -> list[Job]:
    """Every method at every depth, learning rate and first lambda, to choose from."""
    seeds = tuple(range(10_000, 10_000 + config.tuning))
    return [
        Job(depth, method, rate, first, seeds, tuning=True)
        for depth in config.depths
        for method in METHODS
        for rate in config.learning_rates
        for first in (config.lambdas if method == "least action" else (0.0,))
    ]


def choose(config: Config, tuned: list[dict[str, Any]]) -> list[Job]:
    """Per method and depth the job with the settings best on validation images."""
    chosen = []
    for depth in config.depths:
        for method in METHODS:
            group = [r for r in tuned if (r["depth"], r["method"]) == (depth, method)]
            best = max(group, key=lambda r: statistics.fmean(r["accuracy"]))
            seeds = tuple(range(config.instances))
            chosen.append(Job(depth, method, best["learning_rate"], best["first_lambda"], seeds, tuning=False))
    return chosen


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per depth and method, differences to the plain network paired over the instances."""
    plain = {r["depth"]: r["accuracy"] for r in results if r["method"] == "vanilla"}
    rows = []
    for r in results:
        keys = ("depth", "method", "learning_rate", "first_lambda")
        row: dict[str, Any] = {key: r[key] for key in keys} | {
            "failed": sum(r["failed"]),
            "instances": len(r["failed"]),
        }
        row["accuracy"] = mean_interval([100 * v for v in r["accuracy"]])
        if r["method"] != "vanilla":
            pairs = zip(r["accuracy"], plain[r["depth"]], strict=True)
            row["difference"] = mean_interval([100 * (a - b) for a, b in pairs])
        rows.append(row)
    return rows


COLUMNS: dict[str, Any] = {
    "blocks": "{depth}",
    "method": "{method}",
    "lr": "{learning_rate:g}",
    "first lambda": lambda row: f"{row['first_lambda']:g}" if row["first_lambda"] else "",
    "failed": "{failed} of {instances}",
    "test accuracy": "{accuracy:.2f}",
    "- vanilla": "{difference:.2f}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in rows:
        if "difference" in row:
            what = ("no difference to", "better than", "worse than")[row["difference"].sign]
            lines.append(f"{row['depth']} blocks, {row['method']}: {what} the plain network, {row['difference']:.2f}")
    return lines


def main(config: Config) -> None:
    """Choose, train, print one table, write the run folder with its figure."""
    if config.quick:
        config = replace(config, depths=(2, 4), instances=2, tuning=2, epochs=2, learning_rates=(0.01,), lambdas=(1.0,))
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = ("depths", "instances", "tuning", "learning_rates", "lambdas")
    run = Run(config.output, science(config) | {name: getattr(config, name) for name in names}, resume=config.resume)

    def folder(job: Job) -> Path:
        return config.output / job.name

    def cost(job: Job) -> int:
        return config.epochs * len(job.seeds) * job.depth

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        complete = partial(workers.complete, partial(train, config), folder=folder, cost=cost)
        jobs = choose(config, complete(candidates(config), label="choosing"))
        results = complete(jobs, label="training")
    rows = summarize(results)
    series = {m: [(row["depth"], row["accuracy"]) for row in rows if row["method"] == m] for m in METHODS}
    figure = intervals(series, xlabel="blocks", ylabel="test accuracy (%)")
    plotting.save({"fig_14": figure}, run.folder / "figures")
    trainings = [{"name": job.name, "job": job.name, "seed": seed} for job in jobs for seed in job.seeds]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
