"""LocalModule-wise training: greedy modules with and without the action, in sequence, in laps, in parallel (section 4).

Modules of a residual network are trained each by its own loss, with (TRGL) or without (VanGL) the action of its blocks,
beside the network end to end and, where asked, three rivals: InfoPro, PredSim and AugLocal. Every method's learning
rate and tau are chosen on validation images, by the last module; what is reported is the accuracy on test images after
the last epoch, after the last module and after the one that is best on validation images, over seeds that share images
and, but for the rivals, whose losses and heads are drawn among them, weights at the start, so that differences are
paired; and that of the last module with batch norm's statistics recomputed.

    python experiments/module_wise.py
    python experiments/module_wise.py --list
    python experiments/module_wise.py --rivals InfoPro PredSim AugLocal
    python experiments/module_wise.py --setting mnist-20-1 --folder DIR --sizes 150
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from module_settings import SCHEDULES, SETTINGS, Setting

from lab.plotting import intervals
from lab.runs import Run
from lab.statistics import Interval, mean_interval, paired_p_value
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, initialize, models, plotting, recalibrate
from odenets.module_wise import (
    ModuleObjective,
    ModuleWise,
    auglocal,
    blocks_of,
    conv_head,
    even,
    fit_modules,
    greedy,
    infopro,
    predsim,
    split_into_modules,
    trgl,
)
from odenets.training import data, datasets
from odenets.training.objectives import CrossEntropy

METHODS = ("VanGL", "TRGL")
RIVALS = ("InfoPro", "PredSim", "AugLocal")


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        setting: a table's configuration by name, or digits.
        list: show the names and end.
        folder: where torchvision's files lie; without it they are downloaded.
        sizes: numbers of training images; the setting's if not given.
        schedules: sequential, laps, parallel; the setting's if not given.
        rivals: InfoPro (its weight falls from 1 to 0 over the modules), PredSim (weight 1), AugLocal (heads of at most
            four later blocks), in the parallel schedule.
        seeds: that are reported, per method.
        tuning: seeds, of other images and weights, on which learning rates and taus are chosen.
        epochs: of a parallel or end-to-end training; the setting's if 0.
        validation_size, test_size: images to choose on; test images, all if 0.
        quick: few images, blocks and epochs: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
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
    quick: bool = False
    output: Path = Path("runs/module_wise")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {self.setting!r}")
        if min(self.seeds, self.tuning) < 2:
            raise ValueError(f"seeds and tuning must be at least 2, got {self.seeds} and {self.tuning}")
        if unknown := set(self.schedules) - set(SCHEDULES):
            raise ValueError(f"schedules must be among {', '.join(SCHEDULES)}, got {', '.join(sorted(unknown))}")
        if unknown := set(self.rivals) - set(RIVALS):
            raise ValueError(f"rivals must be among {', '.join(RIVALS)}, got {', '.join(sorted(unknown))}")

    @property
    def table(self) -> Setting:
        """The setting, with what is asked otherwise."""
        found = SETTINGS[self.setting]
        if self.sizes:
            found = replace(found, sizes=self.sizes)
        if self.schedules:
            found = replace(found, schedules=self.schedules)
        if self.epochs:
            found = replace(found, epochs=(self.epochs, *found.epochs[1:]))
        if self.quick:
            found = replace(found, sizes=(60,), epochs=(1, 1, 1), more=(0, 0), laps=2, learning_rates=(0.05,))
            found = replace(found, taus=(0.5,), end_to_end_rates=(0.05,))
        return found


@dataclass(frozen=True)
class Job:
    """One training; its name is that of its folder."""

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


def parts_of(config: Config) -> tuple[data.TensorData, data.TensorData, data.TensorData]:
    """Images to draw training images from, validation and test images."""
    pool, test = datasets.load(config.table.dataset, config.folder)
    pool, validation = datasets.hold_out(pool, config.validation_size, seed=0)
    return pool, validation, datasets.subsample(test, config.test_size, seed=0) if config.test_size else test


def build(setting: Setting, dataset: data.TensorData, seed: int, method: str = "VanGL") -> ModuleWise:
    """The network of a setting with the seed's weights, in modules as the method needs them."""
    torch.manual_seed(seed)
    normalize = models.Normalize([*dataset.mean], [*dataset.std])
    network = setting.build(dataset.x.shape[1], dataset.x.shape[-1], dataset.classes, normalize)
    head: Any = "auto"
    if setting.same_head:
        assert isinstance(network, Network)
        with torch.no_grad():
            state = network.eval().encoder(dataset.x[:2])
        head = conv_head(state, dataset.classes)
    split = setting.split or even(blocks_of(network), setting.modules)
    if method == "AugLocal":
        heads = auglocal(network, split, dataset.x[:2])
        return initialize(split_into_modules(network, split, dataset.x[:2], head=heads), "orthogonal", setting.gain)
    loss = {"InfoPro": infopro(), "PredSim": predsim(dataset.classes)}.get(method)
    modules = split_into_modules(network, split, dataset.x[:2], head=head, last_head="auxiliary", local_loss=loss)
    return initialize(modules, "orthogonal", setting.gain)


