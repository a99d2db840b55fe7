"""Depth without batch norm [K24, Fig. 14]: the plain network, least action, and steps of h = 0.1.

[K24] finds that residual networks without batch norm hardly train once they are deep, and that least action, like
small steps, lets them. In its code the second activation read the state instead of the first convolution's output, so
that the baselines had a dead convolution; here it is alive. Each method's learning rate (and first lambda) is chosen on
validation images for each depth; what is reported is the accuracy on test images after the last epoch, and how many of
the instances failed to train: loss not finite, or accuracy below twice that of guessing.

    python experiments/no_batchnorm.py
    python experiments/no_batchnorm.py --depths 9 20 30 40 50 --dataset cifar10 --folder DIR
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import images
from lab.config import ImageConfig, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.plotting import intervals
from lab.results import best_settings
from lab.statistics import paired, percent
from odenets import Network, initialize
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, Split, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy, Objective

METHODS = ("vanilla", "least action", "h = 0.1", "batch norm")


@dataclass(frozen=True)
class Config(ImageConfig):
    """What to train.

    Attributes:
        depths: numbers of blocks.
        train_size: training images.
        instances: that are reported, per method and depth.
        tuning: instances on which settings are chosen.
        epochs: of training.
        batch_size: of training.
        learning_rates: tried for every method.
        lambdas: first lambdas tried for least action, with tau = 1 and a change every 5 steps.
        gain: of the orthogonal initialization.
    """

    depths: tuple[int, ...] = (9, 30)
    train_size: int = 300
    instances: int = 10
    tuning: int = 3
    epochs: int = 20
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    lambdas: tuple[float, ...] = (0.1, 1.0)
    gain: float = 1.0
    output: Path = Path("runs/no_batchnorm")

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must hold numbers of at least 1 block, got {self.depths}")
        check_at_least(self, 2, "instances", "tuning")


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


def jobs(config: Config) -> Jobs[Job]:
    """Every method at every depth, learning rate and first lambda; then each with what is best on validation images."""
    seeds = tuple(range(10_000, 10_000 + config.tuning))
    tuned = yield [
        Job(depth, method, rate, first, seeds, tuning=True)
        for depth in config.depths
        for method in METHODS
        for rate in config.learning_rates
        for first in (config.lambdas if method == "least action" else (0.0,))
    ]
    return (yield choose(config, tuned))


def choose(config: Config, tuned: list[dict[str, Any]]) -> list[Job]:
    """Per depth and method the job with the settings best on validation images."""
    names = ("learning_rate", "first_lambda")
    best = best_settings(tuned, names, within=("depth", "method"), score=lambda r: r["accuracy"])
    seeds = tuple(range(config.instances))
    return [Job(*where, **settings, seeds=seeds, tuning=False) for where, settings in best.items()]


def objective(job: Job) -> Objective:
    """What a method minimizes."""
    if job.method == "least action":
        return LeastAction(lambda0=job.first_lambda, tau=1.0, every=5)
    return CrossEntropy()


def build(config: Config, dataset: TensorData, job: Job, seed: int) -> Network:
    """ResNet of the job's depth with the seed's weights."""
    norm, h = "batch" if job.method == "batch norm" else None, 0.1 if job.method == "h = 0.1" else 1.0
    network = images.resnet9(dataset, seed, depth=job.depth, norm=norm, h=h)
    return initialize(network, "orthogonal", config.gain)


def parts_of(config: Config) -> Split:
    """The data, cut the same for every job."""
    return images.split(config.dataset, config.folder)


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train the instances of a job."""
    parts = parts_of(config)
    trained = fit_instances(
        [build(config, parts.train, job, seed) for seed in job.seeds],
        [
            Batches(datasets.subsample(parts.train, config.train_size, seed=seed), config.batch_size, seed=seed)
            for seed in job.seeds
        ],
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=lambda: objective(job),
        report=lambda n: report(n * job.depth),
    )
    shown = Batches(parts.validation if job.tuning else parts.test, 500)
    accuracy = [evaluate(network, shown).accuracy for network in trained.networks]
    guess = 1 / parts.train.classes
    failed = [
        not loss.isfinite().item() or right < 2 * guess
        for loss, right in zip(trained.train_loss[:, -1], accuracy, strict=True)
    ]
    return {"accuracy": accuracy, "failed": failed}


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per depth and method, differences to the plain network paired over the instances."""
    plain = {r["depth"]: r["accuracy"] for r in results if r["method"] == "vanilla"}
    rows = []
    for r in results:
        row: dict[str, Any] = {key: r[key] for key in ("depth", "method", "learning_rate", "first_lambda")}
        row |= {"failed": sum(r["failed"]), "instances": len(r["failed"]), "accuracy": percent(r["accuracy"])}
        if r["method"] != "vanilla":
            row["difference"] = 100 * paired(r["accuracy"], plain[r["depth"]])
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "blocks": "{depth}",
    "method": "{method}",
    "lr": "{learning_rate:g}",
    "first lambda": lambda row: f"{row['first_lambda']:g}" if row["first_lambda"] else "",
    "failed": "{failed} of {instances}",
    "test accuracy": "{accuracy:.2f}",
    "- vanilla": "{difference:.2f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    what = ("no difference to", "better than", "worse than")
    return [
        f"{row['depth']} blocks, {row['method']}: {what[row['difference'].sign]} the plain network, "
        f"{row['difference']:.2f}"
        for row in outcome.rows
        if "difference" in row
    ]


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy over depth."""
    series = {m: [(row["depth"], row["accuracy"]) for row in outcome.rows if row["method"] == m] for m in METHODS}
    return {"fig_14": lambda: intervals(series, xlabel="blocks", ylabel="test accuracy (%)")}


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(
        config, depths=(2, 4), instances=2, tuning=2, epochs=2, learning_rates=(0.01,), lambdas=(1.0,)
    ),
    selects=("depths", "instances", "tuning", "learning_rates", "lambdas"),
    cost=lambda config, job: config.epochs * len(job.seeds) * job.depth,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
