"""Networks that choose their own depth, beside fixed ones: accuracy, cost, and survival where coarse ones diverge.

    python experiments/adaptive_depth.py
    python experiments/adaptive_depth.py --dataset mnist --train-size 2000 --test-size 2000

Bogacki-Shampine networks start at eight blocks, or at one; their embedded error merges and duplicates blocks while they
train. Beside them, on the same split and for the same seeds, stand fixed networks at the first and at the final depth
and an Euler residual network with as many field evaluations. A second part takes a total time at which coarse networks
diverge.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lightning_fabric import Fabric

from lab import plotting as lab_figures
from lab.runs import Run
from lab.statistics import mean_interval
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, models, plotting
from odenets.checkpoints import save_weights
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.errors import DivergedError
from odenets.training import data, datasets
from odenets.training.loop import Callback, Training, evaluate, evaluate_schemes, fit
from odenets.training.runs import read_metrics
from solvers import get_tableau


@dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
        dataset: digits, circles and moons come with scikit-learn, the others through torchvision.
        folder: where torchvision's files lie; without it they are downloaded once.
        train_size: samples for training and validation, stratified; 0 takes all.
        test_size: the same for the test.
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
        seeds: of weights and batch order.
        epochs: of every training.
        batch_size: samples per step.
        learning_rate: at the start, for SGD with momentum 0.9; a cosine brings it to 0.
        loss_limit: an epoch whose mean training loss is above this has diverged.
        full_passes: also test every embedded scheme by a pass of its own.
        device: "cpu" or "cuda".
        workers: trainings side by side, each on one thread; 0 takes one per core on a CPU, one on a GPU.
        output: run folder.
        resume: go on with the run in the folder.
    """

    dataset: Literal["digits", "circles", "moons", "mnist", "fashion-mnist", "cifar10", "cifar100"] = "digits"
    folder: Path | None = None
    train_size: int = 0
    test_size: int = 0
    tolerance: float = 3e-3
    K: float = 8.0
    check_samples: int = 128
    stage_fields: Literal["tied", "chained", "untied"] = "tied"
    deep: int = 8
    max_depth: int = 32
    total_time: float = 1.0
    long_time: float = 8.0
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02
    loss_limit: float = 20.0
    full_passes: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    workers: int = 0
    output: Path = Path("runs/adaptive_depth")
    resume: bool = False


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


