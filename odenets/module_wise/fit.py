"""Training modules: in which order, one batch or many epochs at a time, and the loop that does it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError
from odenets.modes import random_state, set_random_state, to_training_mode, total_dtype
from odenets.module_wise.activation_cache import ActivationCache, pass_through
from odenets.module_wise.modules import LocalModule, ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, objectives_of
from odenets.module_wise.partition import shared_parameter
from odenets.module_wise.schedule import Plan, Schedule, Visit
from odenets.module_wise.steps import end_to_end_step, local_step, parallel_step
from odenets.training.data import Batches, data_for
from odenets.training.objectives import Objective
from odenets.training.optimization import check_optimizer, load_optimizer, make_lr_scheduler, optimizer_state
from odenets.training.progress import progress_bar
from odenets.training.runs import Run
from odenets.training.state import check_precision

__all__ = ["ModuleTraining", "fit_modules", "move"]


@dataclass
class ModuleTraining:
    """A training of modules.

    Attributes:
        network: being trained.
        objectives: of the modules; one, of the whole, where it is trained end to end.
        optimizers, rates: with them their learning-rate schedules, if any.
        done: epochs completed, those of every module counted where they are trained one after another.
        rows: metrics, a dictionary per epoch and module.
    """

    network: ModuleWise
    objectives: nn.ModuleList
    optimizers: list[Optimizer]
    rates: list[LRScheduler] = field(default_factory=list)
    done: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizers": [optimizer_state(optimizer, self.network) for optimizer in self.optimizers],
            "rates": [rate.state_dict() for rate in self.rates],
            "done": self.done,
            "rows": json.dumps(self.rows),
        } | random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ValueError: weights of another precision, another optimizer, or learning-rate schedules on one side only.
        """
        if len(self.rates) != len(state["rates"]):
            raise ValueError(
                f"rate must be that of the checkpoint, which has {len(state['rates'])} learning-rate schedules, got "
                f"{len(self.rates)}"
            )
        check_precision(self.network, state["network"])
        self.network.load_state_dict(state["network"])
        self.objectives.load_state_dict(state["objectives"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, self.network, saved)
        for rate, saved in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        self.done, self.rows = state["done"], json.loads(state["rows"])
        set_random_state(state)


def fit_modules(
    network: ModuleWise,
    batches: Batches,
    *,
    epochs: int | Sequence[int],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    objective: ModuleObjective | None = None,
    schedule: Schedule = "parallel",
    laps: int = 1,
    rate: Callable[[Optimizer], LRScheduler] | None = None,
    validation: Batches | None = None,
    cache: Literal["memory"] | Path | None = None,
    views: int = 1,
    offload: bool = False,
    clip_norm: float | None = None,
    run: Run | None = None,
    checkpoint: str = "resume.pt",
    progress: str | None = None,
    report: Callable[[int], object] = lambda n: None,
    device: torch.device | str = "cpu",
) -> ModuleTraining:
    """Train the modules of a network, each by its own loss.

    Modes are those of :func:`odenets.training.fit`: what is in eval mode within a network in training mode stays so.

    Args:
        network: trained in place, on the device. Inputs are taken to its dtype.
        batches: training data; epoch e of a module draws the same batches in every run.
        epochs: how many; one number per module, and per lap, where they are trained one after another, as [K24]
            trains module k for ``50 + 10 k``.
        optimizer: makes the optimizer of one module from its parameters.
        objective: makes the objective of each module; cross-entropy alone (VanGL) if not given.
        schedule: "parallel", on each batch every module takes a step; "sequential", a module is trained to its end
            before the next, those before it in eval mode; "end-to-end", the last head alone by backpropagation through
            everything, and "checkpointed", the same with only the states between modules kept.
        laps: of a sequential schedule: how often it goes over the modules. Optimizers and multipliers go on from lap to
            lap.
        rate: makes a learning-rate schedule of one optimizer, stepped after each of its epochs.
        validation: accuracies are measured on it, of all modules after each parallel epoch and of one at the end of
            each visit.
        cache: where a sequential schedule keeps the states before the module in training: "memory", a folder, or None
            to compute them for every batch.
        views: of each augmented image in the cache, see :class:`~odenets.module_wise.activation_cache.ActivationCache`.
        offload: with a cache and a device: keep only the module in training there.
        clip_norm: largest norm of a module's gradient.
        run: where the checkpoint is kept; if it holds one the training goes on from there and ends with the same
            weights to the last bit.
        checkpoint: name of the resume state.
        progress: label of a progress bar.
        report: called with 1 after each epoch.
        device: where it computes.

    Raises:
        DivergedError: a loss or a weight is not finite; the last checkpoint stands.
        TypeError: no objectives, or an output that they cannot read.
        ValueError: arguments out of range, a multiplier that modules share, a batch of one sample, which batch norms
            cannot take, a cache for modules that share weights, an optimizer without its module's parameters, or a
            checkpoint of another schedule or precision, or of a sequential training with other epochs or laps.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    plan = Plan.of(network.K, epochs, schedule, laps)
    _check(network, plan, batches, cache is not None, offload)
    network.to(device)
    optimizers = [optimizer(list(unit.parameters())) for unit in plan.units(network)]
    for k, (one, unit) in enumerate(zip(optimizers, plan.units(network), strict=True)):
        if schedule != "sequential" or plan.epochs[k]:
            check_optimizer(one, unit)
    objectives = objectives_of(objective or greedy(), [network.K - 1] if plan.whole else range(network.K), network.K)
    rates = [made for one in optimizers if (made := make_lr_scheduler(rate, one))]
    training = ModuleTraining(network, nn.ModuleList(objectives).to(device), optimizers, rates)
    state = run.load_state(checkpoint) if run else None
    if state is not None:
        plan.check_state(state)
        training.load_state_dict(state)
    batches = replace(batches, data=data_for(network, batches.data))
    if validation is not None:
        validation = Batches(data_for(network, validation.data), validation.size)
    states = None if cache is None else ActivationCache(batches, views, None if cache == "memory" else cache)
    loop = _Loop(
        training=training, plan=plan, batches=batches, validation=validation, states=states, offload=offload,
        clip_norm=clip_norm, device=torch.device(device),
    )  # fmt: skip
    with progress_bar(progress, len(plan.visits), training.done) as show:
        for visit in plan.visits[training.done :]:
            loop.run(visit)
            if run is not None:
                run.save_state(training.state_dict() | plan.state_dict(), checkpoint)
                run.log(training.rows)
            report(1)
            show(training.rows[-1])
    network.to(device)
    to_training_mode(network, loop.frozen)
    return training


def _check(network: ModuleWise, plan: Plan, batches: Batches, cached: bool, offload: bool) -> None:
    """That the modules can be trained so."""
    if cached and plan.schedule != "sequential":
        raise ValueError("cache is for the sequential schedule, whose earlier modules stand still")
    if offload and not cached:
        raise ValueError("offload needs a cache: without one every batch passes all modules before")
    if batches.smallest < 2 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        raise ValueError(f"batches must hold at least 2 samples for batch norm, the last one holds {batches.smallest}")
    if cached and (shared := shared_parameter([m.part for m in network.modules_in_order], range(plan.K))):
        first, second, name = shared
        raise ValueError(
            f"cache is for modules that share no weights, but modules {first + 1} and {second + 1} share {name}: "
            "cache=None computes the states anew"
        )


@dataclass(kw_only=True)
class _Loop:
    """One epoch after another: the cache holds the states before module ``before``; ``frozen`` stays in eval mode."""

    training: ModuleTraining
    plan: Plan
    batches: Batches
    validation: Batches | None
    states: ActivationCache | None
    offload: bool
    clip_norm: float | None
    device: torch.device
    before: int = -1
    frozen: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self.training.rows
        self.started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)

    def run(self, visit: Visit) -> None:
        """An epoch: steps, their check, and a row of metrics for each module trained."""
        training, trained = self.training, self.plan.trained(visit)
        self.frozen = to_training_mode(training.network, self.frozen)
        loss, accuracy = (self._train(visit) / len(self.batches.data)).T.tolist()
        if not (finite := all(map(math.isfinite, loss))) or not is_finite(training.network):
            left = ", and left weights or buffers that are not finite" if finite else ""
            raise DivergedError(
                f"epoch {training.done + 1} diverged, with a training loss of {loss}{left}: lower the learning "
                "rate or normalize the inputs; the last checkpoint stands"
            )
        training.done += 1
        accuracies = {}
        if self.validation is not None and visit.last:
            network = training.network.to(self.validation.data.x.device)
            accuracies = dict(enumerate(network.accuracies(self.validation)))
        seconds = time.perf_counter() - self.started
        for i, (k, number) in enumerate(trained.items()):
            row = {"lap": visit.lap + 1, "module": k + 1, "epoch": visit.epoch + 1}
            row |= {"train_loss": loss[i], "train_accuracy": accuracy[i], "validation_accuracy": accuracies.get(k)}
            row["learning_rate"] = training.optimizers[number].param_groups[0]["lr"]
            training.rows.append(row | {"seconds": seconds})
        if training.rates:
            for number in trained.values():
                training.rates[number].step()

    def _train(self, visit: Visit) -> Tensor:
        """Summed loss and number of right answers of each module trained, ``(modules, 2)``."""
        network, optimizers, clip = self.training.network, self.training.optimizers, self.clip_norm
        objectives = cast(list[Objective], [*self.training.objectives])
        batches: Iterable[tuple[Tensor, ...]] = self.batches.epoch(visit.epoch)
        if (k := visit.module) is not None:
            batches = self._states(k, visit.epoch)
            step: Callable[..., Tensor] = partial(_one, network.modules_in_order[k], objectives[k], optimizers[k], clip)
        elif self.plan.whole:
            again = self.plan.schedule == "checkpointed"
            step = partial(end_to_end_step, network, objectives[0], optimizers[0], checkpointed=again, clip_norm=clip)
        else:
            step = partial(parallel_step, network, objectives, optimizers, clip_norm=clip)
        totals = torch.zeros((), dtype=total_dtype(self.device), device=self.device)
        for batch in batches:
            totals = totals + step(*batch).to(totals.dtype)
            if self.device.type == "cpu" and not totals.isfinite().all():
                break
        return totals

    def _states(self, k: int, epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """The batches of module k: states before it, images and labels."""
        modules = self.training.network.modules_in_order
        if self.states is None:
            before = [module.part for module in modules[:k]]
            return ((pass_through(before, x), x, y) for x, y in self.batches.epoch(epoch))
        if k < self.before or self.before < 0:
            self.states.restart()
            self.before = 0
        for j in range(self.before, k):
            if self.offload:
                self._load(j)
            self.states.advance(modules[j].part)
        self.before = k
        if self.offload:
            self._load(k)
        return self.states.epoch(epoch)

    def _load(self, k: int) -> None:
        """Module k and its optimizer on the device, the others on the CPU."""
        modules = list(zip(self.training.network.modules_in_order, self.training.optimizers, strict=True))
        for j, (module, optimizer) in enumerate(modules):
            if j != k:
                move(module, optimizer, torch.device("cpu"))
        move(*modules[k], self.device)  # last: it may share its head with others


def _one(module: LocalModule, objective: Objective, optimizer: Optimizer, clip: float | None, *batch: Tensor) -> Tensor:
    """A step of one module as :func:`parallel_step` counts it."""
    return local_step(module, objective, optimizer, *batch, clip_norm=clip)[1][None]


def move(module: LocalModule, optimizer: Optimizer, device: torch.device) -> None:
    """A module and the state of its optimizer on a device, where what is there already stays as it is."""
    module.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)
