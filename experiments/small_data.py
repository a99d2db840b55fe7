"""What the action buys on few images (tables 1, 2 and 18), with every method at its own best learning rate.

Three methods train ResNet-9 on a few labelled images: the plain network, a fixed weight of the action, and multipliers
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from odenets import Network, data, initialize, measures, models, recalibrate
from odenets.instances import fit_instances
from odenets.jobs import Report, Workers
from odenets.least_action import ActionPenalty, LeastAction
from odenets.objectives import CrossEntropy, Objective
from odenets.runs import Run
from odenets.statistics import Interval, mean_interval, paired_p_value
from odenets.tables import table
from odenets.training import evaluate

METHODS = ("vanilla", "fixed weight", "least action")
PROTOCOL = ("thesis: vanilla", "thesis: least action")
WAYS = ("last", "recalibrated")  # batch norm's running statistics after the last epoch, or statistics computed anew

# highest test accuracy over epochs, mean and half-width of the 95 % interval: table 1 (50 runs), tables 2 and 18 (20)
THESIS: dict[str, dict[int, dict[str, tuple[float, float]]]] = {
    "mnist": {
        500: {"vanilla": (90.8, 0.4), "least action": (90.9, 0.2)},
        400: {"vanilla": (88.4, 0.5), "least action": (88.4, 0.4)},
        300: {"vanilla": (83.5, 0.5), "least action": (86.2, 0.4)},
        200: {"vanilla": (74.9, 1.0), "least action": (82.0, 0.5)},
        100: {"vanilla": (56.4, 1.5), "least action": (70.0, 1.0)},
    },
    "cifar10": {
        50000: {"vanilla": (91.49, 0.1), "least action": (91.94, 0.1)},
        30000: {"vanilla": (88.61, 0.14), "least action": (89.41, 0.1)},
        20000: {"vanilla": (85.73, 0.14), "least action": (86.74, 0.13)},
        10000: {"vanilla": (79.25, 0.25), "least action": (80.9, 0.16)},
        5000: {"vanilla": (70.32, 0.32), "least action": (72.58, 0.21)},
        4000: {"vanilla": (67.8, 0.26), "least action": (70.12, 0.3)},
    },
}


@dataclass(frozen=True)
class Condition:
    """Under which the methods are compared.

    Attributes:
        label_noise: share of the training labels that are drawn anew from all classes.
        depth: number of blocks.
        widen: factor of the channels.
        norm: of the blocks; encoder and head keep their batch norms.
        deviation: of a normal start of all weights, or None for torch's own.
    """

    label_noise: float = 0.0
    depth: int = 9
    widen: int = 1
    norm: str | None = "batch"
    deviation: float | None = None


CONDITIONS = {
    "standard": Condition(),
    "label noise": Condition(label_noise=0.4),
    "deep": Condition(depth=30),
    "wide": Condition(widen=4),
    "no batch norm": Condition(norm=None),
    "bad start": Condition(deviation=0.5),
}


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        sizes: numbers of training images.
        conditions: standard, label noise, deep, wide, no batch norm, bad start.
        instances: that are reported, per method.
        tuning: instances, of other images and weights, on which learning rates and weights are chosen.
        epochs: of training.
        batch_size: of training.
        learning_rates: tried for every method.
        weights: tried for the fixed weight.
        lambdas: first lambdas tried for the method of multipliers, with tau = 1 and a change every 5 steps.
        validation_size, test_size: images to choose on; test images, all if 0.
        protocol_size, protocol_every: test images, at most, at which the thesis' protocol looks while it trains (the
            thesis at a random half, after every epoch), and epochs from one look to the next.
        together: instances that are trained as one batch of networks: many where they are small, 1 where a network
            alone keeps the processor busy.
        features: channels; the thesis' (MNIST 32, CIFAR-10 100), 16 for digits, if 0.
        quick: one size, few instances and epochs: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    sizes: tuple[int, ...] = (100, 200, 500)
    conditions: tuple[str, ...] = ("standard",)
    instances: int = 20
    tuning: int = 5
    epochs: int = 30
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    weights: tuple[float, ...] = (0.1, 1.0)
    lambdas: tuple[float, ...] = (0.1, 1.0, 10.0)
    validation_size: int = 300
    test_size: int = 0
    protocol_size: int = 1000
    protocol_every: int = 1
    together: int = 10
    features: int = 0
    quick: bool = False
    output: Path = Path("runs/small_data")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.instances, self.tuning) < 2:
            raise ValueError(f"instances and tuning must be at least 2, got {self.instances} and {self.tuning}")
        if self.together < 1 or self.features < 0:
            raise ValueError(
                f"together must be at least 1 and features not negative, got {self.together} and {self.features}"
            )
        if not self.sizes or min(self.sizes) < 10:
            raise ValueError(f"sizes must hold numbers of at least 10 images, got {self.sizes}")
        if unknown := set(self.conditions) - set(CONDITIONS):
            raise ValueError(f"conditions must be among {', '.join(CONDITIONS)}, got {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Job:
    """Some instances of one method at one learning rate and weight, trained together; looked at in some ways."""

    condition: str
    size: int
    method: str
    learning_rate: float
    weight: float
    seeds: tuple[int, ...]
    tuning: bool
    ways: tuple[str, ...] = WAYS

    @property
    def name(self) -> str:
        """Of its folder."""
        method = self.method.replace(": ", "_").replace(" ", "_")
        folder = f"{self.condition.replace(' ', '_')}_{self.size}"
        return f"{folder}/{method}_lr{self.learning_rate:g}_w{self.weight:g}_seeds{self.seeds[0]}-{self.seeds[-1]}"


def objective(job: Job) -> Objective:
    """What a method minimises."""
    match job.method:
        case "fixed weight":
            return ActionPenalty(job.weight)
        case "least action":
            return LeastAction(lambda0=job.weight, tau=1.0, every=5)
        case "thesis: least action":  # lambda multiplies the loss, and with it the step
            return LeastAction(lambda0=5.0, tau=1.0, every=5, weigh="multiply", update="after")
    return CrossEntropy()


def build(config: Config, condition: Condition, dataset: data.Dataset, seed: int) -> Network:
    """ResNet-9, or what the condition makes of it, with the seed's weights."""
    torch.manual_seed(seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    features = config.features or {"digits": 16, "mnist": 32, "cifar10": 100}[config.dataset]
    normalize = models.Normalize(list(dataset.mean), list(dataset.std))
    network = models.resnet9(
        channels,
        dataset.classes,
        features=features * condition.widen,
        size=size,
        depth=condition.depth,
        norm=condition.norm,
        normalize=normalize,
    )
    if condition.deviation:
        network = initialize(network, "normal", condition.deviation)
    if config.together == 1:  # convolutions of one network are faster so, of many networks as one they are not
        network = network.to(memory_format=torch.channels_last)
    return network


def training_images(pool: data.Dataset, job: Job, seed: int) -> data.Dataset:
    """The training images of a seed, with the label noise of the job's condition."""
    part = data.subsample(pool, job.size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(part), generator=generator) < CONDITIONS[job.condition].label_noise
    labels = torch.where(noisy, torch.randint(part.classes, (len(part),), generator=generator), part.y)
    return replace(part, y=labels)


def parts_of(config: Config) -> tuple[data.Dataset, data.Dataset, data.Dataset]:
    """Images to draw training images from, validation and test images."""
    pool, test = data.load(config.dataset, config.folder)
    pool, validation = data.hold_out(pool, config.validation_size, seed=0)
    return pool, validation, data.subsample(test, config.test_size, seed=0) if config.test_size else test


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
    protocol = job.method in PROTOCOL
    seen = data.subsample(test, config.protocol_size, seed=0) if len(test) > config.protocol_size else test
    shown = {"test": [seen] * len(job.seeds)} if protocol else {}
    found = fit_instances(
        [build(config, CONDITIONS[job.condition], pool, seed) for seed in job.seeds],
        batches,
        epochs=config.epochs,
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=lambda: objective(job),
        measured=shown,
        every=config.protocol_every,
        report=report,
    )
    looked = data.Batches(validation if job.tuning else test, 100)
    results: dict[str, list[float]] = {"last": [], "recalibrated": [], "action": []}
    for network, batch in zip(found.networks, batches, strict=True):
        results["action"].append(action(network.eval(), batch.data.x))
        if "last" in job.ways:
            results["last"].append(evaluate(network, looked).accuracy)
        if "recalibrated" in job.ways:
            recalibrate(network, batch.inputs())
            results["recalibrated"].append(evaluate(network, looked).accuracy)
    if protocol:
        results["max"] = found.accuracy["test"].nan_to_num(0.0).amax(1).tolist()  # NaN before the first look
    run.finish(asdict(job) | results, seeds=list(job.seeds))


@torch.no_grad()
def action(network: Network, x: Tensor) -> float:
    """Mean action of the network on training images."""
    return network.record(x, action=measures.action)[1]["action"].sum(0).mean().item()


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job beside its own settings."""
    names = ("dataset", "epochs", "batch_size", "validation_size", "test_size", "features")
    return {name: getattr(config, name) for name in names}


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
    ways: dict[tuple[str, float, float], tuple[str, ...]] = {(method, 0.01, 0.0): () for method in PROTOCOL}
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


def summarise(
    config: Config,
    condition: str,
    size: int,
    chosen: dict[tuple[str, str], dict[str, Any]],
    results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row per method and way, differences to the plain network paired over the instances."""

    def values(method: str, rate: float, weight: float, name: str) -> list[float]:
        key = (method, rate, weight)
        jobs = [r for r in results if (r["method"], r["learning_rate"], r["weight"]) == key]
        return [100 * v for r in sorted(jobs, key=lambda r: r["seeds"]) for v in r[name]]

    rows = []
    for way in WAYS:
        plain: list[float] = []
        for method in METHODS:
            best = chosen[method, way]
            key = (method, best["learning_rate"], best["weight"])
            found = values(*key, way)
            plain = plain or found
            row = {
                "condition": condition,
                "size": size,
                "method": method,
                "statistics": "running" if way == "last" else "recomputed",
            }
            row |= {"learning_rate": key[1], "weight": key[2], "accuracy": mean_interval(found)}
            row["action"] = mean_interval([v / 100 for v in values(*key, "action")])
            rows.append(row | _difference(found, plain if method != "vanilla" else None))
    plain = []
    for method in PROTOCOL:
        found = values(method, 0.01, 0.0, "max")
        plain = plain or found
        row = {
            "condition": condition,
            "size": size,
            "method": method,
            "statistics": "running, max over epochs",
            "learning_rate": 0.01,
        }
        row |= {"statistics": "running, max over epochs", "weight": 0.0, "accuracy": mean_interval(found)}
        row["action"] = mean_interval([v / 100 for v in values(method, 0.01, 0.0, "action")])
        figure = THESIS.get(config.dataset, {}).get(size, {}).get(method.removeprefix("thesis: "))
        if figure and condition == "standard":
            row |= {"thesis": Interval(*figure, 20), "meets": mean_interval(found).meets(Interval(*figure, 20))}
        rows.append(row | _difference(found, plain if method != PROTOCOL[0] else None))
    return rows


def _difference(found: list[float], plain: list[float] | None) -> dict[str, Any]:
    if plain is None:
        return {}
    pairs = [a - b for a, b in zip(found, plain, strict=True)]
    return {"difference": mean_interval(pairs), "p": paired_p_value(found, plain)}


COLUMNS: dict[str, Any] = {
    "condition": "{condition}",
    "images": "{size}",
    "method": "{method}",
    "batch norm": "{statistics}",
    "lr": "{learning_rate:g}",
    "weight": lambda row: f"{row['weight']:g}" if row["weight"] else "",
    "test accuracy": "{accuracy:.2f}",
    "- vanilla": "{difference:.2f}",
    "p": "{p:.2g}",
    "action": "{action.mean:.3g}",
    "thesis": "{thesis:.2f}",
    "meets": "{meets}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in rows:
        if "difference" not in row:
            continue
        mean, half = row["difference"].mean, row["difference"].half_width
        what = "no difference to" if abs(mean) <= half else "better than" if mean > 0 else "worse than"
        lines.append(
            f"{row['condition']}, {row['size']} images, {row['method']} ({row['statistics']} statistics): {what} the "
            f"plain network, {row['difference']:.2f} points, p = {row['p']:.2g}"
        )
    return lines


def main(config: Config) -> None:
    """Choose, train, print one table, write the run folder."""
    if config.quick:
        config = replace(
            config, sizes=(50,), instances=2, tuning=2, epochs=2, learning_rates=(0.03,), weights=(1.0,), lambdas=(1.0,)
        )
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = ("sizes", "conditions", "instances", "tuning", "learning_rates", "weights", "lambdas")
    run = Run(config.output, science(config) | {name: getattr(config, name) for name in names}, resume=config.resume)
    places = [(condition, size) for condition in config.conditions for size in config.sizes]

    def at(where: tuple[str, int], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r for r in found if (r["condition"], r["size"]) == where]

    def folder(job: Job) -> Path:
        return config.output / job.name

    def cost(job: Job) -> int:
        return config.epochs * len(job.seeds)

    with Workers(config.workers or os.cpu_count() or 1) as workers:
        complete = partial(workers.complete, partial(train, config), folder=folder, cost=cost)
        found = complete([job for where in places for job in candidates(config, *where)], label="choosing")
        chosen = {where: choose(at(where, found)) for where in places}
        jobs = [job for where in places for job in reported(config, *where, chosen[where])]
        results = complete(jobs, label="training")
    rows = [row for where in places for row in summarise(config, *where, chosen[where], at(where, results))]
    trainings = [{"name": job.name, "job": job.name, "seed": seed} for job in jobs for seed in job.seeds]
    print(run.conclude(trainings, ("job", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
