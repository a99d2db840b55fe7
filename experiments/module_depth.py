"""Where greedy modules stagnate, and what the action does there (Figs 18, 42 and 43).

The accuracy after each module, with the action and without, under conditions that might make early modules overfit and
late ones add nothing or harm: modules in sequence, one classifier for all, many modules, few images, labels with noise.
Learning rate and tau are chosen for each on validation images, by the last module; the figures show test images, after
the last epoch, over seeds that share images and weights. And the accuracy of the last module over tau.

    python experiments/module_depth.py
    python experiments/module_depth.py --dataset mnist --folder DIR --conditions standard sequential --seeds 5
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
from lab.statistics import Interval, mean_interval, paired_p_value
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, initialize, models, plotting, recalibrate
from odenets.module_wise import ModuleWise, conv_head, fit_modules, greedy, split_into_modules, trgl
from odenets.training import data, datasets


@dataclass(frozen=True)
class Condition:
    """What greedy modules are trained under.

    Attributes:
        modules: of one block each.
        size: training images.
        schedule: in which order modules are trained.
        same_head: one classifier for all modules.
        label_noise: share of the training labels that are drawn anew from all classes.
    """

    modules: int = 10
    size: int = 200
    schedule: Literal["parallel", "sequential"] = "parallel"
    same_head: bool = False
    label_noise: float = 0.0


CONDITIONS = {
    "standard": Condition(),
    "sequential": Condition(schedule="sequential"),
    "same head": Condition(same_head=True),
    "same head, sequential": Condition(same_head=True, schedule="sequential"),
    "20 modules": Condition(modules=20),
    "few images": Condition(size=50),
    "label noise": Condition(label_noise=0.4),
}


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        conditions: standard, sequential, same head, same head, sequential, 20 modules, few images, label noise.
        seeds: that are reported.
        tuning: seeds, of other images and weights, on which learning rate and tau are chosen.
        epochs: of a parallel training, and of each module in a sequential one.
        batch_size: of training.
        learning_rates, taus: tried.
        validation_size: images to choose on.
        quick: one condition, few seeds and epochs: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    seeds: int = 5
    tuning: int = 2
    epochs: int = 20
    batch_size: int = 50
    learning_rates: tuple[float, ...] = (0.01, 0.05)
    taus: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    validation_size: int = 300
    quick: bool = False
    output: Path = Path("runs/module_depth")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.conditions) - set(CONDITIONS):
            raise ValueError(f"conditions must be among {'; '.join(CONDITIONS)}, got {', '.join(sorted(unknown))}")
        if min(self.seeds, self.tuning) < 2:
            raise ValueError(f"seeds and tuning must be at least 2, got {self.seeds} and {self.tuning}")


@dataclass(frozen=True)
class Job:
    """One training; tau is 0 where there is no action (VanGL)."""

    condition: str
    learning_rate: float
    tau: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        folder = self.condition.replace(", ", "_").replace(" ", "_")
        return f"{folder}/lr{self.learning_rate:g}_tau{self.tau:g}_seed{self.seed}"


def parts_of(config: Config) -> tuple[data.TensorData, data.TensorData, data.TensorData]:
    """Images to draw training images from, validation and test images."""
    pool, test = datasets.load(config.dataset, config.folder)
    pool, validation = datasets.hold_out(pool, config.validation_size, seed=0)
    return pool, validation, test


def training_images(pool: data.TensorData, condition: Condition, seed: int) -> data.TensorData:
    """The training images of a seed, with the condition's label noise."""
    part = datasets.subsample(pool, condition.size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(part), generator=generator) < condition.label_noise
    labels = torch.where(noisy, torch.randint(part.classes, (len(part),), generator=generator), part.y)
    return replace(part, y=labels)


def build(config: Config, condition: Condition, pool: data.TensorData, seed: int) -> ModuleWise:
    """One block per module, with the seed's weights."""
    torch.manual_seed(seed)
    channels, size = pool.x.shape[1], pool.x.shape[-1]
    network: Network = models.resnet9(
        channels,
        pool.classes,
        features={"digits": 16, "mnist": 32, "cifar10": 100}[config.dataset],
        size=size,
        depth=condition.modules,
        normalize=models.Normalize([*pool.mean], [*pool.std]),
    )
    head: Any = "auto"
    if condition.same_head:
        with torch.no_grad():
            head = conv_head(network.eval().encoder(pool.x[:2]), pool.classes)
    modules = split_into_modules(network, condition.modules, pool.x[:2], head=head, last_head="auxiliary")
    return initialize(modules, "orthogonal", 0.1)