def build(config: Config, dataset: data.TensorData, job: Job) -> Network:
    """The network of a job, with the seed's weights."""
    torch.manual_seed(job.seed)
    untied = config.stage_fields == "untied" and job.solver == "bs23"
    options: dict[str, Any] = {
        "normalize": models.Normalize(list(dataset.mean), list(dataset.std)),
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


class Progress(Callback):
    """Moves the bar on after each epoch."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """One epoch more."""
        self.report(1)


def train(config: Config, job: Job, report: Report) -> None:
    """Train and evaluate one network in a folder of its own; what was found stands in its summary."""
    run = Run(config.output / job.name, {**asdict(job), **science(config)}, resume=True)
    parts = split(config)
    images = parts.train.x.shape[-1] > 8 and "mnist" not in config.dataset
    batches = data.Batches(parts.train, config.batch_size, seed=job.seed, crop=4 * images, flip=images)
    checked = parts.validation.subset(torch.arange(min(config.check_samples, len(parts.validation))))
    checked = data.Batches(checked.to(config.device), 512)
    callbacks: list[Callback] = [Progress(report)]
    if job.adaptive:
        rule = DepthRule(config.tolerance, config.K, config.max_depth)
        callbacks.append(AdaptiveDepth(rule, checked.inputs, until=config.epochs - config.epochs // 4))
    before = run.load_state()
    begun = before["epoch"] if before else 0
    report(begun)
    result: dict[str, Any] = {**asdict(job), "name": job.name, "diverged": False}
    network = build(config, parts.train, job)
    try:
        training = fit(
            network,
            batches,
            epochs=config.epochs,
            optimizer=lambda net: torch.optim.SGD(net.parameters(), config.learning_rate, momentum=0.9),
            schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, config.epochs),
            validation=data.Batches(parts.validation, 500),
            callbacks=callbacks,
            loss_limit=config.loss_limit,
            run=run,
            fabric=Fabric(accelerator=config.device, devices=1),
        )
    except DivergedError as error:
        done = len(read_metrics(run.folder))
        report(config.epochs - done)
        result |= {"diverged": True, "message": str(error), "final_depth": network.depth, "epochs": done}
        run.finish(result, seeds=[job.seed])
        return
    save_weights(network, run.folder / "weights.safetensors")
    test, validation = (data.Batches(part.to(config.device), 500) for part in (parts.test, parts.validation))
    result |= {
        "final_depth": network.depth,
        "h": [h for flow in network.flows for h in flow.h],
        "parameters": sum(p.numel() for p in network.parameters()),
        "evaluations_per_forward": network.evaluations,
        "training_evaluations": training.evaluations,
        "check_evaluations": training.check_evaluations,
        "seconds": training.rows[-1]["seconds"],
        "validation": evaluate(network, validation).accuracy,
        "solution": evaluate(network, test).accuracy,
        "schemes": {name: found.accuracy for name, found in evaluate_schemes(network, test).items()},
    }
    if config.full_passes:
        found = evaluate_schemes(network, test, full_passes=True)
        result["full_passes"] = {name: evaluation.accuracy for name, evaluation in found.items()}
    run.finish(result, seeds=[job.seed])


def split(config: Config) -> data.Split:
    """The data, cut the same for every job."""
    train, test = datasets.load(config.dataset, config.folder)
    if config.test_size:
        test = datasets.subsample(test, config.test_size)
    return datasets.split(train, test, size=config.train_size or None)


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job, and not where, beside what, or for which other seeds it runs."""
    settings = asdict(config)
    for name in ("output", "resume", "workers", "folder", "seeds", "deep", "total_time", "long_time"):
        settings.pop(name)
    return settings


def train_all(config: Config, jobs: list[Job], workers: Workers, label: str) -> list[dict[str, Any]]:
    """Results of the jobs, the dearest begun first; finished ones are read."""
    jobs = sorted(jobs, key=lambda job: -job.depth * job.total_time)
    folder = lambda job: config.output / job.name  # noqa: E731
    return workers.complete(partial(train, config), jobs, folder, cost=lambda job: config.epochs, label=label)


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per network and total time: means over the seeds with their 95 % intervals."""
    rows = []
    for key in dict.fromkeys((r["network"], r["total_time"]) for r in results):
        group = [r for r in results if (r["network"], r["total_time"]) == key]
        trained = [r for r in group if not r["diverged"]]
        row: dict[str, Any] = {"network": key[0], "total_time": key[1], "diverged": len(group) - len(trained)}
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


def _scheme(name: str) -> Callable[[Mapping[str, Any]], str]:
    """The test accuracy of an embedded scheme, in percent."""
    return lambda row: f"{100 * row['schemes'][name]:.2f}"


COLUMNS: dict[str, Any] = {
    "network": "{network}",
    "T": "{total_time}",
    "diverged": "{diverged} of {seeds}",
    "blocks": lambda row: " ".join(map(str, row["final_depths"])),
    **{name: _scheme(name) for name in ("order3", "order2", "midpoint", "euler", "ensemble")},
    "ensemble of passes": lambda row: f"{100 * row['full_passes']['ensemble']:.2f}",
    "parameters": "{parameters:,.0f}",
    "evals/forward": "{evaluations_per_forward:.1f}",
    "training evals": lambda row: f"{row['evaluations'] / 1e3:,.0f} k",
    "seconds": "{seconds:.1f}",
}


def verdict(config: Config, rows: list[dict[str, Any]]) -> list[str]:
    """What the table says of the claims, in sentences."""
    found = {(row["network"], row["total_time"]): row for row in rows}
    deep = found[f"adaptive from {config.deep}", config.total_time]
    grown = found["adaptive from 1", config.total_time]
    fixed = [r for r in rows if r["network"].startswith("fixed") and r["total_time"] == config.total_time]
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
        reference = found[f"fixed {config.deep}", config.total_time]
        if reference["final_depths"]:
            share = deep["evaluations"] / reference["evaluations"]
            lines.append(f"training evaluations, checks included: {100 * share:.1f} % of fixed {config.deep}")
    lines.append(f"adaptive from 1: ends at {grown['final_depths']} blocks")
    for row in rows:
        if row["total_time"] != config.total_time:
            lines.append(f"T = {row['total_time']:g}, {row['network']}: diverged {row['diverged']} of {row['seeds']}")
    return lines


def main(config: Config) -> None:
    """Train everything, print one table, write the run folder with its figures."""
    whole = {name: asdict(config)[name] for name in ("seeds", "deep", "total_time", "long_time")}
    started = time.time()
    split(config)  # a wrong data folder shows here, before anything is written
    run = Run(config.output, science(config) | whole, resume=config.resume)
    deep, T = config.deep, config.total_time
    first = [("adaptive from 1", 1, True, T), (f"adaptive from {deep}", deep, True, T)]
    first += [("fixed 1", 1, False, T), (f"fixed {deep}", deep, False, T)]
    if config.long_time:
        first += [(f"fixed {d}", d, False, config.long_time) for d in (1, 2)]
        first += [("adaptive from 1", 1, True, config.long_time)]
    cores = 1 if config.device == "cuda" else os.cpu_count() or 1
    with Workers(config.workers or cores) as workers:
        jobs = [Job(name, "bs23", d, adapts, time, seed) for name, d, adapts, time in first for seed in config.seeds]
        results = train_all(config, jobs, workers, "adaptive and fixed")
        ends = [r["final_depth"] for r in results if r["network"] == f"adaptive from {deep}" and not r["diverged"]]
        final = statistics.mode(ends) if ends else deep
        then = [("euler", "euler", final * (4 if config.stage_fields == "untied" else 3))]
        then += [("fixed", "bs23", final)] * (final not in (1, deep))
        jobs = [Job(f"{name} {d}", solver, d, False, T, seed) for name, solver, d in then for seed in config.seeds]
        results += train_all(config, jobs, workers, "as deep as it ended")
    results.sort(key=lambda r: (r["total_time"], r["network"], r["seed"]))
    rows = summarize(results)
    plotting.save(lab_figures.adaptive_depth(run.folder), run.folder / "figures")
    keys = ("network", "total_time", "seed")
    print(run.conclude(results, keys, rows, table(rows, COLUMNS), verdict(config, rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
