"""The one training loop: an objective on a network's output and records, on Lightning Fabric."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from odenets.checkpoints import is_finite
from odenets.errors import DivergedError, needs
from odenets.modes import dtype_of, evaluating, inputs_for, keeping_state, to_training_mode, total_dtype
from odenets.recording import Recorder
from odenets.training.data import Batches, data_for
from odenets.training.evaluation import Evaluation, evaluate
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.runs import Run
from odenets.training.state import Training, check_optimizer, make_schedule
from odenets.training.steps import Stepper

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Callback", "fit", "progress_bar"]

CONVERTING = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Fabric's precisions in which weights are converted."""


class Callback(Protocol):
    """Acts between epochs. What it must remember beyond a kill belongs in ``training.rows``.

    Attributes:
        recovers: whether :meth:`on_divergence` may help; the loop then keeps a copy of the state at each epoch's start.
    """

    recovers: bool = False

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Called with the epoch's metrics, to which it may add; the network may be edited."""

    def on_divergence(self, training: Training) -> bool:
        """Called when an epoch has diverged, with the state from before it; True trains the epoch again."""
        return False


def fit(
    network: Recorder,
    batches: Batches,
    *,
    epochs: int,
    optimizer: Callable[[Any], Optimizer],
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    objective: Objective | None = None,
    validation: Batches | None = None,
    callbacks: Sequence[Callback] = (),
    loss_limit: float = math.inf,
    run: Run | None = None,
    checkpoint: str = "resume.pt",
    clip_norm: float | None = None,
    accumulate: int = 1,
    compile: bool = False,
    progress: str | None = None,
    fabric: Fabric | None = None,
) -> Training:
    """Train a network.

    Where the network is in training mode, modules in it that are in eval mode stay so: a frozen batch norm keeps its
    statistics. A network in eval mode, or all of whose parameters are in parts that are, is put in training mode as a
    whole. In the end it is in training mode, and no gradients are left.

    Args:
        network: a module that records its steps, trained in place, moved to the fabric's device. Inputs are taken to
            its dtype. Where it does not return logits ``(B, classes)`` the accuracy is NaN.
        batches: training data; epoch e draws the same batches in every run.
        epochs: how many.
        optimizer: makes the optimizer from the network; its parameter groups must follow from the network alone. A
            warning names what requires a gradient and is not in it.
        schedule: makes a learning-rate schedule, stepped once an epoch.
        objective: :class:`CrossEntropy` if not given.
        validation: measured after every epoch, by :func:`evaluate`.
        callbacks: called between epochs.
        loss_limit: an epoch whose mean training loss is above this has diverged, like one after which a loss, of
            training or validation, or a weight is not finite.
        run: holds the resume state called ``checkpoint``; where there is one the training goes on from it and ends, on
            one device, with the weights of a training that never stopped, to the last bit. Of several processes only
            the first needs a run.
        checkpoint: name of the resume state.
        clip_norm: largest norm of the gradient of all parameters together; it is scaled down to this.
        accumulate: parts in which a batch comes, one after the other, for less memory: the gradient is that of the
            whole batch, but for batch norms, which see a part at a time, and for what is no mean over samples: the cost
            "norm", and a lambda, which grows with the loss of one part.
        compile: train through ``torch.compile(network.record)``.
        progress: label of a progress bar; none without it.
        fabric: Lightning Fabric; one CPU if not given. Its ``precision="64-true"``, ``"bf16-true"`` or ``"16-true"``
            converts the network, ``"32-true"`` takes it in the dtype it has; losses are in float32 at least.
            ``"bf16-mixed"`` is automatic mixed precision, in which weights, outputs and measures stay in float32.
            Launched on several processes (``torchrun``), each takes its share of every batch, and their gradients are
            averaged: the result is that of one process, but for batch norms, which see a share at a time, and for a
            cost that is no mean over samples. After every epoch all go on with the first one's buffers.

    Returns:
        The finished training, with one row of metrics per epoch.

    Raises:
        DivergedError: a loss or a weight is not finite, or the loss above ``loss_limit``, and no callback recovers.
        TypeError: a network that records nothing or consists of modules, no objective, a schedule whose steps need a
            metric, or an output that the objective, or with validation the evaluation, cannot read.
        ValueError: arguments out of range, a batch with fewer samples than there are processes, an optimizer without
            the network's parameters, mixed precision of a float64 network, or a checkpoint of another precision or
            optimizer.
    """
    if not (isinstance(network, nn.Module) and callable(getattr(network, "record", None))):
        raise TypeError(
            f"network must be a module that records its steps, an odenets.Recorder, got {type(network).__name__}: "
            "odenets.adapt makes one of any residual network"
        )
    if trainer := getattr(network, "trained_by", None):
        raise TypeError(f"network must be one that is trained as a whole, got {type(network).__name__}: take {trainer}")
    objective = objective or CrossEntropy()
    if fabric is None:
        with needs("training"):
            from lightning_fabric import Fabric
        fabric = Fabric(accelerator="cpu", devices=1)
    _check_arguments(batches, objective, fabric.world_size, epochs=epochs, clip_norm=clip_norm, accumulate=accumulate)
    run = run if fabric.is_global_zero else None
    objective.to(fabric.device)
    network.to(fabric.device, _weights_dtype(fabric, network))
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):  # they are made from the first input
        with torch.no_grad(), keeping_state(network), evaluating(network):
            network(inputs_for(network, batches.data.x[:2]))
    first = optimizer(network)
    training = Training(network, first, make_schedule(schedule, first), objective)
    training.precision = fabric.strategy.precision
    state = fabric.broadcast(run.load_state(checkpoint) if run else None)
    if state is not None:
        try:
            training.load_state_dict(state, optimizer)
        except ValueError as error:
            raise ValueError(f"{f'checkpoint {run.folder / checkpoint}: ' if run else ''}{error}") from error
    if validation is not None:
        validation = Batches(data_for(network, validation.data), validation.size)
    loop = _Loop(
        training=training,
        fabric=fabric,
        batches=replace(batches, data=data_for(network, batches.data)),
        validation=validation,
        make_optimizer=optimizer,
        callbacks=callbacks,
        loss_limit=loss_limit,
        step_options={"clip_norm": clip_norm, "accumulate": accumulate, "compile": compile},
    )
    with progress_bar(progress, epochs, training.epoch) as show:
        while training.epoch < epochs:
            row = loop.epoch()
            if row is None:
                continue
            if run is not None:
                run.save_state(training.state_dict(), checkpoint)
                run.log(training.rows)
            show(row)
    to_training_mode(network, loop.frozen)
    training.optimizer.zero_grad()
    return training


