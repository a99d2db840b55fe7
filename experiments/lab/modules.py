"""What the experiments on module-wise training share: their training, accuracies after each module, rows over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.experiment import Row
from lab.plotting import intervals
from lab.statistics import Interval, paired, paired_p_value, percent
from odenets import Network, recalibrate
from odenets.module_wise import ModuleWise, conv_head, fit_modules, split_into_modules
from odenets.module_wise.modules import LocalLoss
from odenets.training.data import Batches, TensorData

__all__ = ["accuracies", "accuracy_row", "difference", "in_modules", "over_modules", "sgd_in_modules"]

Rows = list[Row]
Results = Sequence[Row]


def in_modules(
    network: Any,
    split: int | Sequence[int],
    dataset: TensorData,
    *,
    same_head: bool,
    local_loss: LocalLoss | None = None,
) -> ModuleWise:
    """A network in modules, the last one with an auxiliary head like the others.

    Args:
        network: a network, or an adapted model.
        split: number of modules, or after how many blocks each ends.
        dataset: its images.
        same_head: one classifier for all modules.
        local_loss: what each module minimizes besides.
    """
    x, head = dataset.x[:2], "auto"
    if same_head:
        assert isinstance(network, Network)
        with torch.no_grad():
            head = conv_head(network.eval().encoder(x), dataset.classes)
    return split_into_modules(network, split, x, head=head, last_head="auxiliary", local_loss=local_loss)


def sgd_in_modules(
    network: ModuleWise, batches: Batches, learning_rate: float, order: str, **options: Any
) -> list[Row]:
    """Train modules by SGD, those in sequence on states in memory, of four views of each image that is augmented.

    Args:
        network: the modules.
        batches: of training.
        learning_rate: of all modules.
        order, options: of :func:`odenets.module_wise.fit_modules`.

    Returns:
        A row per module and epoch.
    """
    sgd = partial(torch.optim.SGD, lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    options |= {"order": order}
    if order == "sequential":
        options |= {"cache": "memory", "views": 4 if batches.augmented else 1}
    return fit_modules(network, batches, optimizer=sgd, **options).rows


def accuracies(
    network: ModuleWise, batches: Batches, validation: TensorData, test: TensorData | None
) -> dict[str, list[float]]:
    """After each module: on validation images and, where there are any, on test images and on these again with batch
    norm's statistics recomputed from the training batches.
    """
    results = {"validation": network.accuracies(Batches(validation, 500))}
    if test is not None:
        results["test"] = network.accuracies(Batches(test, 100))
        recalibrate(network, batches.inputs(), network)  # the last head alone, which may be that of other modules too
        results["recalibrated"] = network.accuracies(Batches(test, 100))
    return results


def accuracy_row(results: Results) -> Row:
    """Learning rate and tau of a method, and accuracies (%) over seeds after each module; recalibrated: the last."""
    modules = [percent(values) for values in zip(*(r["test"] for r in results), strict=True)]
    row = {name: results[0][name] for name in ("learning_rate", "tau")}
    row |= {"modules": modules, "first": modules[0], "last": modules[-1]}
    return row | {"recalibrated": percent(r["recalibrated"][-1] for r in results)}


def difference(results: Results, others: Results, key: str, module: int = -1) -> tuple[Interval, float]:
    """Points of accuracy between two methods after a module, paired over the seeds, and the p-value."""
    one, other = ([100 * r[key][module] for r in each] for each in (results, others))
    return paired(one, other), paired_p_value(one, other)


def over_modules(rows: Iterable[Row]) -> Callable[[], Figure]:
    """The figure of accuracies after each module, a line per row."""
    lines = {row["method"]: list(enumerate(row["modules"], 1)) for row in rows}
    return partial(intervals, lines, xlabel="module", ylabel="test accuracy (%)")
