"""The loop of a training of modules: one epoch after another, of all modules or of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError
from odenets.modes import to_training_mode, total_dtype
from odenets.module_wise.activation_cache import ActivationCache, pass_through
from odenets.module_wise.evaluation import evaluate_modules
from odenets.module_wise.modules import LocalModule
from odenets.module_wise.plan import Plan, Visit
from odenets.module_wise.steps import end_to_end_step, local_step, parallel_step
from odenets.module_wise.training import ModuleTraining
from odenets.training.evaluation import Evaluation, evaluate_source
from odenets.training.metrics import Metric
from odenets.training.notes import BatchNotes
from odenets.training.objectives import Objective
from odenets.training.optimization import Interval, step_lr_scheduler
from odenets.training.sources import Source, samples_in

__all__ = ["ModuleLoop", "has_batch_norm", "move"]

Batch = tuple[Any, Tensor, Any]
"""What a module trains on: the state before it, or a tuple of it and what the fields get besides; inputs; targets."""


@dataclass(kw_only=True)
class ModuleLoop:
    """One epoch after another: the cache holds the states before module ``before``; ``frozen`` stays in eval mode."""

    training: ModuleTraining
    plan: Plan
    source: Source
    validation: Source | None
    metric: Metric | None
    lr_interval: Interval
    states: ActivationCache | None
    offload: bool
    clip_norm: float | None
    device: torch.device
    before: int = -1
    frozen: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self.training.rows
        self.started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
        self.pairs = has_batch_norm(self.training.network)
        self.plateau = any(isinstance(one, ReduceLROnPlateau) for one in self.training.lr_schedulers)

    def run(self, visit: Visit) -> None:
        """An epoch: steps, their check, and a row of metrics for each module trained."""
        training, trained = self.training, self.plan.trained(visit)
        self.frozen = to_training_mode(training.network, self.frozen)
        loss, value = self._train(visit)
        if not (finite := all(map(math.isfinite, loss))) or not is_finite(training.network):
            left = ", and left weights or buffers that are not finite" if finite else ""
            raise DivergedError(
                f"epoch {training.done + 1} diverged, with a training loss of {loss}{left}: lower the learning "
                "rate or normalize the inputs; the last checkpoint stands"
            )
        training.done += 1
        validated = self._validate(visit)
        seconds = time.perf_counter() - self.started
        for i, (k, number) in enumerate(trained.items()):
            on_validation = validated.get(k)
            row: dict[str, Any] = {"lap": visit.lap + 1, "module": k + 1, "epoch": visit.epoch + 1}
            row["train_loss"] = loss[i]
            if self.metric is not None:
                row[f"train_{self.metric.name}"] = value[i]
            row["validation_loss"] = on_validation.loss if on_validation else None
            if self.metric is not None:
                row[f"validation_{self.metric.name}"] = on_validation.metric if on_validation else None
            row["learning_rate"] = float(training.optimizers[number].param_groups[0]["lr"])  # a tensor would change
            row |= self._objectives[number].figures()
            training.rows.append(row | {"seconds": seconds})
            if training.lr_schedulers and self.lr_interval == "epoch":
                step_lr_scheduler(training.lr_schedulers[number], on_validation.loss if on_validation else loss[i])

    def _validate(self, visit: Visit) -> dict[int, Evaluation]:
        """What validation says of each module trained, by its number."""
        training = self.training
        if self.validation is None or not (visit.last or self.plateau):
            return {}
        network = training.network.to(self.device)
        objectives = dict(zip(range(self.plan.K), self._objectives, strict=False))
        if self.plan.whole:
            return {self.plan.K - 1: evaluate_source(network, self.validation, objectives[0], self.metric)}
        trained = {k: objectives[k] for k in self.plan.trained(visit)}
        return evaluate_modules(network, self.validation, self.metric, trained)

    @property
    def _objectives(self) -> list[Objective]:
        return cast(list[Objective], [*self.training.objectives])

    def _train(self, visit: Visit) -> tuple[list[float], list[float]]:
        """Mean loss and metric of each module trained, cut short once a loss is not finite."""
        trained = self.plan.trained(visit)
        metrics = [self.metric.fresh() for _ in trained] if self.metric else []
        step, on_cpu = self._step(visit, metrics), self.device.type == "cpu"
        totals = torch.zeros(len(trained), 2, dtype=total_dtype(self.device), device=self.device)
        samples, notes = 0, BatchNotes(self.source.name)
        for state, images, y in self._batches(visit):
            with notes.next(images):
                first = not (samples or on_cpu)  # a CPU raises for itself
                totals = totals + step(state, images, y, first=first).to(totals.dtype)
            samples += len(images)
            if self.training.lr_schedulers and self.lr_interval == "step":
                for number in trained.values():
                    self.training.lr_schedulers[number].step()
            if on_cpu and not totals[:, 0].isfinite().all():
                break
        loss, value = (totals / samples).T.tolist()
        return loss, [metric.mean(mean) for metric, mean in zip(metrics, value, strict=True)] if metrics else value

    def _step(self, visit: Visit, metrics: list[Metric]) -> Callable[..., Tensor]:
        """A step of what trains in an epoch: loss and metric of each module, summed over the batch."""
        network, optimizers, objectives = self.training.network, self.training.optimizers, self._objectives
        one = metrics[0] if metrics else None
        options: dict[str, Any] = {"metric": one, "clip_norm": self.clip_norm}
        if (k := visit.module) is not None:
            return partial(_one, network.modules_in_order[k], objectives[k], optimizers[k], **options)
        if self.plan.whole:
            options["checkpointed"] = self.plan.order == "checkpointed"
            step = partial(end_to_end_step, network, objectives[0], optimizers[0], **options)
        else:
            step = partial(parallel_step, network, objectives, optimizers, **options | {"metric": metrics or None})
        return lambda x, images, y, first: step(x, y, first=first)

    def _batches(self, visit: Visit) -> Iterator[Batch]:
        """The batches of an epoch: of module k the states before it."""
        if self.states is not None and visit.module is not None:
            self._advance(self.states, visit.module)
            yield from self.states.epoch(visit.epoch)
            return
        before = [module.part for module in self.training.network.modules_in_order[: visit.module or 0]]
        for inputs, y in self.source.epoch(visit.epoch):
            if self.pairs and samples_in(inputs) < 2:
                raise ValueError(
                    f"{self.source.name} must hold at least 2 samples for batch norm, got one: "
                    "DataLoader(..., drop_last=True) leaves out the last batch"
                )
            images, *args = self.training.network.arguments(inputs)
            state = pass_through(before, images, tuple(args)) if before else images
            yield (state, *args) if args else state, images, y

    def _advance(self, states: ActivationCache, k: int) -> None:
        """Take the states that are kept to before module k."""
        modules = self.training.network.modules_in_order
        if k < self.before or self.before < 0:
            states.restart()
            self.before = 0
        for j in range(self.before, k):
            if self.offload:
                self._load(j)
            states.advance(modules[j].part)
        self.before = k
        if self.offload:
            self._load(k)

    def _load(self, k: int) -> None:
        """Module k and its optimizer on the device, the others on the CPU."""
        modules = list(zip(self.training.network.modules_in_order, self.training.optimizers, strict=True))
        for j, (module, optimizer) in enumerate(modules):
            if j != k:
                move(module, optimizer, torch.device("cpu"))
        move(*modules[k], self.device)  # last: it may share its head with others


def _one(module: LocalModule, objective: Objective, optimizer: Optimizer, *batch: Any, **options: Any) -> Tensor:
    """A step of one module as :func:`parallel_step` counts it."""
    return local_step(module, objective, optimizer, *batch, **options)[1][None]


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network has batch norms, which take no single samples."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def move(module: LocalModule, optimizer: Optimizer, device: torch.device) -> None:
    """A module and the state of its optimizer on a device, where what is there already stays as it is."""
    module.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)
