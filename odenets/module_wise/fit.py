"""Training modules: in which order, one batch or many epochs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odenets.errors import check_count, renamed
from odenets.modes import to_training_mode
from odenets.module_wise.activation_cache import ActivationCache
from odenets.module_wise.loop import ModuleLoop, has_batch_norm
from odenets.module_wise.modules import ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, objectives_of
from odenets.module_wise.partition import Cuttable, shared_parameter
from odenets.module_wise.plan import Order, Plan
from odenets.module_wise.training import ModuleTraining
from odenets.training.checks import check_network, other_names
from odenets.training.data import Batches
from odenets.training.descriptions import described_data, described_settings, warn_of_changes
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.optimization import (
    Interval,
    MakeLRScheduler,
    MakeOptimizer,
    check_optimizer,
    make_lr_scheduler,
    make_optimizer,
)
from odenets.training.progress import progress_bar
from odenets.training.runs import STATE, Run, check_run
from odenets.training.sources import Collate, Source
from odenets.training.steps import check_gradients

__all__ = ["OTHER_NAMES", "check_split", "fit_modules"]

OTHER_NAMES = {
    **other_names("network", "batches", "epochs", "lr_scheduler", "optimizer", "metric", "collate", "clip_norm"),
    **dict.fromkeys(("accelerator", "devices"), "device"),
    **dict.fromkeys(
        ("criterion", "loss", "loss_fn", "loss_function"), "objective, as trgl(1.0, task=lambda: Task(F.mse_loss))"
    ),
    "precision": "network.to(dtype), in which modules train",
    "schedule": "order",
}
"""Arguments of trainings of modules by the names that they have in other libraries, or had."""


@renamed(
    **OTHER_NAMES | other_names("validation", "progress"),
    **dict.fromkeys(("callbacks", "early_stopping"), "report, which is called after each epoch"),
)
def fit_modules(
    network: ModuleWise,
    batches: Iterable[Any],
    *,
    epochs: int | Sequence[int],
    optimizer: MakeOptimizer,
    lr_scheduler: MakeLRScheduler | None = None,
    lr_interval: Interval = "epoch",
    objective: ModuleObjective | None = None,
    order: Order = "parallel",
    laps: int = 1,
    metric: MetricFunction | None = None,
    validation: Iterable[Any] | None = None,
    collate: Collate | None = None,
    cache: str | Path | None = None,
    views: int = 1,
    offload: bool = False,
    clip_norm: float | None = None,
    run: Run | None = None,
    checkpoint: str = STATE,
    progress: str | None = None,
    report: Callable[[int], object] = lambda n: None,
    device: torch.device | str = "cpu",
) -> ModuleTraining:
    """Train the modules of a network, each by its own loss; no gradient crosses from one to another.

    Arguments are those of :func:`odenets.training.fit` under the same names, as far as modules have them. Modes are
    those of fit too: what is in eval mode within a network in training mode stays so.

    Args:
        network: made by :func:`~odenets.module_wise.split_into_modules`; trained in place, on the device. Inputs are
            taken to its dtype.
        batches: training data, any iterable of batches ``(inputs, targets)``, where inputs are a tensor x or a tuple
            ``(x, *args)`` with what the velocity fields of all modules get besides. Epoch e of a module draws the same
            :class:`~odenets.training.Batches` in every run; a DataLoader draws its next epoch.
        epochs: number of epochs; one number per module, and per lap, where they are trained one after another, as
            [K24] trains module k for ``50 + 10 k``.
        optimizer: makes the optimizer of one module from the list of its parameters, as
            ``partial(torch.optim.SGD, lr=0.1)`` does.
        lr_scheduler: makes a scheduler of learning rates from the optimizer of one module, whose epochs or steps it
            counts. ReduceLROnPlateau reads the module's validation loss, or without validation its training loss.
        lr_interval: when a scheduler takes a step, after each "epoch" or after each "step" of the optimizer.
        objective: makes the objective of each module from its number, from 0, and how many there are: :func:`trgl`,
            :func:`trgl_multipliers`, or a function of one's own; cross-entropy alone (:func:`greedy`) if not given.
        order: "parallel", on each batch every module takes a step; "sequential", a module is trained to its end
            before the next, those before it in eval mode; "end-to-end", the last head alone by backpropagation through
            everything, and "checkpointed", the same with only the states between modules kept.
        laps: of the sequential order: how often it goes over the modules. Optimizers, schedulers and multipliers go on
            from lap to lap.
        metric: ``(output, targets)`` to a number, the mean of the batch, or to a number per sample, ``(B,)``; or an
            object with ``reset``, ``update`` and ``compute``, as torchmetrics has them. The rows hold it under its
            name, ``train_accuracy``, ``validation_accuracy``. The accuracy if not given, NaN where a head returns no
            logits ``(B, classes)``; none for a :class:`~odenets.training.Task`.
        validation: data as ``batches``, on which loss and metric are measured, of all modules after each parallel epoch
            and of one at the end of each visit, or after each of its epochs where ReduceLROnPlateau reads them.
        collate: makes ``(inputs, targets)`` of a batch, of training and validation, that is no such pair.
        cache: where the sequential order keeps the states before the module in training: "memory", a folder, whose
            files go at the end, or None to compute them for every batch. It is for
            :class:`~odenets.training.Batches`, whose samples have numbers, without a ``collate``.
        views: with a cache of Batches that crop or mirror: how many views of each image are drawn, once; epoch e takes
            view ``e mod views``, since a state cannot be cropped or mirrored anew.
        offload: with a cache and a device: keep only the module in training there.
        clip_norm: largest norm of the gradient of a module's parameters together; a larger one is scaled down to this.
        run: holds the resume state called ``checkpoint``; where there is one the training goes on from it and ends with
            the same weights to the last bit; with a DataLoader too, if its sampler is seeded by a generator.
        checkpoint: name of the resume state in the run's folder.
        progress: label of a progress bar; none without it.
        report: called with 1 after each epoch.
        device: where it computes.

    Returns:
        The finished training, whose ``rows`` hold a dictionary per epoch and module with ``lap``, ``module`` (from 1),
        ``epoch``, ``train_loss``, ``train_accuracy`` (or the metric's name), ``validation_loss`` and
        ``validation_accuracy`` (None without validation), ``learning_rate``, what the objective adds, ``seconds``.

    Raises:
        DivergedError: a loss or a weight is not finite; the last checkpoint stands.
        TypeError: a network that is not in modules, no iterable of batches, an optimizer or a scheduler where a
            function that makes one is wanted, no objectives, an output that they cannot read, or a metric that returns
            no number.
        ValueError: arguments out of range, or that do nothing without another, a multiplier that modules share, a batch
            of one sample, which batch norms cannot take, a cache for modules that share weights or for other data than
            Batches, an optimizer without its module's parameters, or a checkpoint that is damaged, of another
            order, solver, precision, optimizer or scheduler, or of a sequential training with other epochs or laps.

    Warns:
        UserWarning: a checkpoint was begun with other data or settings, as :func:`odenets.training.fit` says.
    """
    check_split(network)
    check_run(run, checkpoint)
    check_gradients()
    check_count("views", views, 1)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    plan = Plan.of(network.K, epochs, order, laps)
    source = Source.of(batches, collate)
    held_out = None if validation is None else Source.of(validation, collate, "validation")
    _check_data(network, source)
    if cache is None and (offload or views != 1):
        what = "offload needs a cache" if offload else f"views are of a cache, got views={views} without one"
        raise ValueError(f'{what}: every batch passes all modules before, cache="memory" keeps their states')
    if cache is not None:
        _check_cache(network, plan, source, cache, views)
    network.to(device)
    optimizers = [make_optimizer(optimizer, unit.parameters()) for unit in plan.units(network)]
    for k, (one, unit) in enumerate(zip(optimizers, plan.units(network), strict=True)):
        if order != "sequential" or plan.epochs[k]:
            check_optimizer(one, unit)
    objectives = objectives_of(objective or greedy(), [network.K - 1] if plan.whole else range(network.K), network.K)
    schedulers = [each for one in optimizers if (each := make_lr_scheduler(lr_scheduler, one, lr_interval))]
    training = ModuleTraining(network, nn.ModuleList(objectives).to(device), optimizers, schedulers)
    measured = Metric.of(metric, objectives[0])
    described: dict[str, Any] = {}
    if run is not None:
        described |= described_settings(network, objectives[0], measured, lr_interval=lr_interval, clip_norm=clip_norm)
        described |= described_data(batches, "batches") | described_data(validation, "validation")
    state = run.load_state(checkpoint) if run else None
    if state is not None:
        plan.check_state(state)
        warn_of_changes(state.get("described", {}), described, f"checkpoint {run and run.folder / checkpoint}: ", 3)
        source.load_state_dict(state["batches"])
        training.load_state_dict(state)
    for data in (source, held_out):
        if data is not None:
            data.move_to(network)
    states = _states(source, cache, views)
    loop = ModuleLoop(
        training=training, plan=plan, source=source, validation=held_out, metric=measured, lr_interval=lr_interval,
        states=states, offload=offload, clip_norm=clip_norm, device=torch.device(device),
    )  # fmt: skip
    with closing(states) if states else nullcontext(), progress_bar(progress, len(plan.visits), training.done) as show:
        for visit in plan.visits[training.done :]:
            loop.run(visit)
            if run is not None:
                more = {"batches": source.state_dict(), "described": described}
                run.save_state(training.state_dict() | plan.state_dict() | more, checkpoint)
                run.log(training.rows)
            report(1)
            show(training.rows[-1])
    network.to(device)
    to_training_mode(network, loop.frozen)
    return training


def check_split(network: Any) -> None:
    """That a network is one in modules.

    Raises:
        TypeError: it is another.
    """
    check_network(network, "fit_modules(network, batches, ...)")
    if not isinstance(network, ModuleWise):
        adapted = "network" if isinstance(network, Cuttable) else "odenets.adapt(network)"
        raise TypeError(
            f"network must be one in modules, got {type(network).__name__}: pass "
            f"odenets.module_wise.split_into_modules({adapted}, K, x)"
        )


def _check_data(network: ModuleWise, source: Source) -> None:
    """That no batch of Batches is too small; those of other data are looked at as they come."""
    if isinstance(source.data, Batches) and source.data.smallest < 2 and has_batch_norm(network):
        raise ValueError(
            f"batches must hold at least 2 samples for batch norm, the last one holds {source.data.smallest}"
        )


def _check_cache(network: ModuleWise, plan: Plan, source: Source, cache: Any, views: int) -> None:
    """That the states before a module can be kept."""
    if not isinstance(cache, str | Path):
        raise TypeError(f'cache must be "memory" or a folder, got {cache!r}')
    if plan.order != "sequential":
        raise ValueError("cache is for the sequential order, whose earlier modules stand still")
    if not isinstance(source.data, Batches):
        raise ValueError(
            f"cache is for odenets.training.Batches, whose samples have numbers, got {type(source.data).__name__}: "
            "pass Batches((x, y), size), or cache=None, which computes the states anew"
        )
    if source.collate is not None:
        raise ValueError(
            "cache is for Batches as they are, got a collate: give them the samples that it makes, or cache=None"
        )
    if views > 1 and not source.data.augmented:
        raise ValueError(
            f"views are of augmented images, got views={views} of Batches that draw the same images in every epoch: "
            "leave views out, or give Batches crop or flip"
        )
    if shared := shared_parameter([m.part for m in network.modules_in_order], range(plan.K)):
        first, second, name = shared
        raise ValueError(
            f"cache is for modules that share no weights, but modules {first + 1} and {second + 1} share {name}: "
            "cache=None computes the states anew"
        )


def _states(source: Source, cache: str | Path | None, views: int) -> ActivationCache | None:
    if cache is None:
        return None
    assert isinstance(source.data, Batches)  # as _check_cache says
    return ActivationCache(source.data, views, None if cache == "memory" else Path(cache))
