"""What the experiments on module-wise training share: networks in modules, accuracies after each, rows over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lab.statistics import Interval, paired, paired_p_value, percent
from odenets import Network, recalibrate
from odenets.module_wise import ModuleWise, conv_head, split_into_modules
from odenets.module_wise.modules import LocalLoss
from odenets.training.data import Batches, TensorData

__all__ = ["accuracies", "after_each_module", "difference", "in_modules"]

Results = Sequence[dict[str, Any]]


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


def after_each_module(results: Results, key: str) -> list[Interval]:
    """Accuracies (%) over seeds after each module."""
    return [percent(values) for values in zip(*(r[key] for r in results), strict=True)]


def difference(results: Results, others: Results, key: str, module: int = -1) -> tuple[Interval, float]:
    """Points of accuracy between two methods after a module, paired over the seeds, and the p-value."""
    one, other = ([100 * r[key][module] for r in each] for each in (results, others))
    return paired(one, other), paired_p_value(one, other)
