"""What the action buys on few images (tables 1, 2 and 18), with every method at its own best learning rate.

Three methods train ResNet-9 on a few labeled images: the plain network, a fixed weight of the action, and multipliers
that grow. The thesis trained all at one learning rate, with a lambda that multiplies the loss and so the step, and
reported the highest accuracy over epochs on test images. Here each method's learning rate and weight are chosen on
validation images; the accuracy is that after the last epoch on all test images, over instances that share their images
and weights at the start, so that differences are paired; and beside it stands the accuracy with batch norm's statistics
recomputed on the training images, since after few steps the running ones lag behind the weights. The thesis' own
protocol has rows of its own. Other conditions than its own, where the action may help: labels with noise, deeper and
wider networks, none with batch norm in its blocks, a bad start.

    python experiments/small_data.py
    python experiments/small_data.py --dataset mnist --folder DIR --sizes 100
    python experiments/small_data.py --conditions "label noise" deep wide "no batch norm" "bad start" --sizes 100
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from small_data_setup import (
    METHODS,
    PROTOCOL,
    WAYS,
    Config,
    Job,
    build,
    epochs_of,
    objective,
    parts_of,
    science,
    training_images,
)
from small_data_tables import COLUMNS, summarize, verdict
from torch import Tensor

from lab.runs import Run
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, measures, recalibrate
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances


def train(config: Config, job: Job, report: Report) -> None:
    """Train the instances of a job; what was found stands in its summary."""
    run = Run(config.output / job.name, asdict(job) | science(config), resume=True)
    pool, validation, test = parts_of(config)
    crop = 0 if config.dataset == "digits" else 4
    batches = [
        data.Batches(
            training_images(pool, job, seed),
            config.batch_size,
            seed=seed,
            crop=crop,
            flip=config.dataset == "cifar10",
        )
        for seed in job.seeds
    ]
    images = [validation if job.tuning else test] * len(job.seeds)
    if job.method in PROTOCOL:
        size = min(config.protocol_size, len(test))
        images = [datasets.subsample(test, size, seed=seed) for seed in job.seeds]
    found = fit_instances(
        [build(config, job, pool, seed) for seed in job.seeds],
        batches,
        epochs=epochs_of(config, job),
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=lambda: objective(config, job),
        measured={"test": images} if job.method in PROTOCOL else None,
        every=config.protocol_every,
        report=report,
    )
    results: dict[str, list[float]] = {way: [] for way in WAYS} | {f"action_{way}": [] for way in WAYS}
    for network, batch, part in zip(found.networks, batches, images, strict=True):
        for way in WAYS:
            if way not in job.ways:
                continue
            if way == "recalibrated":
                recalibrate(network, batch.inputs())
            results[f"action_{way}"].append(action(network.eval(), batch.data.x))
            results[way].append(evaluate(network, data.Batches(part, 100)).accuracy)
    if job.method in PROTOCOL:
        results["max"] = found.accuracy["test"].nan_to_num(0.0).amax(1).tolist()  # NaN before the first look
    run.finish(asdict(job) | results, seeds=list(job.seeds))


@torch.no_grad()
def action(network: Network, x: Tensor) -> float:
    """Mean action of the network on training images."""
    return network.record(x, action=measures.action)[1]["action"].sum(0).mean().item()


def groups(config: Config, first: int, number: int) -> list[tuple[int, ...]]:
    """Seeds from the first on, in groups that are trained together."""
    seeds = range(first, first + number)
    return [tuple(seeds[i : i + config.together]) for i in range(0, number, config.together)]


def candidates(config: Config, condition: str, size: int) -> list[Job]:
    """Every method at every learning rate and weight, to choose from."""
    weights = {"vanilla": (0.0,), "fixed weight": config.weights, "least action": config.lambdas}
    return [
        Job(condition, size, method, rate, weight, seeds, tuning=True)
        for method in METHODS
        for rate in config.learning_rates
        for weight in weights[method]
        for seeds in groups(config, 10_000, config.tuning)
    ]


def reported(config: Config, condition: str, size: int, chosen: dict[tuple[str, str], dict[str, Any]]) -> list[Job]:
    """The jobs whose test accuracy is reported, each only once."""
    ways: dict[tuple[str, float, float], tuple[str, ...]] = {(method, 0.01, 0.0): WAYS for method in PROTOCOL}
    for (_, way), c in chosen.items():
        key = (c["method"], c["learning_rate"], c["weight"])
        ways[key] = (*ways.get(key, ()), way)
    return [
        Job(condition, size, *each, seeds, tuning=False, ways=ways[each])
        for each in sorted(ways)
        for seeds in groups(config, 0, config.instances)
    ]


def choose(tuned: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Per method, and per way of taking batch norm's statistics, the settings best on validation images."""
    names = ("method", "learning_rate", "weight")
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for way in WAYS:
        scores: dict[tuple[Any, ...], list[float]] = {}
        for r in tuned:
            scores.setdefault(tuple(r[name] for name in names), []).extend(r[way])
        for method in METHODS:
            best = max((key for key in scores if key[0] == method), key=lambda key: statistics.fmean(scores[key]))
            chosen[method, way] = dict(zip(names, best, strict=True))
    return chosen


def main(config: Config) -> None:
    """Choose, train, print one table, write the run folder."""
    if config.quick:
        config = replace(
            config,
            sizes=(50,),
            instances=2,
            tuning=2,
            epochs=2,
            protocol_epochs=2,
            learning_rates=(0.03,),
            weights=(1.0,),
            lambdas=(1.0,),
        )
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = ("sizes", "conditions", "instances", "protocol_only")
    names += () if config.protocol_only else ("tuning", "learning_rates", "weights", "lambdas")
    run = Run(config.output, science(config) | {name: getattr(config, name) for name in names}, resume=config.resume)
    places = [(condition, size) for condition in config.conditions for size in config.sizes]

    def at(where: tuple[str, int], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in found if (r["condition"], r["size"]) == where]

    def folder(job: Job) -> Path:
        return config.output / job.name

    def cost(job: Job) -> int:
        return epochs_of(config, job) * len(job.seeds)

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        complete = partial(workers.complete, partial(train, config), folder=folder, cost=cost)
        tuned = [] if config.protocol_only else [job for where in places for job in candidates(config, *where)]
        found = complete(tuned, label="choosing")
        chosen = {where: {} if config.protocol_only else choose(at(where, found)) for where in places}
        jobs = [job for where in places for job in reported(config, *where, chosen[where])]
        results = complete(jobs, label="training")
    rows = [row for where in places for row in summarize(config, *where, chosen[where], at(where, results))]
    trainings = [{"name": job.name, "job": job.name, "seed": seed} for job in jobs for seed in job.seeds]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
