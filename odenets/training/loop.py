"""The one training loop: an objective on a network's output and records, on Lightning Fabric."""

from __future__ import annotations

import copy
import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from odenets.adapting import AdaptedModel
from odenets.checkpoints import is_finite, restore_structure, structure
from odenets.errors import DivergedError
from odenets.measures import Measure
from odenets.modes import dtype_of, evaluating, inputs_for, keeping_state, total_dtype
from odenets.network import Network
from odenets.recording import Records
from odenets.training.data import Batches, TensorData
from odenets.training.objectives import (
    CrossEntropy,
    Objective,
    after_step,
    check_loss,
    logits_and_labels,
    right_answers,
)
from odenets.training.runs import Run

__all__ = [
    "Callback",
    "Evaluation",
    "Training",
    "check_optimizer",
    "check_precision",
    "data_for",
    "evaluate",
    "evaluate_schemes",
    "fit",
    "to_training_mode",
]


TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Fabric's precisions in which weights are converted."""


@dataclass
class Training:
    """A training run as callbacks see it.

    Attributes:
        network, optimizer, schedule: being trained.
        objective: what is minimized.
        epoch: epochs completed.
        rows: one dictionary of metrics per completed epoch.
        evaluations: field evaluations per sample, summed over all samples of all training steps so far.
        check_evaluations: the same for what callbacks measured besides.
    """

    network: Network | AdaptedModel
    optimizer: Optimizer
    schedule: LRScheduler | None
    objective: Objective = field(default_factory=CrossEntropy)
    epoch: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    check_evaluations: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and plain values."""
        return {
            "structure": structure(self.network),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "objective": self.objective.state_dict(),
            "epoch": self.epoch,
            "rows": json.dumps(self.rows),
            "evaluations": self.evaluations,
            "check_evaluations": self.check_evaluations,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any], make_optimizer: Callable[[Any], Optimizer]) -> None:
        """Take up :meth:`state_dict`: blocks first, then the optimizer on their parameters.

        Raises:
            ValueError: weights of another precision, or a schedule on one side only.
        """
        if (self.schedule is None) != (state["schedule"] is None):
            which = "one, and this training has none" if self.schedule is None else "none, and this training has one"
            raise ValueError(f"schedule must be that of the checkpoint, which has {which}")
        restore_structure(self.network, state["structure"])
        check_precision(self.network, state["network"])
        self.network.load_state_dict(state["network"])
        held = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        fresh = make_optimizer(self.network)
        if held != [[id(p) for p in group["params"]] for group in fresh.param_groups]:
            self.optimizer.param_groups[:] = fresh.param_groups
            self.optimizer.state.clear()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        self.epoch = state["epoch"]
        self.rows = json.loads(state["rows"])
        self.evaluations, self.check_evaluations = state["evaluations"], state["check_evaluations"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


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


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy on a data set."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(network: nn.Module, batches: Batches) -> Evaluation:
    """Cross-entropy and accuracy in eval mode on the samples as they are, neither cropped nor mirrored.

    Inputs are taken to the network's device and dtype; its modes, buffers and random state are left as they were, and
    the device is waited for once.

    Raises:
        TypeError, ValueError: the network returns no logits, or not one for each class.
    """
    return _evaluate(network, batches, lambda x: {"": network(x)})[""]


@torch.no_grad()
def evaluate_schemes(network: Network, batches: Batches, *, full_passes: bool = False) -> dict[str, Evaluation]:
    """:func:`evaluate` of every output of :meth:`Network.outputs`: each embedded scheme, and "ensemble".

    Raises:
        TypeError: a network without such outputs.
        TypeError, ValueError: as :func:`evaluate` raises.
    """
    if not hasattr(network, "outputs"):
        raise TypeError(f"network must be an odenets.Network, whose schemes have outputs, got {type(network).__name__}")
    return _evaluate(network, batches, lambda x: network.outputs(x, full_passes=full_passes))


def _evaluate(
    network: nn.Module, batches: Batches, outputs: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Evaluation]:
    data, totals = batches.data, {}
    with keeping_state(network), evaluating(network):
        for x, y in batches.in_order():
            for name, output in outputs(inputs_for(network, x)).items():
                output, y = logits_and_labels(output, y.to(output.device) if isinstance(output, Tensor) else y)
                if name not in totals:
                    _check_classes(output, data)
                    totals[name] = torch.zeros(2, dtype=total_dtype(output.device), device=output.device)
                totals[name] += torch.stack([F.cross_entropy(output, y, reduction="sum"), right_answers(output, y)])
    values = (torch.stack(list(totals.values())) / len(data)).tolist()
    return {name: Evaluation(*value) for name, value in zip(totals, values, strict=True)}


def _check_classes(output: Tensor, data: TensorData) -> None:
    """That there is a logit for each label."""
    if output.shape[1] < data.classes and output.shape[1] <= (largest := int(data.y.max())):
        raise ValueError(f"the network has {output.shape[1]} logits, and the labels of {data.name} go up to {largest}")


def check_precision(network: nn.Module, state: Mapping[str, Any]) -> None:
    """That saved weights have the network's dtypes: loading them would round, or feign a precision they have not.

    Raises:
        ValueError: they have not.
    """
    for name, value in network.state_dict().items():
        saved = state.get(name)
        if isinstance(value, Tensor) and isinstance(saved, Tensor) and saved.dtype != value.dtype:
            raise ValueError(
                f"the network must have the precision of the checkpoint, in which {name} is {saved.dtype}, got "
                f"{value.dtype}: train on with the precision that it was begun with"
            )


def check_optimizer(optimizer: Optimizer, *trained: nn.Module) -> None:
    """That an optimizer trains what requires a gradient.

    Raises:
        ValueError: it holds no such parameter.

    Warns:
        UserWarning: it leaves some out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for module in trained for name, p in module.named_parameters() if p.requires_grad}
    left = [name for p, name in names.items() if id(p) not in held]
    if len(left) == len(names):
        raise ValueError(
            "optimizer must hold parameters of the network that require a gradient, got none of them: make it from "
            "what it is called with, and unfreeze what is to be trained"
        )
    if left:
        warnings.warn(
            f"the optimizer leaves out {len(left)} of {len(names)} parameters that require a gradient, {left[0]} among "
            "them, which will not change: give it all, or freeze these with requires_grad_(False)",
            stacklevel=3,
        )


