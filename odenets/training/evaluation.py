"""Evaluation: loss and metric of a network on data, which leaves no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from odenets.errors import renamed
from odenets.inputs import arguments, call, samples_in
from odenets.modes import evaluating, keeping_state, total_dtype
from odenets.network import Network
from odenets.recording import Records, record
from odenets.training.checks import check_network, check_objective, other_names
from odenets.training.labels import check_labels, logits_and_labels
from odenets.training.metrics import Metric, MetricFunction, accuracy, in_single, labels_that_count
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy
from odenets.training.sources import Collate, Source

__all__ = ["Evaluation", "Totals", "evaluate", "evaluate_schemes", "evaluate_source"]

PLAIN = (CrossEntropy.validation_loss, ReverseCrossEntropy.validation_loss)
"""Cross-entropies, which are summed over the samples before they are rounded to a mean."""


PLACE = "network.to(device), to which batches are taken"


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and metric on data, as :func:`evaluate` measures them.

    >>> Evaluation(loss=0.5, metric=0.75).accuracy
    0.75

    Attributes:
        loss: what the objective reports of a validation; cross-entropy by default.
        metric: its mean over the samples, or what a gathering one computes; None without one.
        name: of the metric.
    """

    loss: float
    metric: float | None
    name: str = "accuracy"

    @property
    def accuracy(self) -> float:
        """The metric, where it is the accuracy.

        Raises:
            AttributeError: it is another one.
        """
        if self.name != "accuracy" or self.metric is None:
            raise AttributeError(f"evaluation has the metric {self.name!r}, not the accuracy: read .metric")
        return self.metric


@renamed(**other_names("network", "batches", "objective", "metric", "collate", device=PLACE, devices=PLACE))
def evaluate(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective | None = None,
    metric: MetricFunction | None = None,
    collate: Collate | None = None,
) -> Evaluation:
    """Loss and metric of a network on data, in eval mode, as the validation of :func:`~odenets.training.fit` has them.

    Those of :class:`~odenets.training.Batches` are on the samples as they are, neither cropped nor mirrored.
    Inputs are taken to the network's device and dtype; its modes, buffers and random state are left as they were, and
    the device is waited for once.

    Args:
        network: any module; one that records its steps where the objective's task measures something.
        batches: any iterable of batches ``(inputs, targets)``, of which one epoch is drawn: inputs are a tensor
            ``(B, *S)``, a tuple ``(x, *args)``, or a mapping of what the network takes by keyword.
        objective: its ``validation_loss`` is the loss; :class:`CrossEntropy` if not given.
        metric: ``(output, targets)`` to a number, the mean of the batch, or to a number per sample, ``(B,)``; or an
            object with ``reset``, ``update`` and ``compute``, as torchmetrics has them. The accuracy if not given; none
            for a :class:`~odenets.training.Task`.
        collate: makes ``(inputs, targets)`` of a batch that is no such pair.

    Returns:
        Mean loss and metric over all samples.

    Raises:
        TypeError: no module, or no objective.
        TypeError, ValueError: the network returns no logits, or not one for each class, where cross-entropy or accuracy
            read them; or a metric that returns no number, or batches that are none.

    >>> from odenets.models import points_network
    >>> x, y = torch.rand(100, 2), torch.arange(100) % 2
    >>> result = evaluate(points_network(depth=2), [(x[:50], y[:50]), (x[50:], y[50:])])
    >>> result.name, 0 <= result.accuracy <= 1, result.loss > 0
    ('accuracy', True, True)
    """
    check_network(network, "evaluate(network, batches)")
    objective = CrossEntropy() if objective is None else check_objective(objective)
    source = Source.of(batches, collate)
    source.move_to(network)
    return evaluate_source(network, source, objective, Metric.of(metric, objective))


