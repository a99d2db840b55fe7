"""Module-wise training: greedy modules with and without the action, in sequence, in laps, in parallel [K24, section 4].

Modules of a residual network are trained each by its own loss, with (TRGL) or without (VanGL) the action of its blocks,
beside the network end to end and, on request, three baselines: InfoPro, PredSim and AugLocal. Every method's learning
rate and tau are chosen on validation images, by the last module; what is reported is the accuracy on test images after
the last epoch, after the last module and after the one that is best on validation images, over seeds that share images
and, but for the baselines, whose losses and heads are drawn among them, weights at the start, so that differences are
paired; and that of the last module with batch norm's statistics recomputed.

    python experiments/module_wise.py
    python experiments/module_wise.py --list
    python experiments/module_wise.py --rivals InfoPro PredSim AugLocal
    python experiments/module_wise.py --setting mnist-20-1 --folder DIR --sizes 150
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from module_settings import SCHEDULES, SETTINGS, Setting

from lab import images
from lab.config import Config as Common
from lab.config import check_among, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Row, Run, start
from lab.modules import accuracies, accuracy_row, difference, in_modules, over_modules, sgd_in_modules
from lab.results import best_settings, groups
from lab.statistics import percent
from lab.tables import table
from lab.thesis import beside_thesis
from odenets import initialize
from odenets.module_wise import (
    ModuleObjective,
    ModuleWise,
    auglocal,
    blocks_of,
    even,
    greedy,
    infopro,
    predsim,
    split_into_modules,
    trgl,
)
from odenets.training import datasets
from odenets.training.data import TensorData
from odenets.training.objectives import CrossEntropy

METHODS = ("VanGL", "TRGL")
RIVALS = ("InfoPro", "PredSim", "AugLocal")


@dataclass(frozen=True)
class Config(Common):
    """What to train.

    Attributes:
        setting: a table's configuration by name, or digits.
        list: show the names and end.
        folder: where torchvision's files lie; without it they are downloaded.
        sizes: numbers of training images; those of the setting if none.
        schedules: sequential, laps, parallel; those of the setting if none.
        rivals: InfoPro (its weight falls from 1 to 0 over the modules), PredSim (weight 1), AugLocal (heads of at most
            four later blocks), in the parallel schedule.
        seeds: that are reported, per method.
        tuning: seeds, of other images and weights, on which learning rates and taus are chosen.
        epochs: of a parallel or end-to-end training; the setting's if 0.
        validation_size, test_size: images to choose on; test images, all if 0.
    """

    setting: str = "digits"
    list: bool = False
    folder: Path | None = None
    sizes: tuple[int, ...] = ()
    schedules: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    seeds: int = 5
    tuning: int = 2
    epochs: int = 0
    validation_size: int = 300
    test_size: int = 0
    output: Path = Path("runs/module_wise")

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {self.setting!r}")
        check_at_least(self, 2, "seeds", "tuning")
        check_among(self, "schedules", SCHEDULES)
        check_among(self, "rivals", RIVALS)

    @property
    def table(self) -> Setting:
        """The setting, with what the command line says otherwise."""
        setting = SETTINGS[self.setting]
        if self.quick:
            setting = replace(setting, sizes=(60,), epochs=(1, 1, 1), more=(0, 0), laps=2, learning_rates=(0.05,))
            setting = replace(setting, taus=(0.5,), end_to_end_rates=(0.05,))
        given: dict[str, Any] = {"sizes": self.sizes, "schedules": self.schedules}
        if self.epochs:
            given["epochs"] = (self.epochs, *setting.epochs[1:])
        return replace(setting, **{name: value for name, value in given.items() if value})

    @property
    def ways(self) -> tuple[tuple[str, str], ...]:
        """Schedules with their methods."""
        greedily = [(schedule, method) for schedule in self.table.schedules for method in METHODS]
        return *greedily, *(("parallel", rival) for rival in self.rivals), ("end-to-end", "end-to-end")


@dataclass(frozen=True)
class Job:
    """One training."""

    size: int
    schedule: str
    method: str
    learning_rate: float
    tau: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.size}/{self.schedule}_{self.method}_lr{self.learning_rate:g}_tau{self.tau:g}_seed{self.seed}"


def parts_of(config: Config) -> tuple[TensorData, TensorData, TensorData]:
    """Images to draw training images from, validation and test images."""
    return images.pool_validation_test(config.table.dataset, config.folder, config.validation_size, config.test_size)


def build(setting: Setting, dataset: TensorData, seed: int, method: str = "VanGL") -> ModuleWise:
    """The network of a setting with the seed's weights, in modules as the method needs them."""
    torch.manual_seed(seed)
    network = setting.build(dataset.x.shape[1], dataset.x.shape[-1], dataset.classes, images.normalize(dataset))
    split = setting.split or even(blocks_of(network), setting.modules)
    if method == "AugLocal":
        heads = auglocal(network, split, dataset.x[:2])
        return initialize(split_into_modules(network, split, dataset.x[:2], head=heads), "orthogonal", setting.gain)
    loss = {"InfoPro": infopro(), "PredSim": predsim(dataset.classes)}.get(method)
    modules = in_modules(network, split, dataset, same_head=setting.same_head, local_loss=loss)
    return initialize(modules, "orthogonal", setting.gain)


def objective(setting: Setting, job: Job) -> ModuleObjective:
    """What the modules minimize."""
    task = partial(CrossEntropy, setting.label_smoothing)
    return trgl(job.tau, task) if job.method == "TRGL" else greedy(task)


