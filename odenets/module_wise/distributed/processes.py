"""Modules in different processes, each training on the newest batch that the module before it has produced."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError, WorkerLostError
from odenets.modes import inputs_for, to_training_mode, total_dtype
from odenets.module_wise.distributed.buffers import Buffer, Message, Receiver, Sender
from odenets.module_wise.modules import ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, objectives_of
from odenets.module_wise.partition import even
from odenets.module_wise.steps import local_step
from odenets.training.data import Batches
from odenets.training.runs import Run
from odenets.training.state import check_optimizer, check_precision

__all__ = ["WorkerLostError", "fit_in_processes"]


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
        batches: training data.
        epochs: how many; each module takes ``epochs * len(batches)`` steps.
        optimizer: makes the optimizer of one module from its parameters.
        objective: makes the objective of each module; cross-entropy alone if not given.
        buffer: batches between two processes. With 1 each module takes every batch once and in order: the losses are
            those of the parallel schedule in one process, and the slowest process sets the pace. With more nobody
            waits: a module that is fast trains again on what it has, one that is slow leaves batches out, and ends on
            the last ones once those before it are done.
        replicas: processes per group of modules; each takes its share of every batch, and their gradients are averaged.
        clip_norm: largest norm of a module's gradient.
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
    stages = world // replicas
    if stages > network.K:
        raise ValueError(f"{stages} processes with modules of their own need as many modules, got {network.K}")
    smallest = len(batches.data) % batches.size or min(batches.size, len(batches.data))
    if smallest < 2 * replicas:
        raise ValueError(
            f"batches must hold at least {2 * replicas} samples, two per replica, the last holds {smallest}"
        )
    worker = _Worker(
        network, batches, epochs, optimizer, objective or greedy(), buffer, replicas, clip_norm, run, timeout, device
    )
    with _stopping(worker):
        worker.train()
    return _gather(network, worker)


class _Worker:
    """The modules of one process, and its neighbors."""

    def __init__(
        self,
        network: ModuleWise,
        batches: Batches,
        epochs: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        objective: ModuleObjective,
        buffer: int,
        replicas: int,
        clip_norm: float | None,
        run: Run | None,
        timeout: float,
        device: torch.device | str,
    ) -> None:
        self.network, self.batches, self.epochs, self.run = network, batches, epochs, run
        self.clip_norm, self.timeout, self.places, self.replicas = clip_norm, timeout, buffer, replicas
        self.device = torch.device(device)
        rank, world = distributed.get_rank(), distributed.get_world_size()
        self.stage, self.replica, self.stages = rank // replicas, rank % replicas, world // replicas
        ends = [0, *even(network.K, self.stages)]
        self.owned = [range(a, b) for a, b in pairwise(ends)]
        self.own = self.owned[self.stage]
        _check_apart(network, self.owned)
        self.modules = [network.modules_in_order[k].to(self.device) for k in self.own]
        self.optimizers = [optimizer(module.parameters()) for module in self.modules]
        for made, module in zip(self.optimizers, self.modules, strict=True):
            check_optimizer(made, module)
        self.objectives = [made.to(self.device) for made in objectives_of(objective, self.own, network.K)]
        self.with_images = any(module.local_loss is not None for module in network.modules_in_order)
        self.rows: list[dict[str, Any]] = []
        self.epoch = 0
        self._make_groups()

    def _make_groups(self) -> None:
        """Groups of replicas, and of neighbors; every process makes all of them, in one order."""
        for stage in range(self.stages):
            group: Any = distributed.new_group([stage * self.replicas + r for r in range(self.replicas)])
            if stage == self.stage:
                self.group: Any = group
        self.receiver: Receiver | None = None
        self.sender: Sender | None = None
        for stage in range(self.stages - 1):
            for r in range(self.replicas):
                one, other = stage * self.replicas + r, (stage + 1) * self.replicas + r
                group = distributed.new_group([one, other])
                where = self.device if distributed.get_backend() == "nccl" else torch.device("cpu")
                if (self.stage, self.replica) == (stage, r):
                    self.sender = Sender(other, group, where)
                if (self.stage, self.replica) == (stage + 1, r):
                    self.receiver = Receiver(one, group, where)
        for objective in self.objectives:
            objective.group = self.group

    def name(self, stage: int) -> str:
        """A process, as errors call it."""
        first, last = self.owned[stage][0] + 1, self.owned[stage][-1] + 1
        modules = f"module {first}" if first == last else f"modules {first} to {last}"
        return f"the process of {modules} (rank {stage * self.replicas + self.replica})"

    def train(self) -> None:
        """All epochs, from where the checkpoints stand."""
        self._resume()
        to_training_mode(self.network)
        incoming = None
        if self.receiver is not None:
            incoming = Buffer(self.places, self.timeout, self.name(self.stage - 1))
            self.receiver.start(incoming)
        if self.sender is not None:
            self.sender.start(self.places == 1, self.timeout, self.name(self.stage + 1))
        started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        while self.epoch < self.epochs:
            totals, seen = torch.zeros(len(self.own), 2, dtype=total_dtype(self.device), device=self.device), 0
            for message in self._messages(incoming):
                totals += self._step(message)
                seen += len(message.y)
            loss, accuracy = (totals / seen).T.tolist()
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
            mine = slice(self.replica, None, self.replicas)
            x, whole = inputs_for(self.modules[0], x[mine]).to(self.device), len(y)
            yield Message(x, x if self.with_images else x.new_empty(0), y[mine].to(self.device), whole)

    def _step(self, message: Message) -> Tensor:
        """A step of every module of this process, and the state behind them sent on."""
        state, found = message.state, []
        images = message.images if self.with_images else message.state
        for module, objective, optimizer in zip(self.modules, self.objectives, self.optimizers, strict=True):

            def share(optimizer: Optimizer) -> None:
                self._average(optimizer, len(message.y), message.whole)

            state, values = local_step(
                module, objective, optimizer, state, images, message.y, clip_norm=self.clip_norm,
                share=share if self.replicas > 1 else None,
            )  # fmt: skip
            found.append(values)
        if self.sender is not None:
            self.sender.send(Message(state, message.images, message.y, message.whole))
        return torch.stack(found)

    def _average(self, optimizer: Optimizer, samples: int, whole: int) -> None:
        """Gradients of the replicas, each of the mean over its share, become that of the mean over the batch."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) * (samples / whole)
        try:
            distributed.all_reduce(flat, group=self.group)
        except RuntimeError as error:
            raise WorkerLostError(f"a replica of {self.name(self.stage)} is gone ({error})") from error
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """A checkpoint of each module after an epoch; the oldest go."""
        if self.replicas > 1:
            for module in self.modules:
                for buffer in module.buffers():
                    distributed.broadcast(buffer, self.stage * self.replicas, group=self.group)
        if self.run is None or self.replica:
            return
        for i, k in enumerate(self.own):
            state = {
                "module": self.modules[i].state_dict(),
                "optimizer": self.optimizers[i].state_dict(),
                "objective": self.objectives[i].state_dict(),
                "rows": json.dumps([row for row in self.rows if row["module"] == k + 1]),
                "epoch": self.epoch,
            }
            self.run.save_state(state, f"module{k + 1}-epoch{self.epoch}.pt")
        # however far apart they are, all keep the newest epoch that all have completed
        common = min(max(_checkpoints(self.run.folder, k), default=0) for k in range(self.network.K))
        for k in self.own:
            for epoch, path in _checkpoints(self.run.folder, k).items():
                if epoch < common:
                    path.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Take up the newest epoch that all modules have completed."""
        if self.run is None:
            return
        found = [set(_checkpoints(self.run.folder, k)) for k in range(self.network.K)]
        common = set.intersection(*found)
        if all(found) and not common:
            raise ValueError(f"the modules' checkpoints in {str(self.run.folder)!r} have no epoch in common")
        newest = torch.tensor(max(common, default=0), device=self.device)
        distributed.broadcast(newest, 0)
        self.epoch = int(newest)
        if not self.epoch:
            return
        for i, k in enumerate(self.own):
            state = self.run.load_state(f"module{k + 1}-epoch{self.epoch}.pt")
            assert state is not None
            check_precision(self.modules[i], state["module"])
            self.modules[i].load_state_dict(state["module"])
            self.optimizers[i].load_state_dict(state["optimizer"])
            self.objectives[i].load_state_dict(state["objective"])
            self.rows += json.loads(state["rows"])
        self.rows.sort(key=lambda row: (row["epoch"], row["module"]))


def _check_apart(network: ModuleWise, owned: list[range]) -> None:
    """That no parameter is trained by two processes."""
    owner: dict[int, int] = {}
    for stage, own in enumerate(owned):
        for k in own:
            for name, p in network.modules_in_order[k].named_parameters():
                if owner.setdefault(id(p), stage) != stage:
                    raise ValueError(
                        f"modules of different processes must not share parameters, but module {k + 1} shares its "
                        f"{name}: one head for all modules takes one process (fit_modules)"
                    )


def _checkpoints(folder: Path, k: int) -> dict[int, Path]:
    """The checkpoints of a module by epoch."""
    found = {}
    for path in folder.glob(f"module{k + 1}-epoch*.pt"):
        if match := re.fullmatch(rf"module{k + 1}-epoch(\d+)\.pt", path.name):
            found[int(match[1])] = path
    return found


def _gather(network: ModuleWise, worker: _Worker) -> list[dict[str, Any]]:
    """All weights and metrics in all processes."""
    distributed.barrier()
    for stage, own in enumerate(worker.owned):
        for k in own:
            for value in network.modules_in_order[k].state_dict().values():
                if isinstance(value, Tensor):
                    here = value.to(worker.device)
                    distributed.broadcast(here, stage * worker.replicas)
                    value.copy_(here)
    rows: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, worker.rows)
    everything = [row for stage in range(worker.stages) for row in rows[stage * worker.replicas]]
    return sorted(everything, key=lambda row: (row["epoch"], row["module"]))


@contextmanager
def _stopping(worker: _Worker) -> Iterator[None]:
    """SIGTERM, by which torchrun ends a group of which one process has died, ends the training with a clear error."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise WorkerLostError(
            f"{worker.name(worker.stage)} was told to end after {worker.epoch} epochs: another process of the group "
            "has died, or the run was stopped; the checkpoints stand"
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