def _check_arguments(
    batches: Batches, objective: object, processes: int, *, epochs: int, clip_norm: float | None, accumulate: int
) -> None:
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an odenets Objective, got {objective!r}: odenets.training.Task makes one of any "
            "function (output, y) -> loss"
        )
    if batches.smallest < processes:
        raise ValueError(
            f"batches must hold a sample for each of {processes} processes, got one of {batches.smallest}: "
            "choose another batch size"
        )


def _weights_dtype(fabric: Fabric, network: nn.Module) -> torch.dtype | None:
    """What the weights are to be converted to before a checkpoint is loaded, if they are."""
    precision, dtype = str(fabric.strategy.precision.precision), dtype_of(network)
    if precision.endswith("mixed") and dtype == torch.float64:
        raise ValueError(
            f"fabric's precision {precision!r} mixes float32 weights with half precision, got a network in float64: "
            'take precision="64-true", or network.float()'
        )
    return CONVERTING.get(precision)


@contextmanager
def progress_bar(label: str | None, epochs: int, done: int) -> Iterator[Callable[[dict[str, Any]], object]]:
    """What shows an epoch's row in a bar; nothing without a label."""
    if label is None:
        yield lambda row: None
        return
    with needs("training"):
        from tqdm import tqdm

    def show(row: dict[str, Any]) -> None:
        bar.update()
        bar.set_postfix({k: f"{row[k]:.3g}" for k in ("train_loss", "validation_accuracy", "depth") if k in row})

    with tqdm(total=epochs, initial=done, desc=label, unit="epoch", leave=False) as bar:
        yield show


