"""What the study of steps per sample trains and measures: networks, and ways to spend fewer evaluations on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab import images
from lab.config import check_among, check_at_least
from lab.experiment import Report, Row, Run
from lab.training import TrainingConfig, fit_network, parts_of
from odenets import ConvField, Flow, Network, save_weights
from odenets.depth import EarlyExit, ElasticDepth, SampleSteps, at_depth, fit_heads, pooled_head, without_flow
from odenets.module_wise import split_into_modules
from odenets.training.data import TensorData

__all__ = ["ARMS", "EXITS", "FEATURES", "RULES", "STEPS", "Config", "Job", "build", "measure", "train"]

ARMS = {"plain": lambda: None, "coarsening": ElasticDepth}
"""How networks are trained: at the full depth, or at random coarsenings besides."""

STEPS = {
    "rms": {"norm": "rms"},
    "prediction": {"norm": "prediction"},
    "rms, aligned": {"norm": "rms", "aligned": True},
    "prediction, aligned": {"norm": "prediction", "aligned": True},
}
"""How errors choose the steps of a sample: by their size, or by the change of the prediction; over any number of
blocks, or over 1, 2, 4, ... from multiples of as many."""

RULES = {
    "even, first": ("even", "first"),
    "even, middle": ("even", "middle"),
    "error, best": ("difference", "best"),
    "output, best": ("output", "best"),
}
"""How blocks merge for all samples alike: what the groups minimize, and which block of a group stays."""

EXITS = ("fitted heads", "own head")
"""Heads behind the blocks: fitted to the labels of the training images, or the network's own behind each block."""

