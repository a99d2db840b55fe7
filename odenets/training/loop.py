"""The one training loop: an objective on a network's output and records, on Lightning Fabric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odenets.checkpoints import restore_structure, warn_of_structure
from odenets.errors import needs, renamed
from odenets.inputs import call
from odenets.modes import dtype_of, evaluating, inputs_for, keeping_state, to_training_mode
from odenets.recording import Recorder
from odenets.training.callbacks import Callbacks
from odenets.training.checks import check_arguments, check_objective, check_recorder, other_names
from odenets.training.data import Batches
from odenets.training.descriptions import described_data, described_settings, warn_of_changes
from odenets.training.epochs import CONVERTING, Epochs, Options
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.notes import BatchNotes
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.optimization import (
    Interval,
    MakeLRScheduler,
    MakeOptimizer,
    make_lr_scheduler,
    make_optimizer,
)
from odenets.training.processes import Processes
from odenets.training.progress import log_row, progress_bar
from odenets.training.runs import STATE, Run, check_run
from odenets.training.sources import Collate, Source, part
from odenets.training.state import Training
from odenets.training.steps import check_gradients, set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["fit"]


@renamed(
    **other_names(
        "network", "batches", "epochs", "objective", "lr_scheduler", "optimizer", "metric", "validation", "collate",
        "callbacks", "clip_norm", "accumulate", "progress", "fabric",
    )
)  # fmt: skip
def fit(
    network: Recorder,
    batches: Iterable[Any],
    *,
    epochs: int,
    optimizer: MakeOptimizer,
    lr_scheduler: MakeLRScheduler | None = None,
    lr_interval: Interval = "epoch",
    objective: Objective | None = None,
    metric: MetricFunction | None = None,
    validation: Iterable[Any] | None = None,
    collate: Collate | None = None,
    callbacks: Sequence[Any] = (),
    loss_limit: float = math.inf,
    run: Run | None = None,
    checkpoint: str = STATE,
    clip_norm: float | None = None,
    accumulate: int = 1,
    compile: bool = False,
    progress: str | None = None,
    fabric: Fabric | None = None,
) -> Training:
    """Train a network, by an objective on its output and on what is measured on its steps.

    It takes what a PyTorch user has: a DataLoader or tensors, any optimizer and scheduler of torch, a loss as
    ``Task(F.mse_loss)``. For a training loop of one's own see :class:`~odenets.training.Objective`; for a network in
    modules :func:`odenets.module_wise.fit_modules`; for many small networks :func:`~odenets.training.fit_instances`.

    Where the network is in training mode, modules in it that are in eval mode stay so: a frozen batch norm keeps its
    statistics. A network in eval mode, or all of whose parameters are in parts that are, is put in training mode as a
    whole. In the end it is in training mode, and no gradients are left.

    Args:
        network: a module that records its steps: a Network, a Flow, a NeuralODE, or :func:`odenets.adapt` of any
            residual network. Trained in place, moved to the fabric's device.
        batches: training data: :class:`Batches` in memory, whose epoch e is the same in every run, a DataLoader, a
            list, or any other iterable of batches ``(inputs, targets)``. Inputs are a tensor ``(B, *S)``, a tuple
            ``(x, *args)`` or a mapping of what the network takes by keyword, and are taken to its device and, where
            they are floating, its dtype; targets are what the objective reads. An
            iterator has one epoch.
        epochs: number of epochs, of all that the run has had; 0 or more.
        optimizer: makes the optimizer from the list of the network's parameters, as
            ``partial(torch.optim.SGD, lr=0.1)`` does. A warning names what requires a gradient and is not in it.
        lr_scheduler: makes a scheduler of learning rates from the optimizer, as
            ``partial(torch.optim.lr_scheduler.StepLR, step_size=30)`` does. ReduceLROnPlateau reads the validation
            loss, or without validation the training loss.
        lr_interval: when the scheduler takes a step, after each "epoch" or after each "step" of the optimizer.
        objective: what is minimized: :class:`CrossEntropy` if not given, ``Task(F.mse_loss)`` for any function of
            output and targets, or :class:`odenets.least_action.LeastAction`.
        metric: ``(output, targets)`` to a number, the mean of the batch, or to a number per sample, ``(B,)``; the rows
            hold its means over the samples under its ``__name__``. Or an object with ``reset``, ``update`` and
            ``compute``, as torchmetrics has them, which computes of all samples of an epoch together and is named by
            its class. The accuracy if not given, NaN where the network returns no logits ``(B, classes)``; none for a
            :class:`~odenets.training.Task`.
        validation: data as ``batches``, on which the objective's ``validation_loss`` and the metric are measured after
            every epoch. Every process measures all of it, unless it has a distributed sampler.
        collate: makes ``(inputs, targets)`` of a batch, of training and validation, that is no such pair.
        callbacks: called between epochs: objects with some of the methods of a :class:`~odenets.training.Callback`,
            and functions ``(training, row)``.
        loss_limit: an epoch whose mean training loss is above this has diverged, like one after which a loss, of
            training or validation, or a weight is not finite.
        run: holds the resume state called ``checkpoint``; where there is one the training goes on from it and ends, on
            one device, with the weights of a training that never stopped, to the last bit. That holds of a DataLoader
            too, whose samplers draw from torch's, Python's or NumPy's global generator, or from one that it or its
            sampler holds as ``generator``; not where ``persistent_workers`` draw at random, nor for samplers with a
            state of another kind. Of several processes only the first needs a run.
        checkpoint: name of the resume state in the run's folder.
        clip_norm: largest norm of the gradient of all parameters together; a larger one is scaled down to this.
        accumulate: parts in which a batch comes, one after the other, for less memory: the gradient is that of the
            whole batch, but for batch norms, which see a part at a time, and for what is no mean over samples: the cost
            "norm", cross-entropy with labels -100, and a lambda, which grows with the loss of one part.
        compile: train through ``torch.compile(network.record)``.
        progress: label of a progress bar; none without it.
        fabric: Lightning Fabric; one CPU if not given. Each row's numbers go to its loggers. Its
            ``precision="64-true"``, ``"bf16-true"`` or ``"16-true"`` converts the network, ``"32-true"`` takes it in
            the dtype it has; losses are in float32 at least. ``"bf16-mixed"`` is automatic mixed precision, in which
            weights, outputs and measures stay in float32.
            Launched on several processes (``torchrun``), each takes its share of every batch in memory or in a list; a
            DataLoader gets Fabric's distributed sampler, unless it has one, and each process its batches; what else
            yields batches is each process' own. Gradients are weighted by the numbers of samples: the result is that of
            one process with the batches of all, but for batch norms, which see their own, and for a cost that is no
            mean over samples. A process that runs out of batches ends the epoch for all, with a warning. After every
            epoch all go on with the first one's buffers.
            Its ModelParallelStrategy may shard what it sets up, a :class:`~odenets.recording.Recording` of the network
            (FSDP2): checkpoints hold whole tensors, and callbacks cannot edit the network.

    Returns:
        The finished :class:`~odenets.training.Training`, whose ``rows`` hold a dictionary per epoch with ``epoch``,
        ``train_loss``, ``train_accuracy`` (or the metric's name), ``learning_rate``, ``depth``, ``h``, ``parameters``,
        ``validation_loss`` and ``validation_accuracy`` with validation, what objective and callbacks add,
        ``evaluations`` and ``check_evaluations`` (field evaluations, summed over samples, so far), ``seconds``.

    Raises:
        DivergedError: a loss or a weight is not finite, or the loss above ``loss_limit``, and no callback recovers.
        TypeError: a network that records nothing or consists of modules, no objective, an optimizer that is none of
            parameters, data that is no iterable of batches, a metric that returns no number, or an output that the
            objective, or with validation the accuracy, cannot read.
        ValueError: arguments out of range, or that do nothing without another, no batch, a batch with fewer samples
            than there are processes, an optimizer without the network's parameters, mixed precision of a float64
            network, or a checkpoint that is damaged, or of another precision, solver, optimizer, scheduler or other
            callbacks.
        ModuleNotFoundError: lightning-fabric is not installed: ``pip install 'odenets[training]'``.

    Warns:
        UserWarning: a checkpoint was begun with other data, settings, depth or step sizes: what differs is named. Of
            data its kind, lengths and some numbers of tensors in memory are compared, so that all is not read.

    >>> from functools import partial
    >>> from odenets.models import points_network
    >>> from odenets.training import Batches, fit, points
    >>> network, adam = points_network(depth=2), partial(torch.optim.Adam, lr=0.01)
    >>> batches = Batches(points("moons", 60, seed=0), 20, seed=0)
    >>> training = fit(network, batches, epochs=2, optimizer=adam)
    >>> [row["epoch"] for row in training.rows]
    [1, 2]
    >>> training.evaluations  # 2 epochs x 60 samples x 6 stages
    720
    """
    module = check_recorder(network)
    objective = CrossEntropy() if objective is None else check_objective(objective)
    check_arguments(epochs=epochs, clip_norm=clip_norm, accumulate=accumulate, progress=progress, loss_limit=loss_limit)
    check_gradients()
    check_run(run)
    fabric = fabric or _one_processor()
    options = Options(
        metric=Metric.of(metric, objective),
        lr_interval=lr_interval,
        loss_limit=float(loss_limit),
        clip_norm=None if clip_norm is None else float(clip_norm),
        accumulate=accumulate,
        compile=compile,
    )
    processes, hooks = Processes(fabric), Callbacks(callbacks)
    if fabric.world_size == 1:  # of several only the first needs a run
        check_run(run, checkpoint)
    source = processes.source(batches, collate, "batches")
    validated = None if validation is None else Source.of(validation, collate, "validation")
    run = run if fabric.is_global_zero else None
    described = _described(module, objective, batches, validation, options) if run else {}
    place = f"checkpoint {run.folder / checkpoint}: " if run else ""
    saved, saves = fabric.broadcast((_load(run, checkpoint), run is not None))
    _check_data(source, validated, epochs - (saved["epoch"] if saved else 0), processes.replicas)

    objective.to(fabric.device)
    module.to(fabric.device, _weights_dtype(fabric, module))
    _materialize(module, source)
    with _named(place):
        if saved is not None:
            if run and not hooks.edit:  # which are there to change it
                warn_of_structure(module, saved["structure"], place, stacklevel=3)
            restore_structure(module, saved["structure"])  # before a strategy shards the parameters
    processes.start_alike(module)
    for data in filter(None, (source, validated)):
        data.move_to(module)
    recording = set_up(fabric, network, objective, compile)
    processes.check_shares(module)
    first = make_optimizer(optimizer, module.parameters())
    training = Training(network, first, make_lr_scheduler(lr_scheduler, first, lr_interval), objective)
    training.precision, training.source, training.callbacks = fabric.strategy.precision, source, hooks
    training.epochs = epochs
    hooks.before_training(training)
    if saved is not None:
        _take_up(training, saved, optimizer, processes, place)
        warn_of_changes(saved.get("described", {}), described, place, stacklevel=3)
        if training.epoch > epochs:
            warnings.warn(f"{place}{training.epoch} epochs are done, got epochs={epochs}: none is added", stacklevel=3)
    parts = {"processes": processes, "recording": recording, "source": source, "validation": validated}
    loop = Epochs(training=training, optimizer=optimizer, options=options, **parts)
    with progress_bar(progress, epochs, training.epoch) as show:
        while training.epoch < epochs and not training.stop:
            if (row := loop.next()) is None:
                continue
            training.stop = any(processes.gathered(training.stop))
            if saves:
                _save(training, processes, run, checkpoint, described)
            log_row(fabric, row)
            show(row)
    hooks.after_training(training)
    to_training_mode(module, loop.frozen)
    training.optimizer.zero_grad()
    return training


def _one_processor() -> Fabric:
    with needs("training"):
        from lightning_fabric import Fabric
    return Fabric(accelerator="cpu", devices=1)


def _check_data(source: Source, validation: Source | None, epochs: int, replicas: int) -> None:
    for data in filter(None, (source, validation)):
        if data.has_one_epoch and epochs > 1:
            raise ValueError(
                f"{data.name} is an iterator ({type(data.data).__name__}), which gives one epoch, got epochs={epochs}: "
                "pass a list or a DataLoader, which begin anew"
            )
    if isinstance(source.data, Batches) and source.data.smallest < replicas:
        raise ValueError(
            f"batches must hold a sample for each of {replicas} processes, got one of {source.data.smallest}: "
            "choose another batch size"
        )


def _weights_dtype(fabric: Fabric, network: nn.Module) -> torch.dtype | None:
    """What the weights are to be converted to before a checkpoint is loaded, if they are."""
    precision, dtype = str(fabric.strategy.precision.precision), dtype_of(network)
    if precision.endswith("mixed") and dtype == torch.float64:
        raise ValueError(
            f"fabric's precision {precision!r} mixes float32 weights with half precision, got a network in float64: "
            'take precision="64-true", or network.float()'
        )
    return CONVERTING.get(precision)


def _materialize(network: nn.Module, source: Source) -> None:
    """Make the parameters that are made from the first input."""
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        first = source.first()
        inputs, _ = part(first, slice(2))
        in_first = BatchNotes(source.name).next(first[0])
        with in_first, torch.no_grad(), keeping_state(network), evaluating(network):
            call(network, inputs_for(network, inputs))


def _load(run: Run | None, checkpoint: str) -> dict[str, Any] | None:
    """The resume state of a run, if there is one."""
    state = run.load_state(checkpoint) if run is not None else None
    if run is not None and state is not None and "processes" not in state:
        raise ValueError(
            f"checkpoint {run.folder / checkpoint} must be one that fit of this version has written: go on with the "
            "version that began it, or begin anew in another folder"
        )
    return state


def _take_up(
    training: Training, saved: dict[str, Any], optimizer: MakeOptimizer, processes: Processes, place: str
) -> None:
    """Go on from a checkpoint, each process from its own random state, and log again what was logged."""
    own = saved.pop("processes")
    state = saved | (own[processes.fabric.global_rank] if len(own) == processes.fabric.world_size else {})
    with _named(place):
        training.load_state_dict(state, optimizer, place)
    for row in training.rows:
        log_row(processes.fabric, row)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the checkpoint in what it does not fit."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error


def _described(
    network: nn.Module, objective: Objective, batches: Any, validation: Any, options: Options
) -> dict[str, Any]:
    """What a training is called with, and what its checkpoints are compared with when it is taken up."""
    own = {name: getattr(options, name) for name in ("lr_interval", "clip_norm", "accumulate")}
    data = described_data(batches, "batches") | described_data(validation, "validation")
    return described_settings(network, objective, options.metric, **own) | data


def _save(
    training: Training, processes: Processes, run: Run | None, checkpoint: str, described: dict[str, Any]
) -> None:
    """Write a checkpoint, to which every process gives its random state, and a sharded one its weights."""
    own = processes.gathered(training.process_state())
    if run is None and not training.sharded:
        return
    state = training.state_dict() | {"processes": own, "described": described}
    if run is not None:
        run.save_state(state, checkpoint)
        run.log(training.rows)
