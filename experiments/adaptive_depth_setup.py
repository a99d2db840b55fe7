"""What the experiments on adaptive depth train: one network per job, of a fixed depth, adaptive or growing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn

from lab import images
from lab.experiment import Report, Row, Run
from lab.training import TrainingConfig, fit_network, parts_of
from odenets import Block, Network, measures, models, recalibrate
from odenets.depth import AdaptiveDepth, DepthRule, Doubling, Stacking
from odenets.errors import DivergedError
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training.data import Batches, Split, TensorData
from odenets.training.evaluation import evaluate, evaluate_schemes
from odenets.training.objectives import Objective
from odenets.training.runs import read_metrics
from solvers import get_tableau

__all__ = ["DepthConfig", "Job", "build", "train"]

SCHEMES = {"depth": ("schemes",), "orders": ("schemes", "full_passes")}
"""By part: whether every embedded output is tested, from the last block on, and by a pass of its own."""


@dataclass(frozen=True)
class DepthConfig(TrainingConfig):
    """On what networks of some depth are trained, and the rule of the adaptive ones.

    The rule is fixed beforehand, not chosen on the data: a tolerance of 0.003 and K = 8.

    Attributes:
        features: channels of the state; 0 takes those of the model.
        pool: whether states of images have half the model's resolution, by max pooling behind the encoder.
        tolerance: largest embedded error of a block, root mean square over features, mean over samples.
        K: blocks are merged below ``tolerance / K``.
        check_samples: validation samples on which the errors are measured after an epoch.
        max_depth: largest number of blocks.
        total_time: sum of the step sizes.
        loss_limit: an epoch whose mean training loss is above this has diverged.
    """

    dataset: Literal["digits", "circles", "moons", "mnist", "fashion-mnist", "cifar10", "cifar100"] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 12
    features: int = 0
    pool: bool = False
    tolerance: float = 3e-3
    K: float = 8.0
    check_samples: int = 128
    max_depth: int = 32
    total_time: float = 1.0
    loss_limit: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        part: of the experiment.
        network: what it is called in the table.
        depth: blocks at the start; those at the end where it is stacked or doubled, which begin with one.
        way: how the depth comes about.
        solver: name of the method.
        forward: the embedded output that blocks carry on; the method's solution if empty.
        stage_fields: fields per block. Errors of chained and untied blocks do not vanish with h cubed.
        together: so many blocks running share a field.
        readout: what the head reads, and training sees.
        weight: of the action in the loss.
        multipliers: least action, whose weight changes, in place of a fixed one.
        tolerance: of the rule.
        rate: the learning rate.
        tuning: whether it serves a choice on validation data.
    """

    part: str
    network: str
    depth: int
    total_time: float
    seed: int
    tolerance: float
    rate: float
    way: Literal["fixed", "adaptive", "doubling", "stacking"] = "fixed"
    solver: str = "bs23"
    forward: str = ""
    stage_fields: Literal["tied", "chained", "untied"] = "tied"
    together: int = 1
    readout: Literal["solution", "ensemble"] = "solution"
    weight: float = 0.0
    multipliers: bool = False
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of the job's folder."""
        words = [self.part, self.network.replace(" ", "-").replace(",", ""), f"T{self.total_time:g}"]
        words += [f"lr{self.rate:g}"] * self.tuning + [f"seed{self.seed}"]
        return "-".join(words)


def build(config: DepthConfig, dataset: TensorData, job: Job) -> Network:
    """The network of a job, with the seed's weights."""
    torch.manual_seed(job.seed)
    method = get_tableau(job.solver)
    grows = job.way in ("doubling", "stacking")
    options: dict[str, Any] = {
        "normalize": images.normalize(dataset),
        "readout": job.readout,
        "solver": method.forwarding(job.forward) if job.forward else method,
        "depth": 1 if grows else job.depth,
        "total_time": job.total_time / (job.depth if job.way == "stacking" else 1),
        "stage_fields": job.stage_fields,
    }
    options |= {"features": config.features} if config.features else {}
    if dataset.x.ndim == 2:
        network = models.points_network(dataset.x.shape[1], dataset.classes, **options)
    elif (size := dataset.x.shape[-1]) <= 8:
        network = models.small_network(dataset.x.shape[1], dataset.classes, size=size, **options)
    else:
        size = size // 2 if config.pool else size
        network = models.resnet9(dataset.x.shape[1], dataset.classes, size=size, norm="group", **options)
        if config.pool:
            network.encoder = nn.Sequential(network.encoder, nn.MaxPool2d(2))
    if job.together > 1:
        flow = network.flows[0]
        blocks = list(flow.blocks)
        firsts = [blocks[m - m % job.together] for m in range(len(blocks))]
        flow.replace_blocks(
            [Block([*first.fields], block.h) for first, block in zip(firsts, blocks, strict=True)]  # type: ignore[union-attr]
        )
    return network