def objective(setting: Setting, job: Job) -> ModuleObjective:
    """What the modules minimize."""
    task = partial(CrossEntropy, setting.label_smoothing)
    return trgl(job.tau, task) if job.method == "TRGL" else greedy(task)


def lengths(setting: Setting, schedule: str) -> list[int]:
    """Epochs of each module in a visit, or of all."""
    every, first, lap = setting.epochs
    if schedule == "sequential":
        return [first + setting.more[0] * k for k in range(setting.modules)]
    if schedule == "laps":
        return [lap + setting.more[1] * k for k in range(setting.modules)]
    return [every]


def train(config: Config, job: Job, report: Report) -> None:
    """Train the modules of a job; what was found stands in its summary."""
    setting = config.table
    run = Run(config.output / job.name, asdict(job) | science(config), resume=True)
    pool, validation, test = parts_of(config)
    batches = data.Batches(
        datasets.subsample(pool, job.size, seed=job.seed) if job.size < len(pool) else pool,
        setting.batch_size,
        seed=job.seed,
        crop=0 if setting.dataset == "digits" else 4,
        flip=setting.dataset.startswith("cifar"),
    )
    sequential = job.schedule in ("sequential", "laps")
    network = build(setting, pool, job.seed, job.method)
    fit_modules(
        network,
        batches,
        epochs=lengths(setting, job.schedule),
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=objective(setting, job),
        schedule="sequential" if sequential else job.schedule,  # type: ignore[arg-type]
        laps=setting.laps if job.schedule == "laps" else 1,
        cache="memory" if sequential else None,
        views=4,
        report=report,
    )
    found = {"validation": network.accuracies(data.Batches(validation, 500))}
    if not job.tuning:
        found["test"] = network.accuracies(data.Batches(test, 100))
        recalibrate(network, batches.inputs(), network)  # the last head alone, which may be that of other modules too
        found["recalibrated"] = network.accuracies(data.Batches(test, 100))
    run.finish(asdict(job) | found, seeds=[job.seed])


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job beside its own settings."""
    setting = {key: value for key, value in vars(config.table).items() if key not in ("build", "thesis")}
    return {"setting": config.setting, "validation_size": config.validation_size, "test_size": config.test_size} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in setting.items()
    }


def ways(config: Config) -> list[tuple[str, str]]:
    """Schedules with their methods."""
    greedily = [(s, m) for s in config.table.schedules for m in METHODS]
    return [*greedily, *(("parallel", rival) for rival in config.rivals), ("end-to-end", "end-to-end")]


def candidates(config: Config) -> list[Job]:
    """Every method at every learning rate and tau, to choose from."""
    setting = config.table
    return [
        Job(size, schedule, method, rate, tau, 10_000 + seed, tuning=True)
        for size in setting.sizes
        for schedule, method in ways(config)
        for rate in (setting.end_to_end_rates if method == "end-to-end" else setting.learning_rates)
        for tau in (setting.taus if method == "TRGL" else (0.0,))
        for seed in range(config.tuning)
    ]


def choose(config: Config, tuned: list[dict[str, Any]]) -> list[Job]:
    """Per size, schedule and method the jobs to report, with what served the last module best on validation images."""
    chosen = []
    for size in config.table.sizes:
        for way in ways(config):
            scores: dict[tuple[float, float], list[float]] = {}
            for r in tuned:
                if (r["size"], r["schedule"], r["method"]) == (size, *way):
                    scores.setdefault((r["learning_rate"], r["tau"]), []).append(r["validation"][-1])
            rate, tau = max(scores, key=lambda key: statistics.fmean(scores[key]))
            chosen += [Job(size, *way, rate, tau, seed, tuning=False) for seed in range(config.seeds)]
    return chosen


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per size, schedule and method; differences to VanGL in the same schedule paired over the seeds."""
    rows = []
    for size in config.table.sizes:
        for schedule, method in ways(config):
            found = of(results, size, schedule, method)
            last = [100 * r["test"][-1] for r in found]
            best = [100 * r["test"][r["validation"].index(max(r["validation"]))] for r in found]
            row: dict[str, Any] = {"size": size, "schedule": schedule, "method": method}
            row |= {"learning_rate": found[0]["learning_rate"], "tau": found[0]["tau"]}
            row |= {"last": mean_interval(last), "best": mean_interval(best)}
            row["first"] = mean_interval([100 * r["test"][0] for r in found])
            row["recalibrated"] = mean_interval([100 * r["recalibrated"][-1] for r in found])
            row["modules"] = [mean_interval([100 * r["test"][k] for r in found]) for k in range(len(found[0]["test"]))]
            if method != "VanGL" and (plain := of(results, size, schedule, "VanGL")):
                for name, key in (("difference", "test"), ("recalibrated_difference", "recalibrated")):
                    a, b = ([100 * r[key][-1] for r in rs] for rs in (found, plain))
                    row[name] = mean_interval([x - y for x, y in zip(a, b, strict=True)])
                    row[name + "_p"] = paired_p_value(a, b)
            figure = config.table.thesis.get((size, schedule, method))
            if figure is not None:
                ours = row["best" if config.table.best else "last"]
                row |= {"thesis": Interval(*figure, 10), "meets": ours.meets(Interval(*figure, 10))}
            rows.append(row)
    return rows


