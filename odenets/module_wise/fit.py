"""Schedules: in which order modules are trained, one batch or many epochs at a time, and the loop that does it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError
from odenets.modes import to_training_mode, total_dtype
from odenets.module_wise.activation_cache import States, pass_through
from odenets.module_wise.modules import LocalModule, ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, objectives_of
from odenets.module_wise.steps import end_to_end_step, local_step, parallel_step
from odenets.training.data import Batches, data_for
from odenets.training.objectives import Objective
from odenets.training.runs import Run
from odenets.training.state import check_optimizer, check_precision

__all__ = ["ModuleTraining", "Schedule", "fit_modules"]

Schedule = Literal["parallel", "sequential", "end-to-end", "checkpointed"]


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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rates": [rate.state_dict() for rate in self.rates],
            "done": self.done,
            "rows": json.dumps(self.rows),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ValueError: weights of another precision, or learning-rate schedules on one side only.
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
            optimizer.load_state_dict(saved)
        for rate, saved in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        self.done, self.rows = state["done"], json.loads(state["rows"])
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


@dataclass(frozen=True)
class _Visit:
    """One epoch: of which module, None for all; which epoch of its own; whether it begins or ends a visit to it."""

    module: int | None
    epoch: int
    lap: int
    first: bool = False
    last: bool = False


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
        epochs: how many; one number per module, and per lap, where they are trained one after another, as the thesis
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
        views: of each augmented image in the cache, see :class:`~odenets.module_wise.activation_cache.States`.
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
    counts = _counts(network, epochs, schedule, laps, cache, offload)
    smallest = len(batches.data) % batches.size or min(batches.size, len(batches.data))
    if smallest < 2 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        raise ValueError(f"batches must hold at least 2 samples for batch norm, the last one holds {smallest}")
    K, whole = network.K, schedule in ("end-to-end", "checkpointed")
    objective = objective or greedy()
    network.to(device)
    if whole:
        last = network.modules_in_order[-1].head
        groups = [[p for m in network.modules_in_order for p in m.part.parameters()] + list(last.parameters())]
        objectives = nn.ModuleList(objectives_of(objective, [K - 1], K))
    else:
        groups = [list(module.parameters()) for module in network.modules_in_order]
        objectives = nn.ModuleList(objectives_of(objective, range(K), K))
    optimizers = [optimizer(group) for group in groups]
    parts = nn.ModuleList([module.part for module in network.modules_in_order])
    for k, made in enumerate(optimizers):
        if whole:
            check_optimizer(made, parts, network.modules_in_order[-1].head)
        elif schedule == "parallel" or counts[k]:
            check_optimizer(made, network.parts[k])
    if cache is not None:
        _check_apart(network)
    training = ModuleTraining(network, objectives.to(device), optimizers, [rate(o) for o in optimizers] if rate else [])
    state = run.load_state(checkpoint) if run else None
    if state is not None:
        if state.get("schedule", schedule) != schedule:
            raise ValueError(f"schedule must be that of the checkpoint, {state['schedule']!r}, got {schedule!r}")
        if schedule == "sequential" and state["plan"] != [laps, *counts]:
            raise ValueError(
                f"epochs and laps must be those of the checkpoint, {state['plan'][1:]} and {state['plan'][0]}, got "
                f"{counts} and {laps}"
            )
        training.load_state_dict(state)
    batches = replace(batches, data=data_for(network, batches.data))
    if validation is not None:
        validation = Batches(data_for(network, validation.data), validation.size)
    plan = _plan(schedule, counts, laps)
    loop = _Loop(training, batches, schedule, cache, views, offload, clip_norm, torch.device(device))
    started = time.perf_counter() - (training.rows[-1]["seconds"] if training.rows else 0.0)
    bar = tqdm(total=len(plan), initial=training.done, desc=progress, disable=progress is None, unit="epoch")
    with bar:
        for visit in plan[training.done :]:
            totals = loop.epoch(visit)
            loss, accuracy = (totals / len(batches.data)).T.tolist()
            if not (finite := all(map(math.isfinite, loss))) or not is_finite(network):
                left = ", and left weights or buffers that are not finite" if finite else ""
                raise DivergedError(
                    f"epoch {training.done + 1} diverged, with a training loss of {loss}{left}: lower the learning "
                    "rate or normalize the inputs; the last checkpoint stands"
                )
            training.done += 1
            trained = range(K) if visit.module is None else [visit.module]
            measured = _measured(network, validation, visit, whole)
            seconds = time.perf_counter() - started
            for i, k in enumerate([K - 1] if whole else trained):
                row: dict[str, Any] = {"lap": visit.lap + 1, "module": k + 1, "epoch": visit.epoch + 1}
                row |= {"train_loss": loss[i], "train_accuracy": accuracy[i]}
                row["validation_accuracy"] = measured.get(k)
                row["learning_rate"] = optimizers[0 if whole else k].param_groups[0]["lr"]
                training.rows.append(row | {"seconds": seconds})
            if training.rates:
                for k in [0] if whole else trained:
                    training.rates[k].step()
            if run is not None:
                run.save_state(training.state_dict() | {"plan": [laps, *counts], "schedule": schedule}, checkpoint)
                run.log(training.rows)
            bar.update()
            report(1)
    network.to(device)
    to_training_mode(network, loop.frozen)
    return training


class _Loop:
    """One epoch after another, and what is kept between them."""

    def __init__(
        self,
        training: ModuleTraining,
        batches: Batches,
        schedule: str,
        cache: Literal["memory"] | Path | None,
        views: int,
        offload: bool,
        clip_norm: float | None,
        device: torch.device,
    ) -> None:
        self.training, self.batches, self.schedule = training, batches, schedule
        self.clip_norm, self.offload, self.device = clip_norm, offload, device
        self.states = None if cache is None else States(batches, views, None if cache == "memory" else cache)
        self.before = -1  # the module whose states the cache holds
        self.frozen: list[nn.Module] = []

    def epoch(self, visit: _Visit) -> Tensor:
        """Summed loss and number of right answers of each module trained, ``(modules, 2)``."""
        network, clip = self.training.network, self.clip_norm
        self.frozen = to_training_mode(network, self.frozen)
        if visit.module is not None:
            return self._one(visit.module, visit)
        if self.schedule == "parallel":
            objectives: Sequence[Objective] = list(self.training.objectives)  # type: ignore[assignment]
            step = partial(parallel_step, network, objectives, self.training.optimizers, clip_norm=clip)
        else:
            kept = self.schedule == "checkpointed"
            objective: Objective = self.training.objectives[0]  # type: ignore[assignment]
            optimizer = self.training.optimizers[0]
            step = partial(end_to_end_step, network, objective, optimizer, checkpointed=kept, clip_norm=clip)
        totals = torch.zeros((), dtype=total_dtype(self.device), device=self.device)
        for x, y in self.batches.epoch(visit.epoch):
            totals = totals + step(x, y).to(totals.dtype)
            if self.device.type == "cpu" and not totals.isfinite().all():
                break
        return totals

    def _one(self, k: int, visit: _Visit) -> Tensor:
        training, modules = self.training, self.training.network.modules_in_order
        before = [module.part for module in modules[:k]]
        if self.states is not None:
            self._fill(k)
            parts = self.states.epoch(visit.epoch)
        else:
            parts = ((pass_through(before, x), x, y) for x, y in self.batches.epoch(visit.epoch))
        if self.offload:
            self._load(k)
        objective: Objective = training.objectives[k]  # type: ignore[assignment]
        totals = torch.zeros(2, dtype=total_dtype(self.device), device=self.device)
        for state, images, y in parts:
            _, found = local_step(
                modules[k], objective, training.optimizers[k], state, images, y, clip_norm=self.clip_norm
            )
            totals += found
            if self.device.type == "cpu" and not totals.isfinite().all():
                break
        return totals[None]

    def _fill(self, k: int) -> None:
        """Let the cache hold the states before module k."""
        assert self.states is not None
        if k == self.before:
            return
        if k < self.before or self.before < 0:
            self.states.restart()
            self.before = 0
        for j in range(self.before, k):
            module = self.training.network.modules_in_order[j]
            if self.offload:
                self._load(j)
            self.states.advance(module.part)
        self.before = k

    def _load(self, k: int) -> None:
        """Module k and its optimizer on the device, the others on the CPU."""
        modules = list(zip(self.training.network.modules_in_order, self.training.optimizers, strict=True))
        for j, (module, optimizer) in enumerate(modules):
            if j != k:
                _move(module, optimizer, torch.device("cpu"))
        _move(*modules[k], self.device)  # last: it may share its head with others


def _move(module: LocalModule, optimizer: Optimizer, device: torch.device) -> None:
    """A module and the state of its optimizer on a device, where what is there already stays as it is."""
    module.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)


def _check_apart(network: ModuleWise) -> None:
    """That training a module leaves the states before it as the cache holds them."""
    owner: dict[int, int] = {}
    for k, module in enumerate(network.modules_in_order):
        for name, p in module.part.named_parameters():
            if owner.setdefault(id(p), k) != k:
                raise ValueError(
                    f"cache is for modules that share no weights, but modules {owner[id(p)] + 1} and {k + 1} share "
                    f"{name}: cache=None computes the states anew"
                )


def _counts(
    network: ModuleWise,
    epochs: int | Sequence[int],
    schedule: str,
    laps: int,
    cache: Literal["memory"] | Path | None,
    offload: bool,
) -> list[int]:
    """Epochs of each module per lap, or of all."""
    if schedule not in ("parallel", "sequential", "end-to-end", "checkpointed"):
        raise ValueError(f"schedule must be 'parallel', 'sequential', 'end-to-end' or 'checkpointed', got {schedule!r}")
    sequential = schedule == "sequential"
    if laps < 1 or (laps > 1 and not sequential):
        raise ValueError(f"laps must be at least 1, and 1 where the schedule is not sequential, got {laps}")
    if cache is not None and not sequential:
        raise ValueError("cache is for the sequential schedule, whose earlier modules stand still")
    if offload and cache is None:
        raise ValueError("offload needs a cache: without one every batch passes all modules before")
    counts = [epochs] * (network.K if sequential else 1) if isinstance(epochs, int) else list(epochs)
    if len(counts) != (network.K if sequential else 1) or min(counts) < 0:
        raise ValueError(
            f"epochs must be one number that is not negative, or in a sequential schedule one per module "
            f"({network.K}), got {epochs}"
        )
    return counts


def _plan(schedule: str, counts: list[int], laps: int) -> list[_Visit]:
    if schedule != "sequential":
        return [_Visit(None, e, 0) for e in range(counts[0])]
    return [
        _Visit(k, lap * n + e, lap, first=e == 0, last=e == n - 1)
        for lap in range(laps)
        for k, n in enumerate(counts)
        for e in range(n)
    ]


def _measured(network: ModuleWise, validation: Batches | None, visit: _Visit, whole: bool) -> dict[int, float]:
    """Validation accuracies of the modules that are due."""
    if validation is None or (visit.module is not None and not visit.last):
        return {}
    network.to(validation.data.x.device)
    found = network.accuracies(validation)
    if whole:
        return {network.K - 1: found[-1]}
    return dict(enumerate(found)) if visit.module is None else {visit.module: found[visit.module]}
