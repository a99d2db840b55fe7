"""Modules in different processes, each training on the newest batch that the module before it has produced."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import distributed

from odenets.errors import WorkerLostError, check_count, renamed
from odenets.module_wise.distributed.checkpoints import ModuleCheckpoints
from odenets.module_wise.distributed.worker import Worker
from odenets.module_wise.fit import OTHER_NAMES, check_split
from odenets.module_wise.modules import ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy
from odenets.module_wise.partition import even, shared_parameter
from odenets.training.data import Batches
from odenets.training.metrics import MetricFunction
from odenets.training.optimization import Interval, MakeLRScheduler, MakeOptimizer
from odenets.training.runs import Run, check_run
from odenets.training.sources import Collate, Source

__all__ = ["check_apart", "fit_in_processes"]


@renamed(**OTHER_NAMES | {"schedule": "order, of fit_modules: processes train in parallel"})
def fit_in_processes(
    network: ModuleWise,
    batches: Iterable[Any],
    *,
    epochs: int,
    optimizer: MakeOptimizer,
    lr_scheduler: MakeLRScheduler | None = None,
    lr_interval: Interval = "epoch",
    objective: ModuleObjective | None = None,
    metric: MetricFunction | None = None,
    collate: Collate | None = None,
    buffer: int = 1,
    replicas: int = 1,
    clip_norm: float | None = None,
    run: Run | None = None,
    timeout: float = 600.0,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Train modules in parallel, each in a process of its own: none waits for another's forward or backward pass.

    Call it in every process of a group that ``torchrun`` has launched, with the same network, data and arguments. Each
    process trains some consecutive modules, and sends the states behind them on. A script for
    ``torchrun --nproc-per-node 2``::

        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)  # the same weights in all processes
        network = split_into_modules(resnet110(), 2, x[:2])
        rows = fit_in_processes(network, Batches((x, y), 100, seed=0), epochs=10, optimizer=partial(SGD, lr=0.1))

    Args:
        network: with the same weights in all processes; in the end all hold the trained weights of all modules. Inputs
            are taken to its dtype; modes are those of :func:`odenets.training.fit`.
        batches: training data, any iterable of batches that knows how many there are, as in
            :func:`~odenets.module_wise.fit_modules`; drawn by the processes of the first modules alone. Inputs, what
            conditions the fields, and targets are tensors.
        epochs: number of epochs; each module takes ``epochs * len(batches)`` steps.
        optimizer, lr_scheduler, lr_interval, objective, metric, collate, clip_norm: as there; ReduceLROnPlateau reads
            the module's training loss.
        buffer: batches between two processes. With 1 each module takes every batch once and in order: the losses are
            those of the parallel order in one process, and the slowest process sets the pace. With more nobody
            waits: a module that is fast trains again on what it has, one that is slow leaves batches out, and ends on
            the last ones once those before it are done.
        replicas: processes per group of modules; each takes its share of every batch, and their gradients are averaged.
            They draw the same batches: a DataLoader that shuffles is seeded.
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
        TypeError: a network that is not in modules, epochs, buffer or replicas that are no whole number, or what
            :func:`~odenets.module_wise.fit_modules` raises; inputs or targets that are no tensors.
        ValueError: batches of unknown number, more processes than modules, processes that do not divide into replicas,
            epochs below 0, a buffer or replicas below 1, a clip_norm that is not positive, a batch too small, replicas
            with different batches, modules of different processes that share parameters, or checkpoints of no common
            epoch.
    """
    check_split(network)
    check_run(run)
    for name, value, least in (("epochs", epochs, 0), ("buffer", buffer, 1), ("replicas", replicas, 1)):
        check_count(name, value, least)
    source = Source.of(batches, collate)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if (length := source.length) is None:
        raise ValueError(
            f"batches must know how many there are, which every process counts, got {type(batches).__name__} without a "
            "length: pass a list, or a DataLoader of a dataset that has one; fit_modules takes any in one process"
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "no process group: launch with torchrun and call torch.distributed.init_process_group('gloo'), or 'nccl', "
            "first"
        )
    world = distributed.get_world_size()
    if world % replicas:
        raise ValueError(f"replicas must divide the number of processes, {world}, got {replicas}")
    groups = world // replicas
    if groups > network.K:
        raise ValueError(f"{groups} processes with modules of their own need as many modules, got {network.K}")
    if isinstance(batches, Batches) and batches.smallest < 2 * replicas:
        raise ValueError(
            f"batches must hold at least {2 * replicas} samples, two per replica, the last holds {batches.smallest}"
        )
    check_apart(network, [range(a, b) for a, b in pairwise([0, *even(network.K, groups)])])
    worker = Worker(
        network=network, source=source, length=length, epochs=epochs, optimizer=optimizer, lr_scheduler=lr_scheduler,
        lr_interval=lr_interval, objective=objective or greedy(), metric=metric, places=buffer, replicas=replicas,
        clip_norm=clip_norm, timeout=timeout, device=torch.device(device),
        checkpoints=None if run is None else ModuleCheckpoints(run, network.K),
    )  # fmt: skip
    with _stopping(worker):
        worker.train()
    return worker.gather()


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
def _stopping(worker: Worker) -> Iterator[None]:
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