def lengths(setting: Setting, schedule: str) -> list[int]:
    """Epochs of each module in a visit, or of all."""
    every, first, lap = setting.epochs
    if schedule not in ("sequential", "laps"):
        return [every]
    start, more = (first, setting.more[0]) if schedule == "sequential" else (lap, setting.more[1])
    return [start + more * k for k in range(setting.modules)]


def cost(config: Config, job: Job) -> int:
    """Epochs of all modules together."""
    return sum(lengths(config.table, job.schedule)) * (config.table.laps if job.schedule == "laps" else 1)


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train the modules of a job."""
    setting = config.table
    pool, validation, test = parts_of(config)
    part = datasets.subsample(pool, job.size, seed=job.seed) if job.size < len(pool) else pool
    batches = images.batches(part, setting.batch_size, job.seed)
    network = build(setting, pool, job.seed, job.method)
    sgd_in_modules(
        network,
        batches,
        job.learning_rate,
        "sequential" if job.schedule == "laps" else job.schedule,
        epochs=lengths(setting, job.schedule),
        objective=objective(setting, job),
        laps=setting.laps if job.schedule == "laps" else 1,
        report=report,
    )
    return accuracies(network, batches, validation, None if job.tuning else test)


def jobs(config: Config) -> Jobs[Job]:
    """Every method at every learning rate and tau; then each with what served the last module best."""
    return (yield choose(config, (yield candidates(config))))


def candidates(config: Config) -> list[Job]:
    """Every method at every learning rate and tau, to choose from."""
    setting = config.table
    return [
        Job(size, schedule, method, rate, tau, 10_000 + seed, tuning=True)
        for size in setting.sizes
        for schedule, method in config.ways
        for rate in (setting.end_to_end_rates if method == "end-to-end" else setting.learning_rates)
        for tau in (setting.taus if method == "TRGL" else (0.0,))
        for seed in range(config.tuning)
    ]


def choose(config: Config, tuned: list[Row]) -> list[Job]:
    """Per size, schedule and method the jobs to report, with what served the last module best on validation images."""
    names, within = ("learning_rate", "tau"), ("size", "schedule", "method")
    best = best_settings(tuned, names, within=within, score=lambda r: r["validation"][-1:])
    return [Job(*way, **s, seed=seed, tuning=False) for way, s in best.items() for seed in range(config.seeds)]


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per size, schedule and method; differences to VanGL in the same schedule paired over the seeds."""
    rows = []
    by_way = groups(results, "size", "schedule", "method")
    for (size, schedule, method), group in by_way.items():
        row: Row = {"size": size, "schedule": schedule, "method": method, **accuracy_row(group)}
        row["best"] = percent(r["test"][r["validation"].index(max(r["validation"]))] for r in group)
        if method != "VanGL" and (plain := by_way.get((size, schedule, "VanGL"))):
            for name, key in (("difference", "test"), ("recalibrated_difference", "recalibrated")):
                row[name], row[f"{name}_p"] = difference(group, plain, key)
        column = method if method == schedule else f"{schedule} {method}"
        row |= beside_thesis(row["best" if config.table.best else "last"], config.table.thesis, size, column)
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "images": "{size}",
    "schedule": "{schedule}",
    "method": lambda row: row["method"] if row["method"] != row["schedule"] else "",
    "lr": "{learning_rate:g}",
    "tau": lambda row: f"{row['tau']:g}" if row["tau"] else "",
    "first module": lambda row: f"{row['first']:.2f}" if row["schedule"] != "end-to-end" else "",
    "last module": "{last:.2f}",
    "last - VanGL": "{difference:.2f}",
    "p": "{difference_p:.2g}",
    "best on validation": lambda row: f"{row['best']:.2f}" if row["schedule"] != "end-to-end" else "",
    "last, recomputed statistics": "{recalibrated:.2f}",
    "recomputed - VanGL": "{recalibrated_difference:.2f}",
    "thesis": "{thesis:.2f}",
    "meets": "{meets}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in outcome.rows:
        where = f"{row['size']} images, {row['schedule']}"
        if "difference" in row:
            what = ("no difference to", "better than", "worse than")[row["difference"].sign]
            lines.append(
                f"{where}, last module: {row['method']} {what} VanGL, "
                f"{row['difference']:.2f} points, p = {row['difference_p']:.2g}"
            )
        if row["method"] == "VanGL":
            gain = row["last"].mean - row["first"].mean
            lines.append(f"{where}, VanGL: {gain:+.2f} points from the first module to the last")
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy after each module, a figure per size and schedule [K24, figs 18 and 42]."""
    ways = groups(outcome.rows, "size", "schedule").items()
    return {f"modules_{n}_{way}": over_modules(rows) for (n, way), rows in ways if rows[0]["method"] == "VanGL"}


def settings(config: Config, job: Job) -> Row:
    """What the setting holds."""
    return {name: value for name, value in vars(config.table).items() if name not in ("network", "thesis")}


def listing() -> str:
    """The settings by name."""
    columns: dict[str, Any] = {"setting": "{name}", "table": "{table}", "data": "{dataset}"}
    columns["images"] = lambda row: " ".join(map(str, row["sizes"]))
    columns |= {"K": "{modules}", "schedules": lambda row: ", ".join(row["schedules"])}
    return table(({"name": name} | vars(setting) for name, setting in SETTINGS.items()), columns)


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, seeds=2, tuning=2),
    selects=("seeds", "tuning", "rivals", "sizes", "schedules", "list"),
    keys=("name", "seed"),
)


def main(config: Config) -> None:
    """Show the settings, or run."""
    if config.list:
        print(listing())
    else:
        start(EXPERIMENT, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
