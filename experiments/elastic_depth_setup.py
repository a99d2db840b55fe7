"""What the study of elastic depth trains: configuration, networks, arms, and what is measured of each network."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops.layers.torch import Reduce
from torch import Tensor, nn

from lab import images
from lab.config import ImageConfig, check_among, check_at_least
from lab.experiment import Report, Row, Run
from lab.training import Progress
from odenets import ConvField, Flow, Network, measures, recalibrate, save_weights
from odenets.depth import ElasticDepth, at_depth, without_flow
from odenets.least_action import ActionPenalty
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.objectives import Batch, CrossEntropy, Objective

CHANNELS = {"digits": (8,), "mnist": (16,), "cifar10": (16, 32, 64)}
"""Of the states of each flow; ResNet-20's for CIFAR-10."""

SHAPES = {
    "digits": {16: (16,), 8: (8,), 4: (4,), 2: (2,), 1: (1,)},
    "mnist": {16: (16,), 8: (8,), 4: (4,), 2: (2,), 1: (1,)},
    "cifar10": {16: (4, 4, 8), 8: (2, 2, 4), 4: (1, 1, 2), 1: (0, 0, 1)},
}
"""Blocks of each flow by their total; a flow with none is left out."""

ARMS = ("plain", "action", "stochastic depth", "coarsening", "weight change", "coarsening and action")

RULES = {
    "even, first": ("even", "first"),
    "even, middle": ("even", "middle"),
    "even, last": ("even", "last"),
    "error, best": ("difference", "best"),
    "output, best": ("output", "best"),
}
"""How blocks merge: what the groups of blocks minimize, and which block of a group stays."""


@dataclass(frozen=True)
class Config(ImageConfig):
    """What to train.

    Attributes:
        seeds: of weights and batch order; complete seeds are trained one after another.
        arms: ways to train the deepest network, "plain" among them; to be compared with networks trained at each depth.
        weights: of the action, among which its own arm chooses.
        drops: probabilities with which stochastic depth drops the last block, the others in proportion.
        changes: weights of the penalty on the change of weights from block to block.
        tuning: networks, of other seeds, on which weights are chosen, by the mean accuracy on validation images over
            the full depth and all smaller ones.
        tuning_epochs: of these; as many as of the others if 0.
        epochs, batch_size, learning_rate: of training by SGD with Nesterov momentum .9 and one cycle to this rate.
        weight_decay: of training.
        total_time: of each flow, at every depth; 0 takes steps of h = 1, as in a ResNet.
        validation_size: images of the training set to choose on.
        train_size, test_size: images besides; all if 0.
        measured: training images on which errors are measured.
        noise: standard deviation of noise on the pixels of images on which the whole network is measured besides.
        bits: to which the weights of the whole network are rounded, to be measured besides.
        half: train in bfloat16, by autocast; evaluation is in float32.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    arms: tuple[str, ...] = ARMS
    weights: tuple[float, ...] = (0.1, 1.0)
    drops: tuple[float, ...] = (0.2, 0.5)
    changes: tuple[float, ...] = (1e-3, 1e-2)
    tuning: int = 1
    tuning_epochs: int = 0
    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    total_time: float = 4.0
    validation_size: int = 300
    train_size: int = 0
    test_size: int = 0
    measured: int = 100
    noise: float = 0.1
    bits: int = 3
    half: bool = False
    output: Path = Path("runs/elastic_depth")

    def __post_init__(self) -> None:
        check_among(self, "arms", ARMS)
        check_at_least(self, 1, "tuning", "epochs")
        if "plain" not in self.arms:
            raise ValueError("arms must hold 'plain', with which all others are compared")

    @property
    def depths(self) -> list[int]:
        """Numbers of blocks of networks that are trained at each depth, the largest first."""
        return [*SHAPES[self.dataset]]

    @property
    def coarse(self) -> list[int]:
        """Numbers of blocks to which the deepest network is coarsened: those that leave each flow one."""
        return [depth for depth, shape in SHAPES[self.dataset].items() if all(shape)][1:]


@dataclass(frozen=True)
class Job:
    """One training: an arm with its setting at the largest depth, or "trained" at one of the depths."""

    arm: str
    setting: float
    depth: int
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of the job's folder."""
        folder = "tuning" if self.tuning else f"seed{self.seed}"
        return f"{folder}/{self.arm.replace(' ', '-')}-{self.setting:g}-depth{self.depth}"