def depth_options(config: DepthConfig, job: Job, parts: Split) -> dict[str, Any]:
    """What makes the depth of a training: callbacks, and the schedule that begins anew at each level."""
    if job.way == "fixed":
        return {}
    if job.way == "adaptive":
        checked = parts.validation.subset(torch.arange(min(config.check_samples, len(parts.validation))))
        inputs = Batches(checked.to(config.device), 512).inputs
        rule = DepthRule(job.tolerance, config.K, config.max_depth)
        return {"callbacks": [AdaptiveDepth(rule, inputs, until=config.epochs - config.epochs // 4)]}
    levels = int(math.log2(job.depth)) + 1
    ends = sorted({max(1, round(i * config.epochs / levels)) for i in range(1, levels)})
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=math.ceil(config.epochs / levels))
    grow = {"doubling": Doubling, "stacking": Stacking}[job.way]
    return {"callbacks": [grow(ends, restart=True)], "lr_scheduler": cosine}


def objective_of(job: Job) -> Objective | None:
    """The loss of a job: cross-entropy, with the action where it has a weight."""
    if job.multipliers:
        return LeastAction(lambda0=1.0, tau=0.1, every=5)
    return ActionPenalty(job.weight) if job.weight else None


@cache
def _parts(config: DepthConfig) -> Split:
    """The data, read once by each worker."""
    return parts_of(config)


def train(config: DepthConfig, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train and evaluate one network."""
    parts = _parts(config)
    augmented = parts.train.x.shape[-1] > 8 and "mnist" not in config.dataset
    batches = Batches(parts.train, config.batch_size, seed=job.seed, crop=4 * augmented, flip=augmented)
    options = {"validation": Batches(parts.validation, 500), "loss_limit": config.loss_limit, "rate": job.rate}
    options |= {"objective": objective_of(job)} | depth_options(config, job, parts)
    network = build(config, parts.train, job)
    try:
        training = fit_network(config, network, batches, run, report, **options)
    except DivergedError as error:
        epochs = len(read_metrics(run.folder))
        report(config.epochs - epochs)
        return {"diverged": True, "message": str(error), "final_depth": network.depth, "epochs": epochs}
    validation = Batches(parts.validation.to(config.device), 500)
    results = {
        "diverged": False,
        "final_depth": network.depth,
        "h": [h for flow in network.flows for h in flow.h],
        "parameters": _learned(network, batches),
        "evaluations_per_forward": network.evaluations,
        "evaluations_with_error": sum(flow.evaluations_per_pass(closing=True) for flow in network.flows),
        "training_evaluations": training.evaluations,
        "check_evaluations": training.check_evaluations,
        "seconds": training.rows[-1]["seconds"],
        "validation": evaluate(network, validation).accuracy,
        "validated": [row["validation_accuracy"] for row in training.rows],
        "spent": [row["evaluations"] for row in training.rows],
    }
    if job.tuning:
        return results
    test = Batches(parts.test.to(config.device), 500)
    results |= {"solution": evaluate(network, test).accuracy}
    results |= {"without_flow": _without_flow(network, batches, test)}
    if job.solver == "bs23" and not job.forward:
        results |= _errors(network, validation.inputs)
    for kind in SCHEMES.get(job.part, ()) if job.solver == "bs23" else ():
        of = evaluate_schemes(network, test, full_passes=kind == "full_passes")
        results[kind] = {name: each.accuracy for name, each in of.items()}
    return results


def _learned(network: Network, batches: Batches) -> int:
    """How many parameters get a gradient: a closing field whose output nobody reads gets none."""
    x, y = next(iter(batches))
    network.train()
    nn.functional.cross_entropy(network(x), y).backward()
    learned = sum(p.numel() for p in network.parameters() if p.grad is not None)
    network.zero_grad()
    return learned


def _without_flow(network: Network, train: Batches, test: Batches) -> float:
    """Test accuracy of encoder and head alone, with batch norm's statistics recomputed."""
    rest = nn.Sequential(copy.deepcopy(network.encoder), copy.deepcopy(network.head))
    recalibrate(rest, train.inputs())
    return evaluate(rest, test).accuracy


@torch.no_grad()
def _errors(network: Network, inputs: Callable[[], Any]) -> Row:
    """Over validation data and blocks: the mean embedded error, and its share of how far a block moves the state."""
    modes = network.training
    network.eval()
    found = [network.record(x, error=measures.error, moved=measures.displacement)[1] for x in inputs()]
    network.train(modes)
    errors, moved = (torch.cat([records[name] for records in found], 1).double() for name in ("error", "moved"))
    return {"errors": errors.mean(1).tolist(), "relative_error": (errors.sum() / moved.sum()).item()}