@dataclass(kw_only=True)
class _Loop:
    """Epochs: training, validation, and what becomes of one that diverges."""

    training: Training
    fabric: Fabric
    batches: Batches
    validation: Batches | None
    make_optimizer: Callable[[Any], Optimizer]
    callbacks: Sequence[Callback]
    loss_limit: float
    step_options: dict[str, Any]
    frozen: list[nn.Module] = field(default_factory=list)
    _step: Stepper | None = None
    _parameters: list[int] = field(default_factory=list)
    _started: float = 0.0

    def __post_init__(self) -> None:
        rows = self.training.rows
        self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)

    def epoch(self) -> dict[str, Any] | None:
        """Train for an epoch: its row of metrics, or None where it diverged and is to be trained again."""
        training = self.training
        recovering = any(getattr(callback, "recovers", False) for callback in self.callbacks)
        before = training.snapshot() if recovering else None
        self._set_up()
        self.frozen = to_training_mode(training.network, self.frozen)
        loss, accuracy = self._train()
        validated = None
        if self.validation is not None and math.isfinite(loss):
            converting = self.fabric.strategy.precision.precision in CONVERTING
            with self.fabric.autocast() if converting else nullcontext():
                validated = evaluate(training.network, self.validation)
        if trouble := self._trouble(loss, validated):
            self._recover(before, trouble)
            return None
        training.epoch += 1
        return self._log(loss, accuracy, validated)

    def _set_up(self) -> None:
        """Make the steps of the parameters there are: at first, and after callbacks have edited blocks."""
        parameters = list(map(id, self.training.network.parameters()))
        if parameters == self._parameters:
            return
        self._step = None
        check_optimizer(self.training.optimizer, self.training.network, self.training.objective, stacklevel=5)
        if self.fabric.world_size > 1:
            gc.collect()  # so that no hooks of an earlier set-up are left
        options = self.step_options | {"validated": self.validation is not None}
        self._step = Stepper(self.training, self.fabric, **options)
        self._parameters = parameters

    def _train(self) -> tuple[float, float]:
        """Mean training loss and accuracy of an epoch, cut short once the loss is not finite.

        That is looked at every batch on a CPU and every 32nd elsewhere, where looking means to wait for the device; not
        where several processes train, which must all take the same steps.
        """
        training, fabric, step = self.training, self.fabric, self._step
        assert step is not None
        totals = torch.zeros(2, dtype=total_dtype(fabric.device), device=fabric.device)
        every = 1 if fabric.device.type == "cpu" else 32
        for i, (x, y) in enumerate(self.batches.epoch(training.epoch), 1):
            totals += step(x, y)
            training.evaluations += training.network.evaluations * len(x)
            if i % every == 0 and fabric.world_size == 1 and not math.isfinite(totals[0].item()):
                break
        totals = cast(Tensor, fabric.all_reduce(totals, reduce_op="sum"))
        if fabric.world_size > 1:  # each has seen its own shares
            for buffer in training.network.buffers():
                distributed.broadcast(buffer, src=0)
        loss, accuracy = (totals / len(self.batches.data)).tolist()
        return loss, accuracy

    def _trouble(self, loss: float, validated: Evaluation | None) -> str | None:
        """What went wrong in an epoch, if anything did."""
        if not (math.isfinite(loss) and loss <= self.loss_limit):
            return f"its training loss is {loss}"
        if validated is not None and not math.isfinite(validated.loss):
            return f"its validation loss is {validated.loss}"
        if not is_finite(self.training.network):
            return "it left weights that are not finite"
        return None

    def _recover(self, before: dict[str, Any] | None, trouble: str) -> None:
        """Go back to the state from before an epoch, and let callbacks act."""
        training = self.training
        if before is not None:
            evaluations = training.evaluations
            training.load_state_dict(before, self.make_optimizer)
            training.evaluations = evaluations
            if any(callback.on_divergence(training) for callback in self.callbacks):
                return
        raise DivergedError(
            f"epoch {training.epoch + 1} diverged, {trouble}: lower the learning rate, refine the steps or "
            "normalize the inputs; the last checkpoint stands"
        )

    def _log(self, loss: float, accuracy: float, validated: Evaluation | None) -> dict[str, Any]:
        """Add the epoch's row of metrics, to which callbacks add."""
        training, network = self.training, self.training.network
        row: dict[str, Any] = {
            "epoch": training.epoch,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "learning_rate": training.optimizer.param_groups[0]["lr"],
            "depth": network.depth,
            "h": " ".join(f"{h:.6g}" for h in network.h),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        if training.schedule is not None:
            training.schedule.step()
        if validated is not None:
            row |= {"validation_loss": validated.loss, "validation_accuracy": validated.accuracy}
        for callback in self.callbacks:
            callback.after_epoch(training, row)
        row |= {"evaluations": training.evaluations, "check_evaluations": training.check_evaluations}
        row["seconds"] = time.perf_counter() - self._started
        training.rows.append(row)
        return row