@torch.no_grad()
def evaluate_source(
    network: nn.Module,
    source: Source,
    objective: Objective,
    metric: Metric | None,
    *,
    forward: nn.Module | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> Evaluation:
    """:func:`evaluate` of a source whose batches are where the network is.

    Args:
        forward: what is called in place of the network, a wrapper around it.
        reduce: sums totals over processes.
    """
    measures = objective.task.measures

    def run(inputs: Any) -> tuple[Any, Records]:
        if forward is not None:
            return record(forward, inputs, measures)
        return record(network, inputs, measures) if measures else (call(network, inputs), Records({}))

    totals = Totals(objective, metric, source.title)
    with keeping_state(network, objective), evaluating(network, objective):
        for inputs, targets in source.in_order():
            output, records = run(inputs)
            totals.add(network, (inputs, targets), output, records)
    loss, value = totals.means(reduce)
    return Evaluation(loss, value, metric.name) if metric else Evaluation(loss, None, "")


@torch.no_grad()
def evaluate_schemes(
    network: Network, batches: Iterable[Any], *, full_passes: bool = False, collate: Collate | None = None
) -> dict[str, Evaluation]:
    """Cross-entropy and accuracy of every output of :meth:`Network.outputs`: each embedded scheme, and "ensemble".

    One pass gives several classifiers: the solution of a Runge-Kutta method and those of lower order from the same
    stages. In eval mode, with all states left as :func:`evaluate` leaves them.

    Args:
        network: a classifier.
        batches: any iterable of batches ``(inputs, labels)``.
        full_passes: whether each scheme has a pass of its own, from the first block on, as ``Network.outputs`` has it.
        collate: makes ``(inputs, labels)`` of a batch that is no such pair.

    Returns:
        The evaluation of each scheme, by its name.

    Raises:
        TypeError: a network without such outputs.
        TypeError, ValueError: as :func:`evaluate` raises.

    >>> from odenets.models import points_network
    >>> batches = [(torch.rand(8, 2), torch.arange(8) % 2)]
    >>> list(evaluate_schemes(points_network(solver="bs23", depth=2, readout="ensemble"), batches))
    ['euler', 'midpoint', 'order2', 'order3', 'ensemble']
    """
    if not hasattr(network, "outputs"):
        raise TypeError(f"network must be an odenets.Network, whose schemes have outputs, got {type(network).__name__}")
    source = Source.of(batches, collate)
    source.move_to(network)
    objective, totals = CrossEntropy(), dict[str, Totals]()
    with keeping_state(network), evaluating(network):
        for inputs, targets in source.in_order():
            for name, output in network.outputs(*arguments(inputs), full_passes=full_passes).items():
                of_scheme = totals.setdefault(name, Totals(objective, Metric.of(None, objective), source.title))
                of_scheme.add(network, (inputs, targets), output, Records({}))
    return {name: Evaluation(*of_scheme.means()) for name, of_scheme in totals.items()}


class Totals:
    """Loss and metric of outputs, summed over samples, and how many those are.

    Args:
        objective: whose ``validation_loss`` is the loss.
        metric: of outputs and targets, or None.
        name: of the data, for errors.
    """

    def __init__(self, objective: Objective, metric: Metric | None, name: str) -> None:
        while type(objective).validation_loss is Objective.validation_loss and objective.task is not objective:
            objective = objective.task  # whose loss it is
        self.objective, self.metric, self.name = objective, metric and metric.fresh(), name
        self.samples = 0
        self.sums: Tensor | None = None

    def add(self, network: nn.Module, batch: tuple[Any, Any], output: Any, records: Records) -> None:
        """Count a batch.

        Raises:
            TypeError, ValueError: outputs or targets that loss or metric cannot read.
        """
        n, targets = samples_in(batch[0]), batch[1]
        if type(self.objective).validation_loss in PLAIN:
            loss = F.cross_entropy(*self._checked(output, targets), reduction="sum")
        else:
            loss = in_single(self.objective.validation_loss(network, batch, output, records)) * n
        if self.metric is not None and self.metric.function is accuracy:
            self._checked(output, targets)
        value = self.metric.total(output, targets, n) if self.metric else 0.0
        counted = labels_that_count(targets, n)
        of_loss = counted if type(self.objective).validation_loss in PLAIN else n
        of_metric = counted if self.metric is not None and self.metric.function is accuracy else n
        if self.sums is None:
            device = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), loss).device
            self.sums = torch.zeros(4, dtype=total_dtype(device), device=device)
        totals = (loss, value, of_loss, of_metric)
        sums = self.sums  # whose precision totals take before they are put together
        sums += torch.stack([t.to(sums) if isinstance(t, Tensor) else sums.new_full((), t) for t in totals])
        self.samples += n

    def _checked(self, output: Any, targets: Any) -> tuple[Tensor, Tensor]:
        logits, labels = logits_and_labels(output, targets)
        if not self.samples or logits.device.type == "cpu":
            check_labels(logits, labels, self.name)
        return logits, labels

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda totals: totals) -> tuple[float, float]:
        """Mean loss and metric over the samples that count, of all processes, whose totals ``reduce`` sums."""
        assert self.sums is not None  # a source has at least one batch
        totals = reduce(self.sums)
        loss, value = (totals[:2] / totals[2:]).tolist()
        return loss, self.metric.mean(value) if self.metric else value
