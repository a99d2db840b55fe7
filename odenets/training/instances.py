"""Many instances of a small network trained together, as one batch of networks, each to the result of its own training.

An average over a hundred seeds is a hundred trainings. One by one they cost a hundred times the overhead of calling
small operations; stacked by ``torch.func``, with a dimension of instances before all parameters, they cost it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from odenets.errors import check_count, renamed
from odenets.inputs import arguments
from odenets.modes import device_of, evaluating, keeping_state
from odenets.network import Network
from odenets.printing import shown
from odenets.training.checks import other_names
from odenets.training.data import Batches, TensorData
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.optimization import Interval, MakeLRScheduler, MakeOptimizer, make_lr_scheduler
from odenets.training.sources import Collate, Source, part
from odenets.training.stacking import Instance, Stack, stacked
from odenets.training.steps import check_gradients

__all__ = ["Instances", "fit_instances"]

Measured = TensorData | tuple[Any, Any]
"""Data on which a metric is measured: in memory, or a pair of inputs and targets, tensors."""


@dataclass(frozen=True)
class Instances:
    """Trained instances, n of them: what :func:`fit_instances` returns.

    Attributes:
        networks: the networks, trained.
        objectives: their objectives, with what they remember.
        epochs: epochs that each was trained for, ``(n,)``.
        train_loss: mean training loss of each epoch, ``(n, epochs)``; after its last one an instance keeps its figures.
        metric: per data set ``(n, epochs)``, after each epoch, as last measured; NaN before that.
        name: of the metric.
    """

    networks: list[Network]
    objectives: list[Objective]
    epochs: Tensor
    train_loss: Tensor
    metric: dict[str, Tensor]
    name: str = "accuracy"

    __repr__ = shown

    @property
    def accuracy(self) -> dict[str, Tensor]:
        """The metric, where it is the accuracy.

        Raises:
            AttributeError: it is another one.
        """
        if self.name != "accuracy":
            raise AttributeError(f"instances have the metric {self.name!r}, not the accuracy: read .metric")
        return self.metric


@renamed(
    **other_names("batches", "epochs", "lr_scheduler", "optimizer", "metric", "collate"),
    **dict.fromkeys(("criterion", "loss_fn", "loss"), "objective, as lambda: Task(F.mse_loss)"),
    **dict.fromkeys(("validation", "val_loader"), "measured, as {'validation': [data of each network]}"),
    **dict.fromkeys(("model", "models", "network"), "networks"),
    progress="report, which is called with the number of epochs done",
)
def fit_instances(
    networks: Sequence[Network],
    batches: Sequence[Iterable[Any]],
    *,
    epochs: int,
    optimizer: MakeOptimizer,
    objective: Callable[[], Objective],
    lr_scheduler: MakeLRScheduler | None = None,
    lr_interval: Interval = "epoch",
    metric: MetricFunction | None = None,
    collate: Collate | None = None,
    measured: Mapping[str, Sequence[Measured]] | None = None,
    every: int | None = None,
    perfect: Sequence[str] = (),
    patience: int | None = None,
    report: Callable[[int], object] = lambda n: None,
) -> Instances:
    """Train n networks of one architecture together; each ends, to rounding, as if it had been trained alone.

    For averages over many seeds of small networks: one by one they cost n times the overhead of calling small
    operations, together they cost it once.

    Args:
        networks: of one architecture, each with its own weights; trained in place.
        batches: training data of each: :class:`~odenets.training.Batches`, or any iterable of batches
            ``(inputs, targets)``, all with equally many batches of equal sizes. Inputs and targets are tensors, inputs
            also a tuple ``(x, *args)``.
        epochs: number of epochs.
        optimizer: makes the optimizer from a list of stacked parameters, ``(n, *S)`` each; of one group, and one that
            treats every number alike, such as Adam or SGD, with or without momentum; no norms over parameters.
        objective: makes the objective of one instance: ``CrossEntropy``, or ``lambda: Task(F.mse_loss)``.
        lr_scheduler: makes a scheduler of learning rates from the optimizer, which the instances have in common.
        lr_interval: when the scheduler takes a step, after each "epoch" or after each "step" of the optimizer.
        metric: ``(output, targets)`` to a number, the mean of the batch, or to a number per sample, ``(B,)``; or an
            object with ``reset``, ``update`` and ``compute``, as torchmetrics has them. The accuracy if not given.
        collate: makes ``(inputs, targets)`` of a batch that is no such pair.
        measured: data of each instance, by name, on which the metric is measured: TensorData, or pairs of inputs and
            targets.
        every: epochs from one measurement of ``measured`` to the next, 1 if not given; the last epoch is always
            measured.
        perfect: names of data sets in ``measured``; an instance ends early once it is right on all their samples.
        patience: so many measurements running it must be; 3 if not given.
        report: called with the number of epochs done, summed over the instances; one that ends early reports all.

    Returns:
        The trained instances, with the loss and the metric of each epoch.

    Raises:
        TypeError: no function that makes an optimizer, a scheduler or objectives, or batches of no tensors.
        ValueError: not as many batches or data sets as networks, data of several sizes, an unknown name in
            ``perfect``, or it with another metric than the accuracy, ``patience`` without it, ``every`` without
            ``measured``, an optimizer of several groups, or ReduceLROnPlateau, which reads the loss of one training.

    >>> from functools import partial
    >>> from odenets.models import points_network
    >>> from odenets.training import Batches, points
    >>> networks = [points_network(depth=2) for _ in range(3)]
    >>> data = [points("moons", 40, seed) for seed in range(3)]
    >>> together = fit_instances(
    ...     networks,
    ...     [Batches(one, 20, seed=0) for one in data],
    ...     epochs=2,
    ...     optimizer=partial(torch.optim.Adam, lr=0.01),
    ...     objective=CrossEntropy,
    ...     measured={"train": data},
    ... )
    >>> together.train_loss.shape, together.accuracy["train"].shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    check_gradients()
    n, measured = len(networks), dict(measured or {})
    _check_measuring(measured, every, perfect, patience)
    check_count("epochs", epochs, 0)
    every, patience = 1 if every is None else every, 3 if patience is None else patience
    _check(n, batches, measured, perfect, objective)
    sources = [Source.of(data, collate, f"batches[{i}]") for i, data in enumerate(batches)]
    instances = [Instance(network, objective().to(device_of(network))) for network in networks]
    value_of = Metric.of(metric, instances[0].objective) or Metric.of(None, CrossEntropy())
    assert value_of is not None
    if perfect and value_of.name != "accuracy":
        raise ValueError(f"perfect is for the accuracy, which ends at 1, got the metric {value_of.name!r}")
    for instance, source in zip(instances, sources, strict=True):
        instance.train()
        if not isinstance(source.data, Batches):
            source.move_to(instance.network)
        if any(nn.parameter.is_lazy(p) for p in instance.parameters()):
            with torch.no_grad(), keeping_state(instance), evaluating(instance):
                instance.network(*arguments(part(source.first(), slice(2))[0]))
    stack = Stack(instances, optimizer)
    scheduler = make_lr_scheduler(lr_scheduler, stack.optimizer, lr_interval)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("lr_scheduler must not read losses, of which each instance has its own, got ReduceLROnPlateau")
    after_step = scheduler.step if scheduler is not None and lr_interval == "step" else lambda: None
    sets = {name: stacked(map(_pair, data), f"measured[{name!r}]") for name, data in measured.items()}
    batches_of = _drawing(sources)
    losses = torch.full((n, epochs), torch.nan)
    values = {name: torch.full((n, epochs), torch.nan) for name in sets}
    ended, streak = torch.full((n,), epochs), torch.zeros(n, dtype=torch.int)
    for epoch in range(epochs):
        numbers = stack.numbers
        losses[numbers, epoch:] = stack.train(batches_of(numbers, epoch), after_step).cpu()[:, None]
        if scheduler is not None and lr_interval == "epoch":
            scheduler.step()
        measuring = (epoch + 1) % every == 0 or epoch + 1 == epochs
        if measuring:
            for name, value in stack.measure(sets, value_of).items():
                values[name][numbers, epoch:] = value[:, None]
        report(len(numbers))
        if not (measuring and perfect):
            continue
        faultless = torch.stack([values[name][numbers, epoch] == 1 for name in perfect]).all(0)
        streak[numbers] = torch.where(faultless, streak[numbers] + 1, 0)
        done = streak[numbers] >= patience
        if done.any():
            ended[numbers[done]] = epoch + 1
            report(int(done.sum()) * (epochs - epoch - 1))
            stack.end(done)
            if not len(stack.numbers):
                break
    stack.end(torch.ones(len(stack.numbers), dtype=torch.bool))
    objectives = [instance.objective for instance in instances]
    return Instances(list(networks), objectives, ended, losses, values, value_of.name)


