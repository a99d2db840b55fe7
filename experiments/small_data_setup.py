"""What the small-data experiment trains: configuration, conditions, methods, networks, images, their training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lab import images
from lab.config import ImageConfig, check_among, check_at_least
from lab.experiment import Report, Row, Run
from odenets import Network, initialize, measures, recalibrate
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy, Objective

METHODS = ("vanilla", "fixed weight", "least action")
PROTOCOL = ("thesis: vanilla", "thesis: least action", "thesis: least action, divided")
THESIS_SETTINGS = {  # lambda0, tau, s, epochs [K24, F.2, tables 1 and 2]; digits are trained as MNIST
    "digits": (5.0, 1.0, 5, 30),
    "mnist": (5.0, 1.0, 5, 30),
    "cifar10": (0.1, 0.1, 50, 200),
}
WAYS = ("last", "recalibrated")  # batch norm's running statistics after the last epoch, or statistics computed anew


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
class Config(ImageConfig):
    """What to train.

    Attributes:
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
        protocol_epochs: of the protocol of [K24]; its own, 30 and for CIFAR-10 200, if 0.
        protocol_size, protocol_every: test images, at most, at which the protocol looks while it trains ([K24] at a
            random half, after every epoch), and epochs from one look to the next.
        protocol_only: nothing but the protocol, so that nothing is chosen.
        together: instances that are trained as one batch of networks: many where they are small, 1 where a network
            alone keeps the processor busy.
        features: channels; those of [K24] (MNIST 32, CIFAR-10 100), 16 for digits, if 0.
        device: "cpu" or "cuda".
    """

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
    protocol_epochs: int = 0
    protocol_size: int = 1000
    protocol_every: int = 1
    protocol_only: bool = False
    together: int = 10
    features: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    output: Path = Path("runs/small_data")

    def __post_init__(self) -> None:
        check_at_least(self, 2, "instances", "tuning")
        check_at_least(self, 1, "together")
        check_at_least(self, 0, "features")
        if not self.sizes or min(self.sizes) < 10:
            raise ValueError(f"sizes must hold numbers of at least 10 images, got {self.sizes}")
        check_among(self, "conditions", CONDITIONS)


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
        method = self.method.replace(": ", "_").replace(", ", "_").replace(" ", "_")
        folder = f"{self.condition.replace(' ', '_')}_{self.size}"
        return f"{folder}/{method}_lr{self.learning_rate:g}_w{self.weight:g}_seeds{self.seeds[0]}-{self.seeds[-1]}"


def objective(config: Config, job: Job) -> Objective:
    """What a method minimizes."""
    lambda0, tau, every, _ = THESIS_SETTINGS[config.dataset]
    match job.method:
        case "fixed weight":
            return ActionPenalty(job.weight)
        case "least action":
            return LeastAction(lambda0=job.weight, tau=1.0, every=5)
        case "thesis: least action":  # as in the code of [K24]: lambda multiplies the loss, and with it the step
            return LeastAction(lambda0=lambda0, tau=tau, every=every, weigh="multiply", update="after")
        case "thesis: least action, divided":  # as in its text: lambda divides the action [K24, algorithm 1]
            return LeastAction(lambda0=lambda0, tau=tau, every=every, weigh="divide", update="after")
    return CrossEntropy()


def epochs_of(config: Config, job: Job) -> int:
    """Epochs that a job trains."""
    if job.method in PROTOCOL:
        return config.protocol_epochs or THESIS_SETTINGS[config.dataset][3]
    return config.epochs


def build(config: Config, job: Job, dataset: TensorData, seed: int) -> Network:
    """ResNet-9, or what the job's condition makes of it, with the seed's weights; the protocol's are orthogonal."""
    condition = CONDITIONS[job.condition]
    features = (config.features or images.FEATURES[config.dataset]) * condition.widen
    network = images.resnet9(dataset, seed, features=features, depth=condition.depth, norm=condition.norm)
    if condition.deviation:
        network = initialize(network, "normal", condition.deviation)
    elif job.method in PROTOCOL:
        network = initialize(network, "orthogonal", 0.01)
    if config.together == 1:  # faster for convolutions of one network, not of many networks as one
        network = network.to(memory_format=torch.channels_last)
    return network.to(config.device)


def parts_of(config: Config) -> tuple[TensorData, TensorData, TensorData]:
    """Images to draw training images from, validation and test images."""
    return images.pool_validation_test(config.dataset, config.folder, config.validation_size, config.test_size)


def training_images(pool: TensorData, job: Job, seed: int) -> TensorData:
    """The training images of a seed, with the label noise of the job's condition."""
    part = datasets.subsample(pool, job.size, seed=seed)
    return images.mislabel(part, CONDITIONS[job.condition].label_noise, seed)


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train the instances of a job."""
    pool, validation, test = parts_of(config)
    parts = [training_images(pool, job, seed).to(config.device) for seed in job.seeds]
    batches = [images.batches(part, config.batch_size, seed) for part, seed in zip(parts, job.seeds, strict=True)]
    shown = [validation if job.tuning else test] * len(job.seeds)
    if job.method in PROTOCOL:
        size = min(config.protocol_size, len(test))
        shown = [datasets.subsample(test, size, seed=seed) for seed in job.seeds]
    shown = [part.to(config.device) for part in shown]
    trained = fit_instances(
        [build(config, job, pool, seed) for seed in job.seeds],
        batches,
        epochs=epochs_of(config, job),
        optimizer=partial(torch.optim.SGD, lr=job.learning_rate, momentum=0.9, weight_decay=1e-4),
        objective=lambda: objective(config, job),
        measured={"test": shown} if job.method in PROTOCOL else None,
        every=config.protocol_every if job.method in PROTOCOL else None,
        report=report,
    )
    results: dict[str, list[float]] = {way: [] for way in WAYS} | {f"action_{way}": [] for way in WAYS}
    for network, batch, part in zip(trained.networks, batches, shown, strict=True):
        for way in WAYS:
            if way not in job.ways:
                continue
            if way == "recalibrated":
                recalibrate(network, batch.inputs())
            results[f"action_{way}"].append(action(network.eval(), batch.data.x))
            results[way].append(evaluate(network, Batches(part, 100)).accuracy)
    if job.method in PROTOCOL:
        results["max"] = trained.accuracy["test"].nan_to_num(0.0).amax(1).tolist()  # NaN before the first look
    return results


@torch.no_grad()
def action(network: Network, x: Tensor) -> float:
    """Mean action of the network on training images."""
    return network.record(x, action=measures.action)[1]["action"].sum(0).mean().item()
