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

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab import images
from lab.config import ImageConfig
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.statistics import correlation, mean_interval, percent
from odenets import Network, initialize, measures, plotting
from odenets.analysis import iterative_refinement
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy


@dataclass(frozen=True)
class Config(ImageConfig):
    """What to train.

    Attributes:
        train_size: training images; 0 takes all.
        orthogonal, normal: gains of the initializations.
        instances: per initialization.
        epochs: of training.
        batch_size: of training.
        learning_rate: of SGD with momentum 0.9.
    """

    train_size: int = 500
    orthogonal: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0, 2.0)
    normal: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5)
    instances: int = 10
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    output: Path = Path("runs/action_and_accuracy")

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


def jobs(config: Config) -> Jobs[Job]:
    """Every initialization."""
    gains = {"orthogonal": config.orthogonal, "normal": config.normal}
    return (yield [Job(initializer, gain) for initializer, values in gains.items() for gain in values])


def build(config: Config, dataset: TensorData, job: Job, seed: int) -> Network:
    """ResNet-9 with the seed's weights, drawn as the job says."""
    return initialize(images.resnet9(dataset, seed), job.initializer, job.gain)


def parts_of(config: Config) -> tuple[TensorData, TensorData]:
    """Training and test images."""
    return images.train_and_test(config.dataset, config.folder, config.train_size)


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train the instances of an initialization."""
    train, test = parts_of(config)
    trained = fit_instances(
        [build(config, train, job, seed) for seed in range(config.instances)],
        [Batches(train, config.batch_size, seed=seed) for seed in range(config.instances)],
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=config.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=CrossEntropy,
        report=report,
    )
    batches = Batches(test, 500)
    blocks = [iterative_refinement(network, batches) for network in trained.networks]
    return {
        "accuracy": [evaluate(network, batches).accuracy for network in trained.networks],
        "action": [action(network, batches) for network in trained.networks],
        "ratio": torch.stack([each.ratio for each in blocks]).tolist(),
        "cosine": torch.stack([each.cosine for each in blocks]).tolist(),
    }


@torch.no_grad()
def action(network: Network, batches: Batches) -> float:
    """Mean action of the network on a data set, in eval mode."""
    network.eval()
    totals = [network.record(x, action=measures.action)[1]["action"].sum() for x in batches.inputs()]
    return (torch.stack(totals).sum() / len(batches.data)).item()


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per initialization, and one over all: accuracy, action, and the correlation of accuracy with its log."""
    everything = {name: [v for r in results for v in r[name]] for name in ("accuracy", "action")}
    rows = []
    for result in [*results, {"initializer": "all", "gain": None} | everything]:
        logs = np.log10(result["action"]).tolist()
        row = {name: result[name] for name in ("initializer", "gain")}
        row |= {"accuracy": percent(result["accuracy"]), "log10_action": mean_interval(logs)}
        rows.append(row | {"correlation": correlation(logs, result["accuracy"])})
    return rows


COLUMNS: Columns = {
    "initialization": "{initializer}",
    "gain": "{gain:g}",
    "test accuracy": "{accuracy:.2f}",
    "log10 action on test": "{log10_action:.2f}",
    "correlation": "{correlation[0]:.2f}",
    "p": "{correlation[1]:.2g}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences."""
    *each, whole = outcome.rows
    r, p = whole["correlation"]
    within = [row for row in each if row["correlation"][1] < 0.05]
    negative = sum(row["correlation"][0] < 0 for row in within)
    return [
        f"over all networks the accuracy correlates with the logarithm of the action by {r:.2f} (p = {p:.2g})",
        f"within an initialization it does so (p < 0.05) in {len(within)} of {len(each)}, negatively in {negative}",
    ]


def details(config: Config, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What each block does, by initialization."""
    return {"blocks": {r["name"].replace("_", " "): (r["ratio"], r["cosine"]) for r in results}}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy against action, and what each block does."""
    points = {
        f"{row['initializer']} {row['gain']:g}": (
            [10**log for log in row["log10_action"].values],
            [right / 100 for right in row["accuracy"].values],
        )
        for row in outcome.rows[:-1]
    }
    return {
        "fig_11": lambda: plotting.action_against_accuracy(points),
        "fig_6": lambda: plotting.refinement_by_block(outcome.detail("blocks")),
    }


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda c: replace(c, orthogonal=(0.1, 1.0), normal=(0.1,), instances=3, epochs=1, train_size=100),
    selects=("orthogonal", "normal"),
    seeds=lambda config, job: range(config.instances),
    cost=lambda config, job: config.epochs * config.instances,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