def _pair(data: Measured) -> tuple[Any, Any]:
    return (data.x, data.y) if isinstance(data, TensorData) else data


def _drawing(sources: Sequence[Source]) -> Callable[[Tensor, int], Iterator[tuple[Any, Any]]]:
    """Makes the batches of an epoch for some of the instances, stacked: ``(n, B, *S)`` and ``(n, B)``."""
    plainly = (source.data for source in sources if source.collate is None)
    batches = [data for data in plainly if isinstance(data, Batches) and not data.augmented]
    if len(batches) < len(sources):

        def drawn(training: Tensor, epoch: int) -> Iterator[tuple[Any, Any]]:
            epochs = [sources[i].epoch(epoch) for i in training.tolist()]
            while len(pairs := [pair for one in epochs if (pair := next(one, None)) is not None]) == len(epochs):
                yield tuple(stacked(parts, "batches") for parts in zip(*pairs, strict=True))  # type: ignore[misc]
            if pairs:
                ended = len(epochs) - len(pairs)
                raise ValueError(f"batches must be equally many for all instances, but those of {ended} have ended")

        return drawn
    x, y = torch.stack([b.data.x for b in batches]), torch.stack([b.data.y for b in batches])

    def plain(training: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, rows = torch.stack([batches[i].order(epoch) for i in training.tolist()]), training[:, None]
        for index in order.split(batches[0].size, 1):
            yield x[rows, index], y[rows, index]

    return plain


def _check_measuring(measured: Any, every: int | None, perfect: Sequence[str], patience: int | None) -> None:
    """That what says when to measure and when to end is of something."""
    for name, value in (("every", every), ("patience", patience)):
        if value is not None:
            check_count(name, value, 1)
    if every is not None and not measured:
        raise ValueError(f"every is of the data that are measured, got every={every} without measured")
    if patience is not None and not perfect:
        raise ValueError(
            f"patience is of perfect, got patience={patience} without it: perfect=['train'] ends an instance once it "
            "is right on all samples of measured['train']"
        )


def _check(
    n: int,
    batches: Sequence[Any],
    measured: dict[str, Sequence[Measured]],
    perfect: Sequence[str],
    objective: object,
) -> None:
    if n < 1:
        raise ValueError("networks must hold at least one network")
    if isinstance(batches, Batches) or not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a sequence, data for each network, got {type(batches).__name__}")
    if isinstance(objective, nn.Module) or not callable(objective):
        raise TypeError(
            "objective must be a function that makes one for each instance, such as CrossEntropy or "
            f"lambda: {type(objective).__name__}(...), got a {type(objective).__name__}"
        )
    for name, data in {"batches": batches, **measured}.items():
        if len(data) != n:
            raise ValueError(f"{name} must hold one per network, {n}, got {len(data)}")
        in_memory = [one.data if isinstance(one, Batches) else one for one in data]
        shapes = {one.x.shape for one in in_memory if isinstance(one, TensorData)}
        if len(shapes) > 1:
            raise ValueError(f"{name} must be of one size, got {sorted(map(tuple, shapes))}")
    if len(sizes := {b.size for b in batches if isinstance(b, Batches)}) > 1:
        raise ValueError(f"batches must be of one size, got {sorted(sizes)}")
    if isinstance(perfect, str):
        raise TypeError(f"perfect must be a sequence of names, got {perfect!r}: put it in a list, [{perfect!r}]")
    if unknown := set(perfect) - set(measured):
        raise ValueError(f"perfect names {sorted(unknown)}, which is not measured; measured are {sorted(measured)}")