def fit(
    network: Network | AdaptedModel,
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
    whole. In the end it is in training mode, and no
    gradients are left.

    Args:
        network: trained in place, moved to the fabric's device. Inputs are taken to its dtype. What it returns is the
            objective's matter; where that is not logits ``(B, classes)`` the accuracy is NaN.
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
        run: where checkpoints are kept; if it holds one called ``checkpoint`` the training goes on from there and
            ends, on one device, with the same weights to the last bit as if it had never stopped. Of several processes
            only the first needs one: it reads for all.
        checkpoint: name of the resume state.
        clip_norm: largest norm of the gradient of all parameters together; it is scaled down to this.
        accumulate: parts in which a batch comes, one after the other, for less memory: the gradient is that of the
            whole batch, but for batch norms, which see a part at a time, and for what is no mean over samples: the cost
            "norm", and a lambda, which grows with the loss of one part.
        compile: record the network through ``torch.compile``.
        progress: label of a progress bar; none without it.
        fabric: Lightning Fabric; one CPU if not given. Its ``precision="64-true"``, ``"bf16-true"`` or ``"16-true"``
            converts the network, ``"32-true"`` takes it in the dtype it has; losses are in float32 at least.
            ``"bf16-mixed"`` is automatic mixed precision, in which weights, outputs and measures stay in float32.
            Launched on several processes (``torchrun``), each
            takes its share of every batch, and their gradients are averaged: what comes out is what one process finds,
            but for batch norms, which see a share at a time, and for a cost that is no mean over samples. After every
            epoch all go on with the first one's buffers.

    Returns:
        The finished training, with one row of metrics per epoch.

    Raises:
        DivergedError: a loss or a weight is not finite, or the loss above ``loss_limit``, and no callback recovers.
        TypeError: no objective, or an output that it, or with validation the evaluation, cannot read.
        ValueError: arguments out of range, a batch with fewer samples than there are processes, an optimizer without
            the network's parameters, mixed precision of a float64 network, or a checkpoint of another precision.
    """
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if objective is not None and not isinstance(objective, Objective):
        raise TypeError(
            f"objective must be an odenets Objective, got {objective!r}: a task of one's own is a subclass whose "
            "forward returns its loss"
        )
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    smallest = len(batches.data) % batches.size or min(batches.size, len(batches.data))
    if smallest < fabric.world_size:
        raise ValueError(
            f"batches must hold a sample for each of {fabric.world_size} processes, got one of {smallest}: "
            "choose another batch size"
        )
    objective = (objective or CrossEntropy()).to(fabric.device)
    network.to(fabric.device, _dtype(fabric, network))
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        with torch.no_grad(), keeping_state(network), evaluating(network):
            network(inputs_for(network, batches.data.x[:2]))
    made = optimizer(network)
    training = Training(network, made, schedule(made) if schedule else None, objective)
    state = fabric.broadcast(run.load_state(checkpoint) if run and fabric.is_global_zero else None)
    if state is not None:
        training.load_state_dict(state, optimizer)
    step: Any = None
    served: list[int] = []  # parameters that Fabric knows of
    batches = replace(batches, data=data_for(network, batches.data))
    if validation is not None:
        validation = Batches(data_for(network, validation.data), validation.size)
    frozen: list[nn.Module] = []
    started = time.perf_counter() - (training.rows[-1]["seconds"] if training.rows else 0.0)
    bar = tqdm(total=epochs, initial=training.epoch, desc=progress, disable=progress is None, unit="epoch", leave=False)
    recovering = any(getattr(callback, "recovers", False) for callback in callbacks)
    with bar:
        while training.epoch < epochs:
            before = copy.deepcopy(training.state_dict()) if recovering else None
            if list(map(id, network.parameters())) != served:  # at first, and after callbacks have edited blocks
                step = None
                check_optimizer(training.optimizer, network, objective)
                if fabric.world_size > 1:
                    gc.collect()  # so that no hooks of an earlier set-up are left
                check = validation is not None
                step = partial(_step, *_set_up(training, fabric), training, fabric, clip_norm, accumulate, check)
                served = list(map(id, network.parameters()))
            frozen = to_training_mode(network, frozen)
            with _compiled(network) if compile else nullcontext():
                loss, accuracy = _train_epoch(training, step, batches, fabric)
            measured = None
            if validation is not None and math.isfinite(loss):
                with fabric.autocast() if fabric.strategy.precision.precision in TRUE else nullcontext():
                    measured = evaluate(network, validation)
            if trouble := _trouble(training, loss, measured, loss_limit):
                spent = training.evaluations
                if before is not None:
                    training.load_state_dict(before, optimizer)
                    training.evaluations = spent
                if before is None or not any(callback.on_divergence(training) for callback in callbacks):
                    raise DivergedError(
                        f"epoch {training.epoch + 1} diverged, {trouble}: lower the learning rate, refine the steps or "
                        "normalize the inputs; the last checkpoint stands"
                    )
                continue
            training.epoch += 1
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
            if measured is not None:
                row |= {"validation_loss": measured.loss, "validation_accuracy": measured.accuracy}
            for callback in callbacks:
                callback.after_epoch(training, row)
            row |= {"evaluations": training.evaluations, "check_evaluations": training.check_evaluations}
            row["seconds"] = time.perf_counter() - started
            training.rows.append(row)
            if run is not None and fabric.is_global_zero:
                run.save_state(training.state_dict(), checkpoint)
                run.log(training.rows)
            bar.update()
            bar.set_postfix({k: f"{row[k]:.3g}" for k in ("train_loss", "validation_accuracy", "depth") if k in row})
    to_training_mode(network, frozen)
    training.optimizer.zero_grad()
    return training


def to_training_mode(network: nn.Module, frozen: Sequence[nn.Module] = ()) -> list[nn.Module]:
    """Put a network in training mode; the modules that are frozen in eval mode.

    Where it is in training mode already, those are the ones in eval mode, which stay so; otherwise those named. A new
    container around a network in eval mode, in which nothing that learns is in training mode, does not count.
    """
    learning = (m.training for m in network.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
    if not network.training or not any(learning):
        network.train()
        for module in frozen:
            module.training = False
    return [module for module in network.modules() if not module.training]


def data_for(network: nn.Module, data: TensorData) -> TensorData:
    """A data set on the device of a network, inputs in its dtype."""
    x = inputs_for(network, data.x)
    return replace(data, x=x, y=data.y.to(x.device))


def _dtype(fabric: Fabric, network: nn.Module) -> torch.dtype | None:
    """What the weights are to be converted to before a checkpoint is loaded, if they are."""
    precision, dtype = str(fabric.strategy.precision.precision), dtype_of(network)
    if precision.endswith("mixed") and dtype == torch.float64:
        raise ValueError(
            f"fabric's precision {precision!r} mixes float32 weights with half precision, got a network in float64: "
            'take precision="64-true", or network.float()'
        )
    return TRUE.get(precision)


class _Recording(nn.Module):
    """A network whose forward pass is :meth:`Network.record`, so that precision and processes are Fabric's matter."""

    def __init__(self, network: Network | AdaptedModel, measures: dict[str, Measure]) -> None:
        super().__init__()
        self.network, self.measures = network, measures

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], tuple[int, ...]]:
        output, records = self.network.record(x, **self.measures)
        return output, dict(records), records.starts


