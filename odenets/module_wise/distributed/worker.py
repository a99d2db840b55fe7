"""A process that trains some modules: where its batches come from, what it does with them, and what it keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from odenets.checkpoints import check_methods, is_finite, structure
from odenets.errors import DivergedError, WorkerLostError
from odenets.modes import to_training_mode, total_dtype
from odenets.module_wise.distributed.buffers import Buffer, Message, Receiver, Sender, check_sendable
from odenets.module_wise.distributed.checkpoints import ModuleCheckpoints
from odenets.module_wise.modules import ModuleWise
from odenets.module_wise.objectives import ModuleObjective, objectives_of
from odenets.module_wise.partition import even
from odenets.module_wise.steps import local_step
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.optimization import (
    Interval,
    MakeLRScheduler,
    MakeOptimizer,
    check_optimizer,
    check_scheduler,
    load_optimizer,
    load_scheduler,
    make_lr_scheduler,
    make_optimizer,
    optimizer_state,
    scheduler_state,
    step_lr_scheduler,
)
from odenets.training.sources import Source, arguments, part, samples_in
from odenets.training.state import check_precision

__all__ = ["Worker", "check_shared"]


@dataclass(kw_only=True)
class Worker:
    """The modules of one process, and its neighbors.

    The processes that share the batches of some modules are a rank group; a replica is a process' number in its group.
    ``length`` is the number of batches of an epoch; the other options are those of
    :func:`~odenets.module_wise.fit_in_processes`.
    """

    network: ModuleWise
    source: Source
    length: int
    epochs: int
    optimizer: MakeOptimizer
    lr_scheduler: MakeLRScheduler | None
    lr_interval: Interval
    objective: ModuleObjective
    metric: MetricFunction | None
    places: int
    replicas: int
    clip_norm: float | None
    timeout: float
    device: torch.device
    checkpoints: ModuleCheckpoints | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0

    def __post_init__(self) -> None:
        rank, self.rank_groups = distributed.get_rank(), distributed.get_world_size() // self.replicas
        self.rank_group, self.replica = divmod(rank, self.replicas)
        self.owned = [range(a, b) for a, b in pairwise([0, *even(self.network.K, self.rank_groups)])]
        self.own = self.owned[self.rank_group]
        self.modules = [self.network.modules_in_order[k].to(self.device) for k in self.own]
        self.optimizers = [make_optimizer(self.optimizer, module.parameters()) for module in self.modules]
        for optimizer, module in zip(self.optimizers, self.modules, strict=True):
            check_optimizer(optimizer, module, stacklevel=5)
        makers = self.lr_scheduler, self.lr_interval
        self.schedulers = [make_lr_scheduler(makers[0], optimizer, makers[1]) for optimizer in self.optimizers]
        self.objectives = [o.to(self.device) for o in objectives_of(self.objective, self.own, self.network.K)]
        self.measured = Metric.of(self.metric, self.objectives[0])
        self.with_images = any(module.local_loss is not None for module in self.network.modules_in_order)
        if not self.rank_group:
            self.source.move_to(self.modules[0])
        self._make_groups()

    def _make_groups(self) -> None:
        """Groups of replicas, and of neighbors; every process makes all of them, in one order."""
        for g in range(self.rank_groups):
            group: Any = distributed.new_group([g * self.replicas + r for r in range(self.replicas)])
            if g == self.rank_group:
                self.group: Any = group
        self.receiver: Receiver | None = None
        self.sender: Sender | None = None
        where = self.device if distributed.get_backend() == "nccl" else torch.device("cpu")
        for g in range(self.rank_groups - 1):
            for r in range(self.replicas):
                one, other = g * self.replicas + r, (g + 1) * self.replicas + r
                group = distributed.new_group([one, other])
                if (self.rank_group, self.replica) == (g, r):
                    self.sender = Sender(other, group, where)
                if (self.rank_group, self.replica) == (g + 1, r):
                    self.receiver = Receiver(one, group, where)
        for objective in self.objectives:
            objective.group = self.group

    def name(self, rank_group: int) -> str:
        """A process, as errors call it."""
        first, last = self.owned[rank_group][0] + 1, self.owned[rank_group][-1] + 1
        modules = f"module {first}" if first == last else f"modules {first} to {last}"
        return f"the process of {modules} (rank {rank_group * self.replicas + self.replica})"

    def train(self) -> None:
        """All epochs, from where the checkpoints stand."""
        self._resume()
        to_training_mode(self.network)
        incoming = None
        if self.receiver is not None:
            incoming = Buffer(self.places, self.timeout, self.name(self.rank_group - 1))
            self.receiver.start(incoming)
        if self.sender is not None:
            self.sender.start(self.places == 1, self.timeout, self.name(self.rank_group + 1))
        started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        while self.epoch < self.epochs:
            self._epoch(incoming, started)
            self._save()
        if incoming is not None:
            incoming.end()
        if self.sender is not None:
            self.sender.finish()

    def _epoch(self, incoming: Buffer | None, started: float) -> None:
        """An epoch, and a row of metrics for each module."""
        totals, samples = torch.zeros(len(self.own), 2, dtype=total_dtype(self.device), device=self.device), 0
        measured = self.measured
        metrics = [measured.fresh(alone=True) for _ in self.own] if measured else None
        for message in self._messages(incoming):
            totals += self._step(message, metrics, first=not samples and self.device.type != "cpu")
            samples += len(message.state)
        loss, value = (totals / samples).T.tolist()
        if not all(map(math.isfinite, loss)) or not all(map(is_finite, self.modules)):
            raise DivergedError(
                f"epoch {self.epoch + 1} diverged, with a training loss of {loss}; the last checkpoint stands"
            )
        self.epoch += 1
        for i, k in enumerate(self.own):
            row = {"module": k + 1, "epoch": self.epoch, "train_loss": loss[i]}
            if metrics is not None:
                row[f"train_{metrics[i].name}"] = metrics[i].mean(value[i])
            row["learning_rate"] = self.optimizers[i].param_groups[0]["lr"]
            row |= self.objectives[i].figures()
            self.rows.append(row | {"seconds": time.perf_counter() - started})
            scheduler = self.schedulers[i]
            if scheduler is not None and self.lr_interval == "epoch":
                step_lr_scheduler(scheduler, loss[i])

    def _messages(self, incoming: Buffer | None) -> Iterator[Message]:
        """What the first module of this process trains on in an epoch."""
        if incoming is not None:
            for _ in range(self.length):
                yield incoming.take().to(self.device)
            return
        number = 0
        for number, batch in enumerate(self.source.epoch(self.epoch), 1):
            whole = samples_in(batch[0])
            if whole < 2 * self.replicas or number > self.length:
                self._refuse(whole, number)
            if number == 1 and self.replicas > 1:
                check_shared(batch, self.source.name, self.replicas, self.group, self.device)
            inputs, y = part(batch, slice(self.replica, None, self.replicas)) if self.replicas > 1 else batch
            x, *args = arguments(inputs)
            check_sendable([x, y, *args])
            yield Message(x, x if self.with_images else x.new_empty(0), y, whole, tuple(args))
        if number < self.length:
            self._refuse(2 * self.replicas, number)

    def _refuse(self, whole: int, number: int) -> None:
        name = self.source.name
        if whole < 2 * self.replicas:
            raise ValueError(
                f"{name} must hold at least {2 * self.replicas} samples each, two per replica, got {whole}: "
                "DataLoader(..., drop_last=True) leaves out the last one"
            )
        raise ValueError(f"{name} must be as many as their length says, {self.length}, got {number}")

    def _step(self, message: Message, metrics: list[Metric] | None, first: bool) -> Tensor:
        """A step of every module of this process, and the state behind them sent on."""
        state, totals = message.state, []
        images = message.images if self.with_images else message.state
        average = partial(self._average, len(message.state), message.whole) if self.replicas > 1 else None
        parts = zip(self.modules, self.objectives, self.optimizers, self.schedulers, strict=True)
        for i, (module, objective, optimizer, scheduler) in enumerate(parts):
            inputs = (state, *message.args) if message.args else state
            state, one = local_step(
                module, objective, optimizer, inputs, images, message.y,
                metric=metrics[i] if metrics else None, clip_norm=self.clip_norm, share=average, first=first,
            )  # fmt: skip
            totals.append(one)
            if scheduler is not None and self.lr_interval == "step":
                scheduler.step()
        if self.sender is not None:
            self.sender.send(message._replace(state=state))
        return torch.stack(totals)

    def _average(self, samples: int, whole: int, optimizer: Optimizer) -> None:
        """Gradients of the replicas, each of the mean over its share, become that of the mean over the batch."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) * (samples / whole)
        try:
            distributed.all_reduce(flat, group=self.group)
        except RuntimeError as error:
            raise WorkerLostError(f"a replica of {self.name(self.rank_group)} is gone ({error})") from error
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _save(self) -> None:
        """A checkpoint of each module after an epoch; the oldest go."""
        if self.replicas > 1:
            for module in self.modules:
                for buffer in module.buffers():
                    distributed.broadcast(buffer, self.rank_group * self.replicas, group=self.group)
        if self.checkpoints is None or self.replica:
            return
        for i, k in enumerate(self.own):
            state = {
                "structure": structure(self.modules[i]),
                "module": self.modules[i].state_dict(),
                "optimizer": optimizer_state(self.optimizers[i], self.modules[i]),
                "lr_scheduler": scheduler_state(self.schedulers[i]),
                "objective": self.objectives[i].state_dict(),
                "batches": {} if k else self.source.state_dict(),
                "rows": json.dumps([row for row in self.rows if row["module"] == k + 1]),
                "epoch": self.epoch,
            }
            self.checkpoints.save(k, state)
        self.checkpoints.prune(self.own)

    def _resume(self) -> None:
        """Take up the newest epoch that all modules have completed."""
        if self.checkpoints is None:
            return
        newest = torch.tensor(self.checkpoints.newest(), device=self.device)
        distributed.broadcast(newest, 0)
        self.epoch = int(newest)
        if not self.epoch:
            return
        for i, k in enumerate(self.own):
            state = self.checkpoints.load(k, self.epoch)
            check_scheduler(self.schedulers[i], state["lr_scheduler"])
            check_methods(self.modules[i], state.get("structure", {}))
            check_precision(self.modules[i], state["module"])
            self.modules[i].load_state_dict(state["module"])
            load_optimizer(self.optimizers[i], self.modules[i], state["optimizer"])
            load_scheduler(self.schedulers[i], state["lr_scheduler"])
            self.objectives[i].load_state_dict(state["objective"])
            if not k:
                self.source.load_state_dict(state["batches"])
            self.rows += json.loads(state["rows"])
        self.rows.sort(key=_order)

    def gather(self) -> list[dict[str, Any]]:
        """All weights in all processes, and the metrics of all."""
        distributed.barrier()
        for g, own in enumerate(self.owned):
            for k in own:
                for value in self.network.modules_in_order[k].state_dict().values():
                    if isinstance(value, Tensor):
                        here = value.to(self.device)
                        distributed.broadcast(here, g * self.replicas)
                        value.copy_(here)
        rows: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(rows, self.rows)
        return sorted((row for first in rows[:: self.replicas] for row in first), key=_order)


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return row["epoch"], row["module"]


def check_shared(batch: Any, name: str, replicas: int, group: Any, device: torch.device) -> None:
    """That the replicas of a group have one batch.

    Raises:
        ValueError: they have different ones.
    """
    sums = [t.double().sum() for t in (*arguments(batch[0]), batch[1]) if isinstance(t, Tensor)]
    own = torch.stack([*sums, torch.full_like(sums[0], samples_in(batch[0]))]).to(device)
    of_all = [torch.empty_like(own) for _ in range(replicas)]
    distributed.all_gather(of_all, own, group=group)
    if any(not torch.equal(own, other) for other in of_all):
        raise ValueError(
            f"{name} must be the same in every replica, each of which takes its share of them, got different ones: "
            "seed their sampler, DataLoader(..., generator=torch.Generator().manual_seed(0))"
        )
