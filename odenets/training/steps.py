"""One step of the optimizer: a process' batch, in parts, through the network as Fabric calls it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from odenets.inputs import samples_in
from odenets.modes import total_dtype
from odenets.recording import Recording, check_compiled, record
from odenets.training.labels import check_labels, logits_and_labels
from odenets.training.metrics import Metric
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy, check_loss
from odenets.training.sharding import gather_for_record
from odenets.training.sources import part
from odenets.training.state import Training
from odenets.training.step_counting import after_step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Stepper", "check_gradients", "set_up"]


def check_gradients() -> None:
    """That gradients are recorded.

    Raises:
        RuntimeError: they are not.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradients must be enabled to train, got a call under torch.no_grad(), torch.inference_mode() or "
            "set_grad_enabled(False): call it outside"
        )


def set_up(fabric: Fabric, network: Any, objective: Objective, compile: bool) -> Any:
    """The module that Fabric calls to record a network, and which a sharding strategy shards."""
    if compile:
        check_compiled(objective.measures)
    recording = Recording(network, objective.measures)
    module = fabric.setup_module(recording)
    gather_for_record(network)
    recording.record = torch.compile(network.record) if compile else network.record
    return module


class Stepper:
    """Takes steps of a training's optimizer, with the parameters that the network has when this is made.

    Options are those of :func:`odenets.training.fit`; ``checked`` says that outputs must be logits, ``replicas`` how
    many processes have batches of their own.
    """

    def __init__(
        self,
        training: Training,
        fabric: Fabric,
        module: Any,
        *,
        metric: Metric | None,
        checked: bool,
        clip_norm: float | None,
        accumulate: int,
        replicas: int,
    ) -> None:
        self.network, self.objective, self.fabric = training.network, training.objective, fabric
        self.metric, self.checked, self.replicas = metric, checked, replicas
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.module, self.optimizer = module, cast(Optimizer, fabric.setup_optimizers(training.optimizer))
        self._recorded = module if training.sharded else training.network
        task = training.objective
        while task.task is not task:
            task = task.task
        self._classifies = isinstance(task, CrossEntropy | ReverseCrossEntropy)
        # or Fabric would round outputs to the default dtype
        self._context = fabric.init_tensor if fabric.strategy.precision.precision == "64-true" else nullcontext

    def __call__(self, batch: tuple[Any, Any], whole: int, *, first: bool, name: str) -> Tensor:
        """One step with this process' batch: its loss and its metric, summed over the samples.

        Args:
            batch: inputs and targets.
            whole: samples in the batches of all processes together.
            first: whether it is the first of the epoch; elsewhere than on a CPU labels are checked in that only, since
                looking means to wait for the device.
            name: of the data, for errors.
        """
        fabric, samples = self.fabric, samples_in(batch[0])
        totals = torch.zeros(2, dtype=total_dtype(fabric.device), device=fabric.device)
        self.optimizer.zero_grad()
        size = -(-samples // self.accumulate)
        parts = [part(batch, slice(i, i + size)) for i in range(0, samples, size)] if size < samples else [batch]
        for i, one in enumerate(parts, 1):
            n = samples_in(one[0])
            with fabric.no_backward_sync(self.module, enabled=i < len(parts)):
                with self._context():
                    output, records = record(self.module, one[0], self.objective.measures)
                self._check(output, one[1], first, name)
                loss = self.objective.loss(self.network, one, output, records)
                check_loss(loss, self.objective)
                fabric.backward(loss * (n * self.replicas / whole))
            totals[0] += loss.detach().to(totals.dtype) * n
            if self.metric is not None:
                totals[1] += self.metric.training_total(output, one[1], n)
        if self.clip_norm is not None:
            fabric.clip_gradients(self.module, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        with fabric.autocast():
            after_step(self.objective, self._recorded, parts[-1])
        return totals

    def _check(self, output: Any, targets: Any, first: bool, name: str) -> None:
        if self.checked:
            logits_and_labels(output, targets)
        if self._classifies and (first or self.fabric.device.type == "cpu"):
            logits, labels = logits_and_labels(output, targets)
            check_labels(logits, labels, name)
            if bool((labels == -100).all()):
                raise ValueError(
                    f"a batch of {name} holds labels -100 alone, whose mean loss is no number: leave it out"
                )