def of(results: list[dict[str, Any]], size: int, schedule: str, method: str) -> list[dict[str, Any]]:
    """The results of a method, by seed."""
    found = [r for r in results if (r["size"], r["schedule"], r["method"]) == (size, schedule, method)]
    return sorted(found, key=lambda r: r["seed"])


COLUMNS: dict[str, Any] = {
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


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in rows:
        if "difference" in row:
            what = ("no difference to", "better than", "worse than")[row["difference"].sign]
            lines.append(
                f"{row['size']} images, {row['schedule']}, last module: {row['method']} {what} VanGL, "
                f"{row['difference']:.2f} points, p = {row['difference_p']:.2g}"
            )
        if row["method"] == "VanGL":
            gain = row["last"].mean - row["first"].mean
            lines.append(
                f"{row['size']} images, {row['schedule']}, VanGL: {gain:+.2f} points from the first module to the last"
            )
    return lines


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy after each module, a figure per size and schedule (Figs 18 and 42)."""
    found = {}
    for row in rows:
        if row["method"] != "VanGL":
            continue
        both = [r for r in rows if (r["size"], r["schedule"]) == (row["size"], row["schedule"])]
        series = {r["method"]: list(enumerate(r["modules"], 1)) for r in both}
        name = f"modules_{row['size']}_{row['schedule']}"
        found[name] = intervals(series, xlabel="module", ylabel="test accuracy (%)")
    return found


def listing() -> str:
    """The settings by name."""
    columns: dict[str, Any] = {"setting": "{name}", "table": "{table}", "data": "{dataset}"}
    columns["images"] = lambda row: " ".join(map(str, row["sizes"]))
    columns |= {"K": "{modules}", "schedules": lambda row: ", ".join(row["schedules"])}
    return table(({"name": name} | vars(setting) for name, setting in SETTINGS.items()), columns)


def main(config: Config) -> None:
    """Choose, train, print one table, write the run folder with its figures."""
    if config.list:
        print(listing())
        return
    if config.quick:
        config = replace(config, seeds=2, tuning=2)
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = {name: getattr(config, name) for name in ("seeds", "tuning", "rivals")}
    run = Run(config.output, science(config) | names, resume=config.resume)
    setting = config.table

    def folder(job: Job) -> Path:
        return config.output / job.name

    def cost(job: Job) -> int:
        return sum(lengths(setting, job.schedule)) * (setting.laps if job.schedule == "laps" else 1)

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        complete = partial(workers.complete, partial(train, config), folder=folder, cost=cost)
        jobs = choose(config, complete(candidates(config), label="choosing"))
        results = complete(jobs, label="training")
    rows = summarize(config, results)
    plotting.save(figures(rows), run.folder / "figures")
    trainings = [{"name": job.name, "job": job.name, "seed": job.seed} for job in jobs]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
