"""Metrics: what an epoch reports beside its loss, a function of outputs and targets, or an object that gathers them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from odenets.training.broadcasting import refusing_pairs
from odenets.training.labels import logits_and_labels
from odenets.training.objectives import Objective, Task

__all__ = ["Gathering", "Metric", "MetricFunction", "accuracy", "in_single", "labels_that_count"]


class Gathering(Protocol):
    """What sees the batches of an epoch and computes its number of all of them, as torchmetrics' metrics do."""

    def reset(self) -> object:
        """Forget what was seen."""

    def update(self, output: Any, targets: Any, /) -> object:
        """See a batch."""

    def compute(self) -> Any:
        """The number."""


MetricFunction = Callable[[Any, Any], Any] | Gathering
"""``(output, targets)`` to a number, the mean of the batch, or a number per sample, ``(B,)``: of an epoch the mean over
its samples. Or an object with ``reset()``, ``update(output, targets)`` and ``compute()``, as torchmetrics has them: of
an epoch what it computes of all batches together."""


def accuracy(output: Any, y: Any) -> Tensor:
    """1 where the largest of the logits is at the label, else 0, ``(B,)`` float32.

    Args:
        output: logits ``(B, classes)``, or what holds them as "logits".
        y: classes ``(B,)``, or shares of the classes ``(B, classes)``.

    Returns:
        One number per sample; a label of -100, which counts for nothing in cross-entropy, is never right.

    Raises:
        TypeError, ValueError: outputs that are no logits, or no label for each.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.5, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    tensor([1., 1., 0.])
    """
    output, y = logits_and_labels(output, y)
    return (output.argmax(1) == (y.argmax(1) if y.is_floating_point() else y)).float()


@dataclass(frozen=True)
class Metric:
    """A metric as an epoch sums it up.

    Attributes:
        function: of outputs and targets, or an object that gathers them.
        name: of its columns, ``train_<name>`` and ``validation_<name>``: the function's, or the object's class'.
    """

    function: Any
    name: str

    @classmethod
    def of(cls, function: MetricFunction | Metric | None, objective: Objective) -> Metric | None:
        """The metric that a function is; without one the accuracy, and none for a :class:`Task`, of whatever kind.

        Raises:
            TypeError: it is neither a function nor an object that gathers.
        """
        if function is None:
            return None if isinstance(objective.task, Task) else cls(accuracy, "accuracy")
        if isinstance(function, Metric):
            return function
        if not isinstance(function, type) and _gathers(function):
            return cls(function, type(function).__name__)
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                "metric must be a function (output, targets) -> number, or an object with reset, update and compute, "
                f"got {function!r}"
                + (": call it, metric=" + function.__name__ + "()" if isinstance(function, type) else "")
            )
        inner = function.func if isinstance(function, partial) else function
        name = getattr(inner, "__name__", type(inner).__name__)
        return cls(function, "metric" if name == "<lambda>" else name)

    def fresh(self, *, alone: bool = False) -> Metric:
        """The metric of an epoch, which has seen nothing yet.

        Args:
            alone: whether what gathers leaves out what other processes have seen, where torchmetrics would add it.
        """
        if not _gathers(self.function):
            return self
        gathering = deepcopy(self.function)
        gathering.reset()
        if alone and hasattr(gathering, "sync_on_compute"):
            gathering.sync_on_compute = False
        return replace(self, function=gathering)

    @torch.no_grad()
    def mean(self, mean: float) -> float:
        """The metric of an epoch, from the mean of its totals; what gathers computes it of all.

        Raises:
            TypeError, ValueError: it computes no number.
        """
        if not _gathers(self.function):
            return mean
        try:
            value = self.function.compute()
        except Exception as error:
            error.add_note(f"in metric {self.name!r}, which is to compute its number of an epoch")
            raise
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()):
            return float(value)
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"metric must compute a number, but {self.name} computes {got}")

    def value(self, output: Any, targets: Any, samples: int) -> float:
        """The metric of one batch."""
        metric = self.fresh(alone=True)
        return metric.mean(float(metric.total(output, targets, samples)) / samples)

    @torch.no_grad()
    def total(self, output: Any, targets: Any, samples: int) -> Tensor | float:
        """The metric of a batch, summed over its samples; 0 of what gathers.

        Raises:
            TypeError, ValueError: it is no number.
        """
        try:
            if _gathers(self.function):
                _gather(self.function, output, targets)
                return 0.0
            with refusing_pairs(output, targets, self.function):
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
        value = in_single(value)
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
            return accuracy(output, targets).sum() / (labels_that_count(targets, samples) / samples)
        except (TypeError, ValueError):
            leaf = next((leaf for leaf in tree_leaves((output, targets)) if isinstance(leaf, Tensor)), torch.empty(()))
            return torch.full((), torch.nan, device=leaf.device)


def _gathers(function: Any) -> bool:
    """Whether it gathers what it sees, and computes its number in the end."""
    return all(callable(getattr(function, name, None)) for name in ("reset", "update", "compute"))


def _gather(metric: Any, output: Any, targets: Any) -> None:
    """Show a batch to what gathers, where the batch is."""
    output, targets = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (output, targets))
    leaf = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if leaf is not None and hasattr(metric, "to") and getattr(metric, "device", leaf.device) != leaf.device:
        metric.to(leaf.device)
    metric.update(output, targets)


def in_single(value: Tensor) -> Tensor:
    """What is to be summed, in float32 where it is in half precision, whose sums would round or overflow."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def labels_that_count(y: Any, samples: int) -> Tensor | int:
    """How many labels count: all but the classes -100."""
    return (y != -100).sum() if isinstance(y, Tensor) and not y.is_floating_point() else samples
