"""Networks that choose their own depth, beside fixed ones: accuracy, cost, and survival where coarse ones diverge.

    python experiments/adaptive_depth.py
    python experiments/adaptive_depth.py --dataset mnist --train-size 2000 --test-size 2000

Bogacki-Shampine networks start at eight blocks, or at one; their embedded error merges and duplicates blocks while they
train. Beside them, on the same split and for the same seeds, stand fixed networks at the first and at the final depth
and an Euler residual network with as many field evaluations. A second part takes a total time at which coarse networks
diverge.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lab import images, plotting
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.results import groups
from lab.statistics import mean_interval
from lab.training import TrainingConfig, fit_network, parts_of
from odenets import Network, models
from odenets.checkpoints import save_weights
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.errors import DivergedError
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate, evaluate_schemes
from odenets.training.runs import read_metrics
from solvers import get_tableau


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What is trained.

    Attributes:
        tolerance: largest embedded error of a block, root mean square over features, mean over samples.
        K: blocks are merged below ``tolerance / K``.
        check_samples: validation samples on which the errors are measured after an epoch.
        stage_fields: fields per block; an untied one forwards its second-order output, which reads all of them, and is
            trained on the ensemble. Errors of chained and untied blocks do not vanish with h cubed: they need a larger
            tolerance, or every block is duplicated up to the cap.
        deep: blocks of the deep start.
        max_depth: largest number of blocks.
        total_time: sum of the step sizes.
        long_time: total time of the second part; 0 leaves it out.
        loss_limit: an epoch whose mean training loss is above this has diverged.
        full_passes: also test every embedded scheme by a pass of its own.
    """

    dataset: Literal["digits", "circles", "moons", "mnist", "fashion-mnist", "cifar10", "cifar100"] = "digits"
    tolerance: float = 3e-3
    K: float = 8.0
    check_samples: int = 128
    stage_fields: Literal["tied", "chained", "untied"] = "tied"
    deep: int = 8
    max_depth: int = 32
    total_time: float = 1.0
    long_time: float = 8.0
    loss_limit: float = 20.0
    full_passes: bool = False
    output: Path = Path("runs/adaptive_depth")


@dataclass(frozen=True)
class Job:
    """One training: a network of ``depth`` blocks, adaptive or fixed."""

    network: str
    solver: str
    depth: int
    adaptive: bool
    total_time: float
    seed: int

    @property
    def name(self) -> str:
        """Of the job's folder."""
        return f"{self.network.replace(' ', '-')}-T{self.total_time:g}-seed{self.seed}"


def jobs(config: Config) -> Jobs[Job]:
    """Adaptive and fixed networks; then fixed ones of the depth and the cost at which the adaptive ones end."""
    deep, T = config.deep, config.total_time

    def of_seeds(*networks: tuple[str, str, int, bool, float]) -> list[Job]:
        each = [Job(*network, seed) for network in networks for seed in config.seeds]
        return sorted(each, key=lambda job: -job.depth * job.total_time)  # what takes longest begins first

    first = [("adaptive from 1", "bs23", 1, True, T), (f"adaptive from {deep}", "bs23", deep, True, T)]
    first += [("fixed 1", "bs23", 1, False, T), (f"fixed {deep}", "bs23", deep, False, T)]
    if config.long_time:
        first += [(f"fixed {d}", "bs23", d, False, config.long_time) for d in (1, 2)]
        first += [("adaptive from 1", "bs23", 1, True, config.long_time)]
    results = yield of_seeds(*first)
    ends = [r["final_depth"] for r in results if r["network"] == f"adaptive from {deep}" and not r["diverged"]]
    final = statistics.mode(ends) if ends else deep
    euler = final * (4 if config.stage_fields == "untied" else 3)
    then = [(f"euler {euler}", "euler", euler, False, T)]
    then += [(f"fixed {final}", "bs23", final, False, T)] * (final not in (1, deep))
    results += yield of_seeds(*then)
    return sorted(results, key=lambda r: (r["total_time"], r["network"], r["seed"]))