def _set_up(training: Training, fabric: Fabric) -> tuple[Any, Any]:
    """The network as Fabric calls it, and its optimizer."""
    return fabric.setup(_Recording(training.network, training.objective.measures), training.optimizer)


def _trouble(training: Training, loss: float, measured: Evaluation | None, loss_limit: float) -> str | None:
    """What went wrong in an epoch, if anything did."""
    if not (math.isfinite(loss) and loss <= loss_limit):
        return f"its training loss is {loss}"
    if measured is not None and not math.isfinite(measured.loss):
        return f"its validation loss is {measured.loss}"
    if not is_finite(training.network):
        return "it left weights that are not finite"
    return None


@contextmanager
def _compiled(network: Network | AdaptedModel) -> Iterator[None]:
    """The network with its ``record`` compiled, which on leaving is what it was."""
    before = vars(network).get("record")
    network.record = torch.compile(network.record)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.record
        if before is not None:
            network.record = before


def _train_epoch(
    training: Training, step: Callable[[Tensor, Tensor], Tensor], batches: Batches, fabric: Fabric
) -> tuple[float, float]:
    """Mean training loss and accuracy of an epoch, cut short once the loss is not finite.

    That is looked at every batch on a CPU and every 32nd elsewhere, where looking means to wait for the device; not
    where several processes train, which must all take the same steps.
    """
    network = training.network
    totals = torch.zeros(2, dtype=total_dtype(fabric.device), device=fabric.device)
    every = 1 if fabric.device.type == "cpu" else 32
    for i, (x, y) in enumerate(batches.epoch(training.epoch), 1):
        totals += step(x, y)
        training.evaluations += network.evaluations * len(x)
        if i % every == 0 and fabric.world_size == 1 and not math.isfinite(totals[0].item()):
            break
    totals = cast(Tensor, fabric.all_reduce(totals, reduce_op="sum"))
    if fabric.world_size > 1:  # each has seen its own shares
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
    loss, accuracy = (totals / len(batches.data)).tolist()
    return loss, accuracy