FEATURES = {"digits": 8, "mnist": 8, "cifar10": 24}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What is trained and measured.

    Attributes:
        solver: of the blocks.
        arms: how networks are trained.
        depth: blocks of the network.
        total_time: sum of their step sizes.
        budgets: mean evaluations of a sample, as numbers of blocks that have as many.
        rounds: of the bisection for a tolerance.
        permutations: of the steps among the samples, for the allocation at random.
        measured: training images on which errors of merged blocks are measured.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    solver: Literal["bs23", "heun", "euler"] = "bs23"
    arms: tuple[str, ...] = tuple(ARMS)
    depth: int = 12
    total_time: float = 4.0
    budgets: tuple[int, ...] = (3, 4, 6, 8)
    rounds: int = 8
    permutations: int = 3
    measured: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 15
    learning_rate: float = 0.05
    output: Path = Path("runs/sample_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, "arms", ARMS)
        check_at_least(self, 1, "rounds", "permutations", "epochs")
        if not self.budgets or not 1 <= min(self.budgets) <= max(self.budgets) < self.depth:
            raise ValueError(f"budgets must be between 1 and depth - 1, {self.depth - 1}, got {self.budgets}")


@dataclass(frozen=True)
class Job:
    """One network."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-seed{self.seed}"


def build(config: Config, dataset: TensorData, seed: int) -> Network:
    """One flow of group-normed fields, a linear head on means over quarters of the image, the seed's weights."""
    torch.manual_seed(seed)
    features, channels = FEATURES[config.dataset], dataset.x.shape[1]
    encoder: list[nn.Module] = [images.normalize(dataset)]
    if dataset.x.shape[-1] > 8:  # to a quarter of the height and width
        encoder += [nn.Conv2d(channels, features, 3, stride=2, padding=1), nn.ReLU()]
        encoder += [nn.Conv2d(features, features, 3, stride=2, padding=1)]
    else:
        encoder += [nn.Conv2d(channels, features, 3, padding=1)]
    flow = Flow(
        lambda: ConvField(features, norm="group"),
        solver=config.solver,
        depth=config.depth,
        total_time=config.total_time,
    )
    head = pooled_head(torch.zeros(1, features, 8, 8), dataset.classes, places=2)
    return Network(nn.Sequential(*encoder), flow, head)


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train a network, keep its weights, and measure what fewer evaluations leave of it."""
    parts = parts_of(config)
    network = build(config, parts.train, job.seed)
    batches = images.batches(parts.train, config.batch_size, job.seed)
    fit_network(config, network, batches, run, report, objective=ARMS[job.arm]())
    save_weights(network, run.folder / "weights.safetensors")
    torch.manual_seed(job.seed)
    return measure(config, network.eval(), parts.train, parts.validation, parts.test)


def measure(config: Config, network: Network, train: TensorData, validation: TensorData, test: TensorData) -> Row:
    """Accuracy of a network on validation and test images by every way to spend its evaluations, at each budget."""
    parts = {"validation": validation, "test": test}

    def of(changed: nn.Module) -> dict[str, float]:
        return {name: _accuracy(_outputs(changed, part.x), part.y) for name, part in parts.items()}

    seen = train.x[: config.measured]
    uniform: Row = {
        name: {
            str(d): of(at_depth(network, d, inputs=[seen], rule=rule, stays=stays))  # type: ignore[arg-type]
            for d in config.budgets
        }
        for name, (rule, stays) in RULES.items()
    }
    flow = network.flows[0]
    each = flow.tableau.interior
    samples: Row = {
        name: {str(d): _by_sample(config, network, options, each * d, parts) for d in config.budgets}
        for name, options in STEPS.items()
    }
    return {
        "depth": network.depth,
        "evaluations": network.evaluations,
        "whole": of(network),
        "removed": of(without_flow(network)),
        "uniform": uniform,
        "samples": samples,
        "exit": {name: _by_exit(config, network, name, train, parts) for name in EXITS},
    }


@torch.no_grad()
def _by_sample(
    config: Config, network: Network, options: dict[str, Any], budget: int, parts: dict[str, TensorData]
) -> Row | None:
    """Steps per sample of so many evaluations in the mean, and the same steps of other samples; None where none are."""
    for first in (4, 8) if "aligned" in options else (1, 2, 4, 8):
        steps = SampleSteps(network, 0.0, first=first, **options)
        try:
            steps.calibrate(parts["validation"].x.split(500), budget, rounds=config.rounds)
        except ValueError:  # steps that begin so small take more
            continue
        break
    else:
        return None
    found: Row = {"tolerance": steps.tolerance, "first": first}
    for name, part in parts.items():
        walks = [steps.walk(x) for x in part.x.split(500)]
        taken = torch.cat([walk.taken for walk in walks], 1)
        evaluations = torch.cat([walk.evaluations for walk in walks]).double()
        found[name] = _accuracy(torch.cat([walk.output for walk in walks]), part.y)
        if name == "test":
            found |= {"evaluations": evaluations.mean().item(), "spread": evaluations.std().item()}
            found["rejected"] = torch.cat([walk.rejected for walk in walks], 1).sum(0).double().mean().item()
            found["random"] = _at_random(config, steps, taken, part)
    return found


def _at_random(config: Config, steps: SampleSteps, taken: Tensor, part: TensorData) -> float:
    """Mean accuracy where the samples take each other's steps."""
    values = []
    for _ in range(config.permutations):
        other = taken[:, torch.randperm(len(part))]
        pairs = zip(part.x.split(500), other.split(500, 1), strict=True)
        values.append(_accuracy(torch.cat([steps.follow(x, each).output for x, each in pairs]), part.y))
    return sum(values) / len(values)


def _by_exit(config: Config, network: Network, heads: str, train: TensorData, parts: dict[str, TensorData]) -> Row:
    """Exits behind every block, at the confidence of so many evaluations in the mean."""
    ends, each = range(1, network.depth + 1), network.flows[0].tableau.interior
    fitted = heads == "fitted heads"
    head = partial(pooled_head, places=2) if fitted else network.head
    modules: Any = split_into_modules(network, [*ends], train.x[:2], head=head)
    if fitted:
        fit_heads(modules, zip(train.x.split(500), train.y.split(500), strict=True))
    early = EarlyExit(modules.eval(), costs=[each * end for end in ends])
    results = {}
    for d in config.budgets:
        threshold = early.calibrate(parts["validation"].x.split(500), each * d)
        found: Row = {"threshold": threshold}
        for name, part in parts.items():
            with torch.no_grad():
                exits = [early(x) for x in part.x.split(500)]
            found[name] = _accuracy(torch.cat([one.logits for one in exits]), part.y)
            found["evaluations"] = torch.cat([one.cost for one in exits]).double().mean().item()
        results[str(d)] = found
    return results


@torch.no_grad()
def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([network.eval()(part) for part in x.split(500)])


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).double().mean().item()
