"""What the experiment on evaluations trains: configuration, network, objectives, and what is measured of a network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops.layers.torch import Reduce
from lightning_fabric import Fabric
from torch import nn

from lab import images
from lab.config import check_among, check_any, check_at_least
from lab.experiment import Report, Row, Run
from lab.training import Progress, TrainingConfig, parts_of
from odenets import Network, measures
from odenets.fields import ConvField
from odenets.least_action import ActionPenalty
from odenets.neural_ode import NeuralODE
from odenets.penalties import ErrorPenalty, Penalty
from odenets.training.callbacks import Callback
from odenets.training.data import Batches, TensorData
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.state import Training
from solvers import Tolerance

ARMS = ("plain", "shorter time", "action", "error", "both", "acceleration", "no flow")
TOLERANCES = (1e-3, 1e-5)
STRIDES = {"digits": 2, "mnist": 4, "cifar10": 4}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What is trained.

    Attributes:
        arms: what is compared; "plain" is what the others are compared with.
        times: total times tried for the shorter flow.
        actions, errors, accelerations: weights tried of each penalty; "both" takes actions and errors in pairs.
        choosing: seeds on which settings are chosen, all if 0; the chosen ones alone are trained on the others.
        total_time: of every flow but the shorter ones.
        tolerance: rtol and atol of every solve in training.
        features: channels of the state.
        clip_norm: of the gradient.
        learning_rate: of Adam at the start; a cosine brings it to 0.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    arms: tuple[str, ...] = ARMS
    times: tuple[float, ...] = (0.5, 0.25, 0.1)
    actions: tuple[float, ...] = (0.3, 1.0, 3.0)
    errors: tuple[float, ...] = (30.0, 100.0, 300.0)
    accelerations: tuple[float, ...] = (0.3, 1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    choosing: int = 0
    total_time: float = 1.0
    tolerance: float = 1e-2
    features: int = 16
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.005
    clip_norm: float = 5.0
    output: Path = Path("runs/evaluations")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_any(self, "arms", "times", "actions", "errors", "accelerations")
        check_among(self, "arms", ARMS)
        check_at_least(self, 0, "choosing")
        check_at_least(self, 1, "features", "epochs", "batch_size")
        if "plain" not in self.arms:
            raise ValueError(f"arms must hold 'plain', with which the others are compared, got {self.arms}")


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: str
    seed: int
    time: float
    action: float = 0.0
    error: float = 0.0
    acceleration: float = 0.0

    @property
    def setting(self) -> str:
        """What of it is chosen, in words."""
        weights = [f"{name} {value:g}" for name in PENALTIES if (value := getattr(self, name))]
        return ", ".join(weights) or f"T = {self.time:g}"

    @property
    def name(self) -> str:
        """Of its folder."""
        words = f"{self.arm} {self.setting}".replace(" = ", "").replace(", ", "_").replace(" ", "_")
        return f"{words}/seed{self.seed}"


PENALTIES = ("action", "error", "acceleration")


def tried(config: Config, arm: str) -> list[dict[str, float]]:
    """What is tried in an arm."""
    weights: dict[str, list[dict[str, float]]] = {
        "plain": [{}],
        "shorter time": [{"time": t} for t in config.times],
        "action": [{"action": w} for w in config.actions],
        "error": [{"error": w} for w in config.errors],
        "both": [{"action": a, "error": e} for a, e in zip(config.actions, config.errors, strict=False)],
        "acceleration": [{"acceleration": w} for w in config.accelerations],
        "no flow": [{"time": 0.0}],
    }
    return [{"time": config.total_time} | each for each in weights[arm]]


def build(config: Config, dataset: TensorData, job: Job) -> Network:
    """A classifier that can do nothing without its flow.

    Its encoder is linear, one convolution, and its head sees the mean of each channel: without the flow a linear map
    of an image's mean.
    """
    torch.manual_seed(job.seed)
    stride, channels = STRIDES[config.dataset], dataset.x.shape[1]
    convolution = nn.Conv2d(channels, config.features, stride + 2, stride=stride, padding=(stride + 1) // 2, bias=False)
    field = ConvField(config.features, activation="silu", time=True)
    flow = ode(config, field, job.time, config.tolerance)
    head = nn.Sequential(Reduce("b c h w -> b c", "mean"), nn.Linear(config.features, dataset.classes))
    return Network(nn.Sequential(images.normalize(dataset), convolution), flow, head)


def ode(config: Config, field: nn.Module, total_time: float, tolerance: float, solver: str = "bs23") -> NeuralODE:
    """The flow of a field, at a tolerance."""
    return NeuralODE(field, solver=solver, t1=total_time, tolerance=Tolerance(tolerance, tolerance))


def objective(job: Job) -> Objective:
    """Cross-entropy and the penalties of a job."""
    task = ActionPenalty(job.action) if job.action else CrossEntropy()
    task = ErrorPenalty(job.error, task) if job.error else task
    return Penalty(job.acceleration, measures.acceleration, task) if job.acceleration else task


class Cost(Callback):
    """The processor seconds of an epoch's training, and the field's evaluations for a batch."""

    def __init__(self, network: Network, batches: int) -> None:
        self.field, self.batches = network.flows[0].field, batches

    def before_training(self, training: Training) -> None:
        """Begin to count."""
        self.calls, self.began = 0, time.process_time()
        self.field.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """What the epoch has cost."""
        row |= {"processor_seconds": time.process_time() - self.began, "calls": self.calls / self.batches}
        self.calls, self.began = 0, time.process_time()


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train a network; what it costs and what it is worth, on validation and test images."""
    parts = parts_of(config)
    batches = images.batches(parts.train.to(config.device), config.batch_size, job.seed)
    network = build(config, parts.train, job).to(config.device)
    cost = Cost(network, len(batches))
    training = fit(
        network, batches, epochs=config.epochs, objective=objective(job), run=run,
        optimizer=partial(torch.optim.Adam, lr=config.learning_rate), clip_norm=config.clip_norm,
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=config.epochs),
        callbacks=[cost, Progress(report, run)], fabric=Fabric(accelerator=config.device, devices=1),
    )  # fmt: skip
    row: Row = {"setting": job.setting, "seconds": sum(row["processor_seconds"] for row in training.rows)}
    row["training_evaluations"] = training.rows[-1]["calls"]
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        row |= {f"{name}_{key}": value for key, value in measured(config, network, job, part).items()}
    return row


