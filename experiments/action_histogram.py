"""The action of clean and of attacked images, and a test on it that has seen no attack (Fig. 21).

Networks are trained plainly and with least action. The kinetic action of their way through the network is found for
clean images and for images under FGM attacks of several sizes; an image is rejected where its action lies outside two
quantiles of that of other clean images. Rates are over seeds.

    python experiments/action_histogram.py
    python experiments/action_histogram.py --dataset mnist --folder DIR --solver euler --depth 9 --epsilons 0.03 0.1 0.2
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from detection_setup import Config as Networks
from detection_setup import Job, parts_of, trained, training
from safetensors.numpy import load_file, save_file

from lab.runs import Run
from lab.statistics import mean_interval
from lab.tables import table
from lab.workers import Report, Workers
from odenets import plotting
from odenets.detection import QuantileTest, Trajectory, in_batches, preset, run_attack, score, split


@dataclass(frozen=True)
class Config:
    """What to train and attack.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        solver, depth, channels: of the network's blocks.
        epsilons: sizes of the FGM attacks in the maximum norm.
        level: share of the clean images that the test may reject, half on each side; 0.04 in the thesis.
        seeds: networks per method.
        train_size, pool_size: images of the networks; images that are attacked.
        epochs: of training.
        quick: few images and epochs: to see that it runs.
        output: folder of the run, with the networks.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    solver: str = "bs23"
    depth: int = 4
    channels: int = 16
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    level: float = 0.04
    seeds: int = 5
    train_size: int = 900
    pool_size: int = 800
    epochs: int = 20
    quick: bool = False
    output: Path = Path("runs/action_histogram")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.epsilons or min(self.epsilons) <= 0:
            raise ValueError(f"epsilons must be positive, at least one, got {self.epsilons}")
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, for intervals, got {self.seeds}")

    @property
    def networks(self) -> Networks:
        """What they are, as the detection experiment has it."""
        names = ("dataset", "folder", "solver", "depth", "channels", "train_size", "pool_size", "epochs", "output")
        return Networks(**{name: getattr(self, name) for name in names})


METHODS = ("vanilla", "least action")


def look(config: Config, job: Job, report: Report) -> None:
    """The action of clean and attacked images, and how many of them the test rejects."""
    run = Run(config.output / job.name, asdict(job) | science(config), resume=True)
    train, pool = parts_of(config.networks)
    network = trained(config.networks, job, train)
    report(1)
    sets = {"clean": pool.x}
    success = {}
    for eps in config.epsilons:
        attacked = run_attack(network, preset("FGM", eps=eps), pool.x, pool.y, batch_size=200, seed=job.seed)
        sets[f"eps = {eps:g}"], success[f"eps = {eps:g}"] = attacked.images, attacked.success.numpy()
    action = Trajectory("action")
    values = {name: in_batches(partial(action, network), network, x).numpy() for name, x in sets.items()}
    parts = split(len(pool), test=0.5, validation=0.1, seed=job.seed)
    test = QuantileTest(config.level, side="both").fit(values["clean"][parts.fit])
    held = parts.test.numpy()
    rejected = {name: float((test.predict(value[held]) < 0).mean()) for name, value in values.items()}
    fooled = {
        name: float((test.predict(values[name][held]) < 0)[of[held]].mean())
        for name, of in success.items()
        if of[held].any()
    }
    auroc = {
        name: score(-test.score_samples(values["clean"][held]), -test.score_samples(value[held])).auroc
        for name, value in values.items()
        if name != "clean"
    }
    save_file({name: value.sum(1) for name, value in values.items()}, run.folder / "action.safetensors")
    quantiles = np.quantile(values["clean"][parts.fit].sum(1), [config.level / 2, 1 - config.level / 2]).tolist()
    found = {"rejected": rejected, "successful": fooled, "auroc": auroc, "quantiles": quantiles}
    run.finish(asdict(job) | found, seeds=[job.seed])
    report(1)


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job."""
    return training(config.networks) | {"epsilons": config.epsilons, "level": config.level}


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and set."""
    rows = []
    for method in METHODS:
        of = [r for r in results if r["method"] == method]
        for name in of[0]["rejected"]:
            row: dict[str, Any] = {"method": method, "images": name}
            row["rejected"] = mean_interval([100 * r["rejected"][name] for r in of])
            if name != "clean":
                row["auroc"] = mean_interval([100 * r["auroc"][name] for r in of])
                found = [100 * r["successful"][name] for r in of if name in r["successful"]]
                row["successful"] = mean_interval(found) if found else None
                plain = [r for r in results if r["method"] == METHODS[0]]
                if method != METHODS[0]:
                    pairs = [100 * (r["auroc"][name] - p["auroc"][name]) for r, p in zip(of, plain, strict=True)]
                    row["difference"] = mean_interval(pairs)
            rows.append(row)
    return rows


COLUMNS = {
    "network": "{method}",
    "images": "{images}",
    "rejected (%)": "{rejected:.1f}",
    "of successful (%)": "{successful:.1f}",
    "AUROC": "{auroc:.1f}",
    "- vanilla": "{difference:.1f}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences."""
    what = ("does not differ", "is larger", "is smaller")
    return [
        f"{row['images']}: the area under the curve of the action alone {what[row['difference'].sign]} with least "
        f"action, by {row['difference']:.1f} points (paired)"
        for row in rows
        if "difference" in row
    ]


def main(config: Config) -> None:
    """Train, attack, print one table, write the run folder with its figure."""
    if config.quick:
        config = replace(config, seeds=2, train_size=200, pool_size=200, epochs=2, epsilons=config.epsilons[:2])
    started = time.time()
    parts_of(config.networks)  # a wrong data folder shows here, before anything is written
    run = Run(config.output, science(config) | {"seeds": config.seeds}, resume=config.resume)
    jobs = [Job(method, seed) for method in METHODS for seed in range(config.seeds)]
    with Workers(config.workers or os.cpu_count() or 1) as workers:
        results = workers.complete(
            partial(look, config), jobs, lambda job: config.output / job.name, cost=lambda job: 2, label="action"
        )
    rows = summarize(config, results)
    shown = {m: load_file(config.output / Job(m, 0).name / "action.safetensors") for m in METHODS}
    lines = {r["method"]: r["quantiles"] for r in results if r["seed"] == 0}
    figure = plotting.histograms(shown, xlabel="action", lines=lines)
    plotting.save({"fig_21": figure}, run.folder / "figures")
    trainings = [{"name": job.name, "job": job.name, "seed": job.seed} for job in jobs]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