class DroppedField(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training the block of a ``field`` is left out with probability ``drop``.

    The whole batch leaves it out. In the other steps the velocity is divided by ``1 - drop``, so that its mean stays.
    """

    def __init__(self, field: nn.Module, drop: float) -> None:
        super().__init__()
        self.field, self.drop = field, drop

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The velocity, 0 where the block is dropped."""
        if not self.training or not self.drop:
            return self.field(t, x)
        if float(torch.rand(())) < self.drop:
            return torch.zeros_like(x)
        return self.field(t, x) / (1 - self.drop)


class WeightChange(CrossEntropy):
    """Cross-entropy and ``weight * sum_m |theta_{m+1} - theta_m|^2``, the change of weights from block to block."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Any) -> Tensor:
        """Both, a scalar."""
        change = torch.zeros(())
        for flow in network.flows:  # type: ignore[union-attr] - a Network
            weights = [[*block.parameters()] for block in flow.blocks]
            for one, other in pairwise(weights):
                change = change + sum((q - p).square().sum() for p, q in zip(one, other, strict=True))
        return super().loss(network, batch, output, records) + self.weight * change


class HalfNetwork(Network):
    """A network whose passes in training are in bfloat16, by autocast; outputs are float32."""

    def record(self, x: Tensor, /, *args: Any, **measured: Any) -> tuple[Tensor, Any]:
        """The output and the records."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            output, records = super().record(x, *args, **measured)
        return output.float(), records


def choices(config: Config, arm: str) -> tuple[float, ...]:
    """Among which an arm chooses."""
    by_arm = {"action": config.weights, "stochastic depth": config.drops, "weight change": config.changes}
    return by_arm.get(arm, (0.0,))


def objective(job: Job) -> Objective:
    """What an arm minimizes."""
    match job.arm:
        case "action":
            return ActionPenalty(job.setting)
        case "coarsening":
            return ElasticDepth()
        case "coarsening and action":
            return ElasticDepth(ActionPenalty(job.setting))
        case "weight change":
            return WeightChange(job.setting)
    return CrossEntropy()


def build(config: Config, job: Job, dataset: TensorData) -> Network:
    """Euler blocks of pre-activation fields: a flow per resolution, those with no block left out."""
    torch.manual_seed(job.seed)
    shape, channels = SHAPES[config.dataset][job.depth], CHANNELS[config.dataset]
    drop = job.setting if job.arm == "stochastic depth" else 0.0
    encoder: list[nn.Module] = [images.normalize(dataset)]
    inner = dataset.x.shape[1]
    if config.dataset != "digits":  # four pixels as one: a quarter of the cost
        encoder, inner = [*encoder, nn.PixelUnshuffle(2)], 4 * inner
    encoder.append(nn.Conv2d(inner, channels[0], 3, padding=1, bias=False))
    flows, transitions, between = [], [], encoder
    for i, (blocks, features) in enumerate(zip(shape, channels, strict=True)):
        if blocks:
            drops = iter([drop * (sum(shape[:i]) + m + 1) / sum(shape) for m in range(blocks)])
            field = lambda features=features, drops=drops: _field(features, next(drops))  # noqa: E731
            flows.append(Flow(field, solver="euler", depth=blocks, total_time=config.total_time or float(blocks)))
            between = []
        if i + 1 < len(channels):
            between.append(nn.Conv2d(features, channels[i + 1], 1, stride=2, bias=False))
            if flows:
                transitions.append(nn.Sequential(*between))
                between = []
    head = nn.Sequential(
        nn.BatchNorm2d(channels[-1]), nn.ReLU(), Reduce("b c h w -> b c", "mean"), nn.Linear(channels[-1], 10)
    )
    kind = HalfNetwork if config.half else Network
    return kind(nn.Sequential(*encoder), flows, head, transitions=transitions).to(memory_format=torch.channels_last)


def _field(features: int, drop: float) -> nn.Module:
    field = ConvField(features, norm="batch")
    return DroppedField(field, drop) if drop else field


def parts_of(config: Config) -> tuple[TensorData, TensorData, TensorData]:
    """Training, validation and test images."""
    pool, validation, test = images.pool_validation_test(
        config.dataset, config.folder, config.validation_size, config.test_size
    )
    return datasets.subsample(pool, config.train_size) if config.train_size else pool, validation, test


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train a network, keep its weights, and measure it at every depth."""
    pool, validation, test = parts_of(config)
    network = build(config, job, pool)
    batches = images.batches(pool, config.batch_size, job.seed)
    epochs = epochs_of(config, job)
    training = fit(
        network,
        batches,
        epochs=epochs,
        optimizer=partial(
            torch.optim.SGD, lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        ),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=config.learning_rate, total_steps=epochs * len(batches)
        ),
        lr_interval="step",
        objective=objective(job),
        callbacks=[Progress(report, run)],
        run=run,
    )
    save_weights(network, run.folder / "weights.safetensors")
    return measure(config, job, network.eval(), pool, validation, test) | {
        "train_loss": training.rows[-1]["train_loss"]
    }


def epochs_of(config: Config, job: Job) -> int:
    """Epochs that a job trains."""
    return (config.tuning_epochs or config.epochs) if job.tuning else config.epochs


def measure(
    config: Config, job: Job, network: Network, pool: TensorData, validation: TensorData, test: TensorData
) -> Row:
    """Accuracy of a network on validation and test images: whole, without its flows, and coarsened by every rule.

    Statistics of batch norms are recomputed on training images in all of them. By the output, blocks merge on from one
    depth to the next.
    """
    statistics = [*pool.subset(torch.arange(min(2000, len(pool)))).x.split(250)]

    shown = {"validation": validation} if job.tuning else {"validation": validation, "test": test}

    def accuracy(changed: nn.Module, parts: dict[str, TensorData] = shown) -> dict[str, float]:
        return {name: evaluate(changed, Batches(part, 250)).accuracy for name, part in parts.items()}

    recalibrate(network, statistics)
    results: Row = {"whole": accuracy(network), "action": action(network, statistics[0])}
    if job.arm == "trained":
        return results
    noisy = [noisy_images(part, config.noise, seed) for seed, part in enumerate(shown.values())]
    results["noisy"] = accuracy(network, dict(zip(shown, noisy, strict=True)))
    results["rounded"] = accuracy(rounded(network, config.bits, statistics))
    results["removed"] = accuracy(without_flow(network, statistics))
    seen = pool.x[: config.measured]
    results["coarse"] = {}
    for name, (rule, stays) in RULES.items():
        coarse = network
        for depth in config.coarse:
            coarse = at_depth(
                coarse if rule == "output" else network,
                SHAPES[config.dataset][depth],
                inputs=[seen],
                rule=rule,  # type: ignore[arg-type]
                stays=stays,  # type: ignore[arg-type]
                recalibration=statistics,
            )
            results["coarse"].setdefault(name, {})[str(depth)] = accuracy(coarse)
    return results


@torch.no_grad()
def action(network: Network, x: Tensor) -> float:
    """Mean action of the network on training images."""
    return network.record(x, action=measures.action)[1]["action"].sum(0).mean().item()


def noisy_images(part: TensorData, deviation: float, seed: int) -> TensorData:
    """The images with normal noise of the seed on their pixels, in [0, 1]."""
    noise = torch.randn(part.x.shape, generator=torch.Generator().manual_seed(seed))
    return replace(part, x=(part.x + deviation * noise).clamp(0, 1))


@torch.no_grad()
def rounded(network: Network, bits: int, statistics: list[Tensor]) -> Network:
    """A copy whose weights are rounded to so many bits, each row of them by its largest; with statistics of its own."""
    copied, levels = copy.deepcopy(network), 2 ** (bits - 1) - 1
    for weight in (p for p in copied.parameters() if p.ndim > 1):
        scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, *[1] * (weight.ndim - 1)) / levels
        weight.copy_((weight / scale).round() * scale)
    recalibrate(copied, statistics)
    return copied
