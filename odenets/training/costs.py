"""What the objectives share that add a cost of the steps to the loss of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from odenets.inputs import kind_of
from odenets.measures import StepFunction
from odenets.recording import Records, unwrapped
from odenets.training.checks import check_task
from odenets.training.objectives import Batch, CrossEntropy, Objective
from solvers.validation import is_transformed

__all__ = ["WithCost", "check_weight"]


class WithCost(Objective):
    """The loss of a task and a cost of the steps; a subclass weighs the two in ``loss``.

    The ``task`` is cross-entropy if None. The ``cost`` is a function of the records, in which it reads the ``measure``
    of that ``name``, and returns a scalar.

    Raises:
        TypeError: a task that is no objective.
        ValueError: a task that records another measure by that name.
    """

    def __init__(
        self,
        task: Objective | None,
        name: str,
        measure: StepFunction,
        cost: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        task = CrossEntropy() if task is None else task
        check_task(task)
        if task.measures.get(name, measure) != measure:
            raise ValueError(f"task must not record another measure as {name!r}, the name of the cost")
        super().__init__({**task.measures, name: measure})
        self.task, self.cost = task, cost
        self._last: tuple[Tensor, Tensor] | None = None  # loss and cost of the last batch

    @property
    def needs_second_forward(self) -> bool:
        """Whether the task does."""
        return self.task.needs_second_forward

    @property
    def counts_steps(self) -> bool:
        """Whether the task does."""
        return self.task.counts_steps

    @property
    def keeps_batch(self) -> bool:
        """Whether the task does."""
        return self.task.keeps_batch

    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """That of the task, with the ``network`` and the ``batch``."""
        self.task.after_step(network, batch)

    def batch_figures(self) -> dict[str, float]:
        """The task's loss, "batch_loss", and the cost, "batch_cost", of the last batch of training in this process.

        Returns:
            Both, for a log of every step; empty before the first batch. Reading them waits for the device.
        """
        last = {} if self._last is None else dict(zip(("batch_loss", "batch_cost"), self._last, strict=True))
        return {name: value.item() for name, value in last.items()}

    def parts(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> tuple[Tensor, Tensor]:
        """The task's loss and the cost, remembered where they are those of training.

        ``network``, ``batch``, ``output`` and ``records`` are as in :meth:`~odenets.training.Objective.loss`.
        """
        loss, cost = self.task.loss(network, batch, output, records), self.cost(records)
        training = torch.is_grad_enabled() and self.training and unwrapped(network).training
        if training and not torch.compiler.is_compiling() and not is_transformed(loss):
            self._last = loss.detach(), cost.detach()
        return loss, cost


def check_weight(weight: Any, example: str) -> None:
    """That the weight of a cost is a finite number, not negative; an ``example`` of the call is for the error.

    Raises:
        TypeError: no number.
        ValueError: a number that is negative or not finite.

    >>> check_weight("0.1", "ActionPenalty(0.1, task)")
    Traceback (most recent call last):
        ...
    TypeError: weight must be a number, and comes first, ActionPenalty(0.1, task), got str
    """
    if not isinstance(weight, Real | Tensor) or isinstance(weight, bool) or getattr(weight, "ndim", 0):
        raise TypeError(f"weight must be a number, and comes first, {example}, got {kind_of(weight)}")
    if not (math.isfinite(weight) and float(weight) >= 0):
        raise ValueError(f"weight must be finite and not negative, got {weight}")
