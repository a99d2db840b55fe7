"""Epochs of a training: its steps, their validation, and what becomes of an epoch that diverges."""

from __future__ import annotations

import gc
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError
from odenets.modes import to_training_mode, total_dtype
from odenets.training.evaluation import Evaluation, evaluate_source
from odenets.training.metrics import Metric, accuracy
from odenets.training.notes import BatchNotes
from odenets.training.optimization import Interval, MakeOptimizer, check_optimizer, step_lr_scheduler
from odenets.training.processes import Processes
from odenets.training.sharding import reshard
from odenets.training.sources import Source
from odenets.training.state import Training
from odenets.training.steps import Stepper, set_up

__all__ = ["CONVERTING", "Epochs", "Options"]

CONVERTING = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Fabric's precisions in which weights are converted."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How :func:`odenets.training.fit` trains, under its names."""

    metric: Metric | None
    lr_interval: Interval
    loss_limit: float
    clip_norm: float | None
    accumulate: int
    compile: bool


@dataclass(kw_only=True)
class Epochs:
    """Trains one epoch after the other.

    Attributes:
        recording: the network as Fabric calls it, with the parameters it had when it was set up.
        frozen: modules that stay in eval mode.
    """

    training: Training
    processes: Processes
    recording: Any
    source: Source
    validation: Source | None
    optimizer: MakeOptimizer
    options: Options
    frozen: list[nn.Module] = field(default_factory=list)
    _step: Stepper | None = None
    _parameters: list[int] = field(default_factory=list)
    _started: float = 0.0

    def __post_init__(self) -> None:
        rows = self.training.rows
        self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
        self.fabric = self.processes.fabric

    def next(self) -> dict[str, Any] | None:
        """Train for an epoch: its row of metrics, or None where it diverged and is to be trained again."""
        training = self.training
        before = training.snapshot() if training.callbacks.recover else None
        self._set_up()
        self.frozen = to_training_mode(training.network, self.frozen)
        loss, metric = self._train()
        reshard(self.recording)
        validated = self._validate() if self.validation is not None and math.isfinite(loss) else None
        reshard(self.recording)
        if trouble := self._trouble(loss, validated):
            self._recover(before, trouble)
            return None
        training.epoch += 1
        return self._row(loss, metric, validated)

    def _set_up(self) -> None:
        """Make the steps of the parameters there are: at first, and after callbacks have edited blocks."""
        training = self.training
        parameters = list(map(id, training.network.parameters()))
        if parameters == self._parameters:
            return
        if training.sharded and (self._step or training.callbacks.edit):
            raise ValueError(
                f"a sharded network keeps its depth and its parameters, got callbacks={training.callbacks.edit} that "
                'edit it: train with strategy="ddp"'
            )
        check_optimizer(training.optimizer, training.network, training.objective, stacklevel=6)
        if self._step is not None:
            self._step = self.recording = None
            if self.fabric.world_size > 1:
                gc.collect()  # so that no hooks of an earlier set-up are left
            self.recording = set_up(self.fabric, training.network, training.objective, self.options.compile)
        options = self.options
        self._step = Stepper(
            training,
            self.fabric,
            self.recording,
            metric=options.metric,
            checked=self.validation is not None and options.metric is not None and options.metric.function is accuracy,
            clip_norm=options.clip_norm,
            accumulate=options.accumulate,
            replicas=self.processes.replicas,
        )
        self._parameters = parameters

    def _train(self) -> tuple[float, float]:
        """Mean training loss and metric of an epoch, cut short once the loss is not finite.

        That is looked at every batch on a CPU and every 32nd elsewhere, where looking means to wait for the device; not
        where several processes train, which must all take the same steps.
        """
        training, fabric, step = self.training, self.fabric, self._step
        assert step is not None
        step.metric = measured = self.options.metric and self.options.metric.fresh()
        totals = torch.zeros(2, dtype=total_dtype(fabric.device), device=fabric.device)
        every, samples, notes = 1 if fabric.device.type == "cpu" else 32, 0, BatchNotes(self.source.name)
        per_step = training.lr_scheduler if self.options.lr_interval == "step" else None
        for i, (batch, whole) in enumerate(self.processes.rounds(self.source, training.epoch), 1):
            with notes.next(batch[0]):
                totals += step(batch, whole, first=i == 1, name=self.source.title)
            samples += whole
            if per_step is not None:
                per_step.step()
            if i % every == 0 and fabric.world_size == 1 and not math.isfinite(totals[0].item()):
                break
        training.evaluations += training.network.evaluations * samples
        totals = self._summed(totals)
        if fabric.world_size > 1:  # each has seen its own batches
            for buffer in training.network.buffers():
                distributed.broadcast(buffer, src=0)
        loss, metric = (totals / samples).tolist()
        return loss, measured.mean(metric) if measured else metric

    def _summed(self, totals: Tensor) -> Tensor:
        """Summed over processes; those that share their batches count once."""
        totals = cast(Tensor, self.fabric.all_reduce(totals, reduce_op="sum"))
        return totals * (self.processes.replicas / self.fabric.world_size)

    def _validate(self) -> Evaluation:
        assert self.validation is not None
        training, precision = self.training, self.fabric.strategy.precision.precision
        with self.fabric.autocast() if precision in CONVERTING else nullcontext():
            return evaluate_source(
                training.network,
                self.validation,
                training.objective,
                self.options.metric,
                forward=self.recording if training.sharded else None,
                reduce=self._summed,
            )

    def _trouble(self, loss: float, validated: Evaluation | None) -> str | None:
        """What went wrong in an epoch, if anything did."""
        if not math.isfinite(loss):
            return f"its training loss is {loss}"
        if loss > self.options.loss_limit:
            return f"its training loss is {loss}, above loss_limit={self.options.loss_limit:g}"
        if validated is not None and not math.isfinite(validated.loss):
            return f"its validation loss is {validated.loss}"
        finite = is_finite(self.training.network)
        if self.training.sharded:  # each has looked at its part
            finite = all(self.processes.gathered(finite))
        return None if finite else "it left weights that are not finite"

    def _recover(self, before: dict[str, Any] | None, trouble: str) -> None:
        """Go back to the state from before an epoch, and let callbacks act."""
        training = self.training
        if before is not None:
            evaluations = training.evaluations
            training.load_state_dict(before, self.optimizer)
            training.evaluations = evaluations
            if training.callbacks.on_divergence(training):
                return
        raise DivergedError(
            f"epoch {training.epoch + 1} diverged, {trouble}: lower the learning rate, refine the steps or "
            "normalize the inputs; the last checkpoint stands"
        )

    def _row(self, loss: float, metric: float, validated: Evaluation | None) -> dict[str, Any]:
        """The epoch's row of metrics, to which callbacks add."""
        training, network = self.training, self.training.network
        name = self.options.metric.name if self.options.metric else None
        row: dict[str, Any] = {
            "epoch": training.epoch,
            "train_loss": loss,
            **({f"train_{name}": metric} if name else {}),
            "learning_rate": float(training.optimizer.param_groups[0]["lr"]),  # a tensor would change
            "depth": network.depth,
            "h": " ".join(f"{h:.6g}" for h in network.h),
            "parameters": sum(p.numel() for p in network.parameters()),
            **training.objective.figures(),
        }
        if training.lr_scheduler is not None and self.options.lr_interval == "epoch":
            step_lr_scheduler(training.lr_scheduler, loss if validated is None else validated.loss)
        if validated is not None:
            row |= {"validation_loss": validated.loss}
            row |= {f"validation_{name}": validated.metric} if name else {}
        training.callbacks.after_epoch(training, row)
        row = {key: _plain(key, value) for key, value in row.items()}
        row |= {"evaluations": training.evaluations, "check_evaluations": training.check_evaluations}
        row["seconds"] = time.perf_counter() - self._started
        training.rows.append(row)
        return row


def _plain(key: str, value: Any) -> Any:
    """A value of a row as a checkpoint holds it.

    Raises:
        TypeError: it is neither a number nor text, nor a list of such.
    """
    value = value.tolist() if isinstance(value, Tensor | np.generic | np.ndarray) else value
    try:
        json.dumps(value)
    except TypeError as error:
        raise TypeError(f"row[{key!r}] must be a number or text, got {type(value).__name__}, by a callback") from error
    return value
