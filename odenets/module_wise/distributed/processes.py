"""Modules in different processes, each training on the newest batch that the module before it has produced."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError, WorkerLostError
from odenets.modes import inputs_for, to_training_mode, total_dtype
from odenets.module_wise.distributed.buffers import Buffer, Message, Receiver, Sender
from odenets.module_wise.distributed.checkpoints import ModuleCheckpoints
from odenets.module_wise.modules import ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, objectives_of
from odenets.module_wise.partition import even, shared_parameter
from odenets.module_wise.steps import local_step
from odenets.training.data import Batches
from odenets.training.optimization import check_optimizer
from odenets.training.runs import Run
from odenets.training.state import check_precision

__all__ = ["check_apart", "fit_in_processes"]


def fit_in_processes(
    network: ModuleWise,
    batches: Batches,
    *,
    epochs: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    objective: ModuleObjective | None = None,
    buffer: int = 1,
    replicas: int = 1,
    clip_norm: float | None = None,
    run: Run | None = None,
    timeout: float = 600.0,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Train modules in parallel, each in a process of its own: none waits for another's forward or backward pass.

    Call it in every process of a group that ``torchrun`` has launched, with the same network, data and arguments. Each
    process trains some consecutive modules, and sends the states behind them on.

    Args:
        network: with the same weights in all processes; in the end all hold the trained weights of all modules. Inputs
            are taken to its dtype; modes are those of :func:`odenets.training.fit`.
        batches, optimizer, objective, clip_norm: as in :func:`~odenets.module_wise.fit_modules`.
        epochs: how many; each module takes ``epochs * len(batches)`` steps.
        buffer: batches between two processes. With 1 each module takes every batch once and in order: the losses are
            those of the parallel schedule in one process, and the slowest process sets the pace. With more nobody
            waits: a module that is fast trains again on what it has, one that is slow leaves batches out, and ends on
            the last ones once those before it are done.
        replicas: processes per group of modules; each takes its share of every batch, and their gradients are averaged.
        run: where each module keeps a checkpoint per epoch, on a file system that all processes share, from the newest
            epoch on that all modules have completed; the training goes on from there.
        timeout: seconds after which a process that is silent counts as lost.
        device: of this process; states are sent from there (NCCL) or by way of the host (gloo).

    Returns:
        Metrics, a dictionary per epoch and module, of all processes.

    Raises:
        RuntimeError: no process group.
        WorkerLostError: another process is gone or silent; the checkpoints stand.
        DivergedError: a loss or a weight is not finite.
        ValueError: more processes than modules, processes that do not divide into replicas, a buffer below 1, a
            clip_norm that is not positive, a batch too small, modules of different processes that share parameters, or
            checkpoints of no common epoch.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "no process group: launch with torchrun and call torch.distributed.init_process_group('gloo'), or 'nccl', "
            "first"
        )
    world = distributed.get_world_size()
    if buffer < 1:
        raise ValueError(f"buffer must hold at least 1 batch, got {buffer}")
    if replicas < 1 or world % replicas:
        raise ValueError(f"replicas must divide the number of processes, {world}, got {replicas}")
    groups = world // replicas
    if groups > network.K:
        raise ValueError(f"{groups} processes with modules of their own need as many modules, got {network.K}")
    if batches.smallest < 2 * replicas:
        raise ValueError(
            f"batches must hold at least {2 * replicas} samples, two per replica, the last holds {batches.smallest}"
        )
    worker = _Worker(
        network=network, batches=batches, epochs=epochs, make_optimizer=optimizer, objective=objective or greedy(),
        places=buffer, replicas=replicas, clip_norm=clip_norm, timeout=timeout, device=torch.device(device),
        checkpoints=None if run is None else ModuleCheckpoints(run, network.K),
    )  # fmt: skip
    with _stopping(worker):
        worker.train()
    return worker.gather()


@dataclass(kw_only=True)
class _Worker:
    """The modules of one process, and its neighbors.

    The processes that share the batches of some modules are a rank group; a replica is a process' number in its group.
    """

    network: ModuleWise
    batches: Batches
    epochs: int
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    objective: ModuleObjective
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
        check_apart(self.network, self.owned)
        self.modules = [self.network.modules_in_order[k].to(self.device) for k in self.own]
        self.optimizers = [self.make_optimizer(module.parameters()) for module in self.modules]
        for optimizer, module in zip(self.optimizers, self.modules, strict=True):
            check_optimizer(optimizer, module, stacklevel=5)
        self.objectives = [o.to(self.device) for o in objectives_of(self.objective, self.own, self.network.K)]
        self.with_images = any(module.local_loss is not None for module in self.network.modules_in_order)
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
            totals, samples = torch.zeros(len(self.own), 2, dtype=total_dtype(self.device), device=self.device), 0
            for message in self._messages(incoming):
                totals += self._step(message)
                samples += len(message.y)
            loss, accuracy = (totals / samples).T.tolist()
            if not all(map(math.isfinite, loss)) or not all(map(is_finite, self.modules)):
                raise DivergedError(
                    f"epoch {self.epoch + 1} diverged, with a training loss of {loss}; the last checkpoint stands"
                )
            self.epoch += 1
            for i, k in enumerate(self.own):
                row = {"module": k + 1, "epoch": self.epoch, "train_loss": loss[i], "train_accuracy": accuracy[i]}
                self.rows.append(row | {"seconds": time.perf_counter() - started})
            self._save()
        if incoming is not None:
            incoming.end()
        if self.sender is not None:
            self.sender.finish()

    def _messages(self, incoming: Buffer | None) -> Iterator[Message]:
        """What the first module of this process trains on in an epoch."""
        if incoming is not None:
            for _ in range(len(self.batches)):
                state, images, y, whole = incoming.take()
                yield Message(state.to(self.device), images.to(self.device), y.to(self.device), whole)
            return
        for x, y in self.batches.epoch(self.epoch):
            share = slice(self.replica, None, self.replicas)
            x, whole = inputs_for(self.modules[0], x[share]).to(self.device), len(y)
            yield Message(x, x if self.with_images else x.new_empty(0), y[share].to(self.device), whole)

    def _step(self, message: Message) -> Tensor:
        """A step of every module of this process, and the state behind them sent on."""
        state, totals = message.state, []
        images = message.images if self.with_images else message.state
        average = partial(self._average, len(message.y), message.whole) if self.replicas > 1 else None
        for module, objective, optimizer in zip(self.modules, self.objectives, self.optimizers, strict=True):
            state, one = local_step(
                module, objective, optimizer, state, images, message.y, clip_norm=self.clip_norm, share=average
            )
            totals.append(one)
        if self.sender is not None:
            self.sender.send(Message(state, message.images, message.y, message.whole))
        return torch.stack(totals)

    def _average(self, samples: int, whole: int, optimizer: Optimizer) -> None:
        """Gradients of the replicas, each of the mean over its share, become that of the mean over the batch."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) * (samples / whole)
        try:
            distributed.all_reduce(flat, group=self.group)
        except RuntimeError as error:
            raise WorkerLostError(f"a replica of {self.name(self.rank_group)} is gone ({error})") from error
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _save(self) -> None:
        """A checkpoint of each module after an epoch; the oldest go."""
        if self.replicas > 1:
            for module in self.modules:
                for buffer in module.buffers():
                    distributed.broadcast(buffer, self.rank_group * self.replicas, group=self.group)
        if self.checkpoints is None or self.replica:
            return
        for i, k in enumerate(self.own):
            state = {name: one.state_dict() for name, one in self._parts(i).items()}
            rows = json.dumps([row for row in self.rows if row["module"] == k + 1])
            self.checkpoints.save(k, state | {"rows": rows, "epoch": self.epoch})
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
            check_precision(self.modules[i], state["module"])
            for name, one in self._parts(i).items():
                one.load_state_dict(state[name])
            self.rows += json.loads(state["rows"])
        self.rows.sort(key=_order)

    def _parts(self, i: int) -> dict[str, Any]:
        """What a checkpoint of a module holds the state of."""
        return {"module": self.modules[i], "optimizer": self.optimizers[i], "objective": self.objectives[i]}

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


def check_apart(network: ModuleWise, owned: Sequence[range]) -> None:
    """That no parameter is trained by two processes.

    Raises:
        ValueError: modules of two share one.
    """
    owners = [process for process, own in enumerate(owned) for _ in own]
    if shared := shared_parameter(network.modules_in_order, owners):
        raise ValueError(
            f"modules of different processes must not share parameters, but module {shared[1] + 1} shares its "
            f"{shared[2]}: one head for all modules takes one process (fit_modules)"
        )


@contextmanager
def _stopping(worker: _Worker) -> Iterator[None]:
    """SIGTERM, by which torchrun ends a group of which one process has died, ends the training with a clear error."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise WorkerLostError(
            f"{worker.name(worker.rank_group)} was told to end after {worker.epoch} epochs: another process of the "
            "group has died, or the run was stopped; the checkpoints stand"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the error is to be told before the process ends
        raise
    signal.signal(signal.SIGTERM, before)