def train(config: Config, job: Job, report: Report) -> None:
    """Train the modules of a job; what was found stands in its summary."""
    condition = CONDITIONS[job.condition]
    run = Run(config.output / job.name, asdict(job) | asdict(condition) | science(config), resume=True)
    pool, validation, test = parts_of(config)
    images = training_images(pool, condition, job.seed)
    batches = data.Batches(images, config.batch_size, seed=job.seed, crop=0 if config.dataset == "digits" else 4)
    network = build(config, condition, pool, job.seed)
    training = fit_modules(
        network,
        batches,
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=trgl(job.tau) if job.tau else greedy(),
        schedule=condition.schedule,
        cache="memory" if condition.schedule == "sequential" else None,
        views=4,
        report=report,
    )
    found = {"validation": network.accuracies(data.Batches(validation, 500))}
    last = {row["module"]: row["train_accuracy"] for row in training.rows}
    found["train"] = [last[k + 1] for k in range(network.K)]
    if not job.tuning:
        found["test"] = network.accuracies(data.Batches(test, 100))
        recalibrate(network, batches.inputs(), network)  # the last head alone, which may be that of other modules too
        found["recalibrated"] = network.accuracies(data.Batches(test, 100))
    run.finish(asdict(job) | found, seeds=[job.seed])


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job beside its own settings."""
    return {name: getattr(config, name) for name in ("dataset", "epochs", "batch_size", "validation_size")}


def candidates(config: Config) -> list[Job]:
    """Every learning rate and tau under every condition, to choose from."""
    return [
        Job(condition, rate, tau, 10_000 + seed, tuning=True)
        for condition in config.conditions
        for rate in config.learning_rates
        for tau in (0.0, *config.taus)
        for seed in range(config.tuning)
    ]


def best(config: Config, tuned: list[dict[str, Any]], condition: str, taus: tuple[float, ...]) -> tuple[float, float]:
    """Learning rate and tau that served the last module best on validation images."""
    scores: dict[tuple[float, float], list[float]] = {}
    for r in tuned:
        if r["condition"] == condition and r["tau"] in taus:
            scores.setdefault((r["learning_rate"], r["tau"]), []).append(r["validation"][-1])
    return max(scores, key=lambda key: statistics.fmean(scores[key]))


def choose(config: Config, tuned: list[dict[str, Any]]) -> list[Job]:
    """What is reported: with the action and without, and under the first condition every tau."""
    chosen: dict[tuple[str, float, float], None] = {}
    for condition in config.conditions:
        chosen[condition, *best(config, tuned, condition, (0.0,))] = None
        chosen[condition, *best(config, tuned, condition, config.taus)] = None
        if condition == config.conditions[0]:
            for tau in config.taus:
                chosen[condition, *best(config, tuned, condition, (tau,))] = None
    return [Job(*each, seed, tuning=False) for each in chosen for seed in range(config.seeds)]


def summarize(config: Config, tuned: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two rows per condition, without the action and with it, differences paired over the seeds."""
    rows = []
    for condition in config.conditions:
        plain: list[dict[str, Any]] = []
        for method, taus in (("VanGL", (0.0,)), ("TRGL", config.taus)):
            rate, tau = best(config, tuned, condition, taus)
            found = of(results, condition, rate, tau)
            plain = plain or found
            row: dict[str, Any] = {"condition": condition, "method": method, "learning_rate": rate, "tau": tau}
            row["modules"] = over_modules(found, "test")
            row |= {"first": row["modules"][0], "last": row["modules"][-1]}
            row["stagnation"] = mean_interval([100 * (r["test"][-1] - max(r["test"])) for r in found])
            row["trained"] = mean_interval([100 * r["train"][0] for r in found])
            row["recalibrated"] = mean_interval([100 * r["recalibrated"][-1] for r in found])
            if method == "TRGL":
                for name, key, k in (("first", "test", 0), ("last", "test", -1), ("recalibrated", "recalibrated", -1)):
                    a, b = ([100 * r[key][k] for r in rs] for rs in (found, plain))
                    row[f"{name}_difference"] = mean_interval([x - y for x, y in zip(a, b, strict=True)])
                    row[f"{name}_p"] = paired_p_value(a, b)
            rows.append(row)
    return rows


