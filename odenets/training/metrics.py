"""Metrics: what an epoch reports beside its loss, a function of outputs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from odenets.training.labels import logits_and_labels
from odenets.training.objectives import Objective, Task

__all__ = ["Metric", "MetricFunction", "accuracy", "check_labels"]

MetricFunction = Callable[[Any, Any], Any]
"""``(output, targets)`` to a number, the mean of the batch, or a number per sample, ``(B,)``."""


def accuracy(output: Any, y: Any) -> Tensor:
    """1 where the largest of the logits is at the label, else 0, ``(B,)`` float32.

    Args:
        output: logits ``(B, classes)``.
        y: classes ``(B,)``, or shares of the classes ``(B, classes)``.

    Raises:
        TypeError, ValueError: outputs that are no logits, or no label for each.
    """
    output, y = logits_and_labels(output, y)
    return (output.argmax(1) == (y.argmax(1) if y.is_floating_point() else y)).float()


@dataclass(frozen=True)
class Metric:
    """A metric as an epoch sums it up.

    Attributes:
        function: of outputs and targets.
        name: of its columns, ``train_<name>`` and ``validation_<name>``.
    """

    function: MetricFunction
    name: str

    @classmethod
    def of(cls, function: MetricFunction | None, objective: Objective) -> Metric | None:
        """The metric that a function is; without one the accuracy, and none for a :class:`Task`, of whatever kind.

        Raises:
            TypeError: it is no function.
        """
        if function is None:
            return None if isinstance(objective.task, Task) else cls(accuracy, "accuracy")
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"metric must be a function (output, targets) -> number, got {function!r}"
                + (": call it, metric=" + function.__name__ + "()" if isinstance(function, type) else "")
            )
        inner = function.func if isinstance(function, partial) else function
        name = getattr(inner, "__name__", type(inner).__name__)
        return cls(function, "metric" if name == "<lambda>" else name)

    @torch.no_grad()
    def total(self, output: Any, targets: Any, samples: int) -> Tensor | float:
        """The metric of a batch, summed over its samples.

        Raises:
            TypeError, ValueError: it is no number.
        """
        try:
            value = self.function(output, targets)
        except Exception as error:
            error.add_note(f"in metric {self.name!r}, called with the output and the targets of a batch")
            raise
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value) * samples
        if not isinstance(value, Tensor) or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"metric must return a number, the mean of the batch, or one per sample (B,), but {self.name} returns "
                f"{got}"
            )
        if value.ndim == 0:
            return value * samples
        if value.shape != (samples,):
            raise ValueError(
                f"metric must return a number, the mean of the batch, or one per sample ({samples},), but {self.name} "
                f"returns {tuple(value.shape)}"
            )
        return value.sum()

    def training_total(self, output: Any, targets: Any, samples: int) -> Tensor | float:
        """:meth:`total`; NaN for the accuracy of outputs that are no logits, which training need not read."""
        if self.function is not accuracy:
            return self.total(output, targets, samples)
        try:
            return accuracy(output, targets).sum()
        except (TypeError, ValueError):
            leaf = next((leaf for leaf in tree_leaves((output, targets)) if isinstance(leaf, Tensor)), torch.empty(()))
            return torch.full((), torch.nan, device=leaf.device)


def check_labels(output: Any, y: Any, name: str) -> None:
    """That labels which are classes have a logit each; -100 is a label that counts for nothing. Waits for the device.

    Raises:
        ValueError: they have not.
    """
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)) or y.is_floating_point() or not y.numel():
        return
    smallest, largest = (int(end) for end in torch.stack(y.aminmax()).tolist())
    if largest >= output.shape[1]:
        raise ValueError(f"the network has {output.shape[1]} logits, and the labels of {name} go up to {largest}")
    if smallest < 0 and bool(((y < 0) & (y != -100)).any()):
        raise ValueError(f"the labels of {name} must lie in [0, {output.shape[1]}), or be -100, got {smallest}")