def _step(
    module: Any,
    optimizer: Any,
    training: Training,
    fabric: Fabric,
    clip_norm: float | None,
    accumulate: int,
    validated: bool,
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """One step of the optimizer with this process' share of a batch: its summed loss, and how many are right."""
    network, objective = training.network, training.objective
    whole, shares = len(x), fabric.world_size
    x, y = x[fabric.global_rank :: shares], y[fabric.global_rank :: shares]
    totals = torch.zeros(2, dtype=total_dtype(x.device), device=x.device)
    double = fabric.strategy.precision.precision == "64-true"  # or Fabric would round outputs to the default dtype
    optimizer.zero_grad()
    size = -(-len(x) // accumulate)
    parts = list(zip(x.split(size), y.split(size), strict=True))
    for i, part in enumerate(parts, 1):
        with fabric.no_backward_sync(module, enabled=i < len(parts)):
            with fabric.init_tensor() if double else nullcontext():
                output, records, starts = module(part[0])
            if validated:
                logits_and_labels(output, part[1])
            loss = objective(network, part, output, Records(records, starts))
            check_loss(loss, objective)
            fabric.backward(loss * (len(part[0]) * shares / whole))
        with torch.no_grad():
            totals += torch.stack([loss.detach().to(totals.dtype) * len(part[0]), right_answers(output, part[1])])
    if clip_norm is not None:
        fabric.clip_gradients(module, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    optimizer.step()
    with fabric.autocast():
        after_step(objective, network, parts[-1])
    return totals