def build(config: Config, dataset: TensorData, job: Job) -> Network:
    """The network of a job, with the seed's weights."""
    torch.manual_seed(job.seed)
    untied = config.stage_fields == "untied" and job.solver == "bs23"
    options: dict[str, Any] = {
        "normalize": images.normalize(dataset),
        "readout": "ensemble" if untied else "solution",
        "solver": get_tableau("bs23").forwarding("order2") if untied else job.solver,
        "depth": job.depth,
        "total_time": job.total_time,
        "stage_fields": config.stage_fields if job.solver == "bs23" else "tied",
    }
    if dataset.x.ndim == 2:
        return models.points_network(dataset.x.shape[1], dataset.classes, **options)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    if size <= 8:
        return models.small_network(channels, dataset.classes, size=size, **options)
    return models.resnet9(channels, dataset.classes, size=size, norm="group", **options)


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train and evaluate one network."""
    parts = parts_of(config)
    augmented = parts.train.x.shape[-1] > 8 and "mnist" not in config.dataset
    batches = Batches(parts.train, config.batch_size, seed=job.seed, crop=4 * augmented, flip=augmented)
    options: dict[str, Any] = {"validation": Batches(parts.validation, 500), "loss_limit": config.loss_limit}
    if job.adaptive:
        rule = DepthRule(config.tolerance, config.K, config.max_depth)
        checked = parts.validation.subset(torch.arange(min(config.check_samples, len(parts.validation))))
        inputs = Batches(checked.to(config.device), 512).inputs
        options["callbacks"] = [AdaptiveDepth(rule, inputs, until=config.epochs - config.epochs // 4)]
    network = build(config, parts.train, job)
    try:
        training = fit_network(config, network, batches, run, report, **options)
    except DivergedError as error:
        epochs = len(read_metrics(run.folder))
        report(config.epochs - epochs)
        return {"diverged": True, "message": str(error), "final_depth": network.depth, "epochs": epochs}
    save_weights(network, run.folder / "weights.safetensors")
    test, validation = (Batches(part.to(config.device), 500) for part in (parts.test, parts.validation))
    schemes = {"schemes": evaluate_schemes(network, test)}
    if config.full_passes:
        schemes["full_passes"] = evaluate_schemes(network, test, full_passes=True)
    return {
        "diverged": False,
        "final_depth": network.depth,
        "h": [h for flow in network.flows for h in flow.h],
        "parameters": sum(p.numel() for p in network.parameters()),
        "evaluations_per_forward": network.evaluations,
        "training_evaluations": training.evaluations,
        "check_evaluations": training.check_evaluations,
        "seconds": training.rows[-1]["seconds"],
        "validation": evaluate(network, validation).accuracy,
        "solution": evaluate(network, test).accuracy,
        **{kind: {name: each.accuracy for name, each in of.items()} for kind, of in schemes.items()},
    }


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per network and total time: means over the seeds with their 95 % intervals."""
    rows = []
    for (network, total_time), group in groups(results, "network", "total_time").items():
        trained = [r for r in group if not r["diverged"]]
        row: dict[str, Any] = {"network": network, "total_time": total_time, "diverged": len(group) - len(trained)}
        row |= {"seeds": len(group), "final_depths": [r["final_depth"] for r in trained]}
        if trained:
            for name in ("parameters", "evaluations_per_forward", "seconds"):
                row[name] = statistics.fmean(r[name] for r in trained)
            row["evaluations"] = statistics.fmean(r["training_evaluations"] + r["check_evaluations"] for r in trained)
            for name in ("validation", "solution"):
                row[name] = mean_interval([r[name] for r in trained])
            for kind in ("schemes", "full_passes") if "full_passes" in trained[0] else ("schemes",):
                row[kind] = {n: mean_interval([r[kind][n] for r in trained]) for n in trained[0][kind]}
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "network": "{network}",
    "T": "{total_time}",
    "diverged": "{diverged} of {seeds}",
    "blocks": lambda row: " ".join(map(str, row["final_depths"])),
    **{
        name: lambda row, name=name: f"{100 * row['schemes'][name]:.2f}"
        for name in ("order3", "order2", "midpoint", "euler", "ensemble")
    },
    "ensemble of passes": lambda row: f"{100 * row['full_passes']['ensemble']:.2f}",
    "parameters": "{parameters:,.0f}",
    "evals/forward": "{evaluations_per_forward:.1f}",
    "training evals": lambda row: f"{row['evaluations'] / 1e3:,.0f} k",
    "seconds": "{seconds:.1f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says of the claims, in sentences."""
    rows = {(row["network"], row["total_time"]): row for row in outcome.rows}
    deep = rows[f"adaptive from {config.deep}", config.total_time]
    grown = rows["adaptive from 1", config.total_time]
    fixed = [row for (name, time), row in rows.items() if name.startswith("fixed") and time == config.total_time]
    trained = [row for row in fixed if row["final_depths"]]
    lines = []
    if trained and deep["final_depths"]:
        best = max(trained, key=lambda row: row["validation"].mean)
        where = "within the interval of" if deep["solution"].mean in best["solution"] else "outside the interval of"
        where = "beside (one seed, no interval)" if best["solution"].n == 1 else where
        lines.append(
            f"adaptive from {config.deep}: {100 * deep['solution']:.2f} %, {where} the best fixed network on "
            f"validation ({best['network']}: {100 * best['solution']:.2f} %)"
        )
        reference = rows[f"fixed {config.deep}", config.total_time]
        if reference["final_depths"]:
            share = deep["evaluations"] / reference["evaluations"]
            lines.append(f"training evaluations, checks included: {100 * share:.1f} % of fixed {config.deep}")
    lines.append(f"adaptive from 1: ends at {grown['final_depths']} blocks")
    for (name, time), row in rows.items():
        if time != config.total_time:
            lines.append(f"T = {time:g}, {name}: diverged {row['diverged']} of {row['seeds']}")
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Depth over epochs, errors of the blocks, accuracy against cost."""
    of = partial(plotting.epochs_of, networks="adaptive")
    return {
        "depth": lambda: plotting.depth_and_steps(of(outcome.metrics)),
        "errors": lambda: plotting.block_errors(of(outcome.metrics), config.tolerance, config.K),
        "cost": lambda: plotting.accuracy_against_cost(outcome.rows, plotting.epochs_of(outcome.metrics)),
    }


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, seeds=(0,), epochs=2, train_size=300, deep=4, max_depth=8),
    selects=("seeds", "deep", "total_time", "long_time"),
    cost=lambda config, job: config.epochs,
    keys=("network", "total_time", "seed"),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