@torch.no_grad()
def measured(config: Config, network: Network, job: Job, part: TensorData) -> dict[str, float]:
    """Accuracy and evaluations at each tolerance, accuracy without the flow, action and acceleration."""
    network.eval()
    totals: dict[str, float] = dict.fromkeys(("without", *PENALTIES[::2]), 0.0)
    field, shares = network.flows[0].field, 0
    solves = {f"{tolerance:g}": ode(config, field, job.time, tolerance) for tolerance in TOLERANCES}
    solves["dopri5"] = ode(config, field, job.time, TOLERANCES[-1], "dopri5")
    for x, y in Batches(part.to(config.device), 500):
        start, shares = network.encoder(x), shares + 1
        outputs = {"without": start}
        for name, solve in solves.items():
            outputs[name] = solve(start)
            totals[f"evaluations_{name}"] = totals.get(f"evaluations_{name}", 0) + solve.evaluations
        for name, x1 in outputs.items():
            totals[name] = totals.get(name, 0) + (network.head(x1).argmax(1) == y).float().sum().item() / len(part)
        wanted: Mapping[str, Any] = {"action": measures.action, "acceleration": measures.acceleration}
        _, records = network.flows[0].record(start, **wanted)
        for name in wanted:
            totals[name] += records[name].sum(0).sum().item() / len(part)
    counts = {name: value / shares for name, value in totals.items() if name.startswith("evaluations")}
    return totals | counts