def of(results: list[dict[str, Any]], condition: str, rate: float, tau: float) -> list[dict[str, Any]]:
    """The results of a setting, by seed."""
    found = [r for r in results if (r["condition"], r["learning_rate"], r["tau"]) == (condition, rate, tau)]
    return sorted(found, key=lambda r: r["seed"])


def over_modules(found: list[dict[str, Any]], key: str) -> list[Interval]:
    """Accuracy (%) after each module."""
    return [mean_interval([100 * r[key][k] for r in found]) for k in range(len(found[0][key]))]


COLUMNS: dict[str, Any] = {
    "condition": "{condition}",
    "method": "{method}",
    "lr": "{learning_rate:g}",
    "tau": lambda row: f"{row['tau']:g}" if row["tau"] else "",
    "first module": "{first:.2f}",
    "first - VanGL": "{first_difference:.2f}",
    "last module": "{last:.2f}",
    "last - VanGL": "{last_difference:.2f}",
    "p": "{last_p:.2g}",
    "last - best module (on test)": "{stagnation:.2f}",
    "last, recomputed statistics": "{recalibrated:.2f}",
    "recomputed - VanGL": "{recalibrated_difference:.2f}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in rows:
        if row["method"] == "VanGL":
            gain = row["last"].mean - row["first"].mean
            lines.append(f"{row['condition']}: VanGL goes {gain:+.2f} points from the first module to the last")
            continue
        for name in ("first", "last"):
            found = row[f"{name}_difference"]
            what = ("as good as", "above", "below")[found.sign]
            lines.append(f"{row['condition']}: the {name} module of TRGL is {what} VanGL's, {found:.2f} points")
    return lines


def figures(config: Config, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over modules under each condition (Figs 18 and 42), and over tau under the first (Fig. 43)."""
    found = {}
    for condition in config.conditions:
        series = {r["method"]: list(enumerate(r["modules"], 1)) for r in rows if r["condition"] == condition}
        name = "fig_18_" + condition.replace(", ", "_").replace(" ", "_")
        found[name] = intervals(series, xlabel="module", ylabel="test accuracy (%)")
    first = [r for r in results if r["condition"] == config.conditions[0]]
    by_tau = {tau: [100 * r["test"][-1] for r in first if r["tau"] == tau] for tau in (0.0, *config.taus)}
    # a setting can be reported at two learning rates only if two methods chose it; the one of its tau is the last
    line = [(tau, mean_interval(by_tau[tau][-config.seeds :])) for tau in config.taus]
    level = mean_interval(by_tau[0.0][-config.seeds :])
    series = {"TRGL": line, "VanGL": [(tau, level) for tau in config.taus]}
    label = "test accuracy of the last module (%)"
    found["fig_43"] = intervals(series, xlabel="tau", ylabel=label, logarithmic=True)
    return found


def main(config: Config) -> None:
    """Choose, train, print one table, write the run folder with its figures."""
    if config.quick:
        config = replace(config, conditions=("few images",), seeds=2, tuning=2, epochs=1, learning_rates=(0.05,))
        config = replace(config, taus=(0.1, 1.0))
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = {name: getattr(config, name) for name in ("conditions", "seeds", "tuning", "learning_rates", "taus")}
    run = Run(config.output, science(config) | names, resume=config.resume)

    def folder(job: Job) -> Path:
        return config.output / job.name

    def cost(job: Job) -> int:
        condition = CONDITIONS[job.condition]
        return config.epochs * (condition.modules if condition.schedule == "sequential" else 1)

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        complete = partial(workers.complete, partial(train, config), folder=folder, cost=cost)
        tuned = complete(candidates(config), label="choosing")
        jobs = choose(config, tuned)
        results = complete(jobs, label="training")
    rows = summarize(config, tuned, results)
    plotting.save(figures(config, rows, results), run.folder / "figures")
    trainings = [{"name": job.name, "job": job.name, "seed": job.seed} for job in jobs]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
