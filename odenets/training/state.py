"""The state of a training: what callbacks see of it, what a checkpoint holds, and whether the two fit."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from odenets.checkpoints import map_state, restore_structure, structure
from odenets.modes import random_state, set_random_state
from odenets.training.objectives import CrossEntropy, Objective

if TYPE_CHECKING:
    from lightning_fabric.plugins import Precision

__all__ = ["Training", "check_optimizer", "check_precision", "load_optimizer", "make_schedule", "optimizer_state"]


@dataclass
class Training:
    """A training run as callbacks see it.

    Attributes:
        network, optimizer, schedule: being trained; the network is a module and a :class:`~odenets.Recorder`.
        objective: what is minimized.
        epoch: epochs completed.
        rows: one dictionary of metrics per completed epoch.
        evaluations: field evaluations per sample, summed over all samples of all training steps so far.
        check_evaluations: the same for what callbacks measured besides.
        precision: Fabric's, which may scale losses by a factor that follows from earlier steps.
    """

    network: Any
    optimizer: Optimizer
    schedule: LRScheduler | None
    objective: Objective = field(default_factory=CrossEntropy)
    epoch: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    check_evaluations: int = 0
    precision: Precision | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and plain values."""
        return {
            "structure": structure(self.network),
            "network": self.network.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.network),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "objective": self.objective.state_dict(),
            "precision": self.precision.state_dict() if self.precision else {},
            "epoch": self.epoch,
            "rows": json.dumps(self.rows),
            "evaluations": self.evaluations,
            "check_evaluations": self.check_evaluations,
        } | random_state()

    def snapshot(self) -> dict[str, Any]:
        """:meth:`state_dict` in tensors of its own, in the host's memory: training on does not change it."""
        return map_state(_copied, self.state_dict())

    def load_state_dict(self, state: dict[str, Any], make_optimizer: Callable[[Any], Optimizer]) -> None:
        """Take up :meth:`state_dict`: blocks first, then the optimizer on their parameters.

        Raises:
            ValueError: weights of another precision, another optimizer, or a schedule on one side only.
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
        load_optimizer(self.optimizer, self.network, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        if self.precision and state.get("precision"):
            self.precision.load_state_dict(state["precision"])
        self.epoch = state["epoch"]
        self.rows = json.loads(state["rows"])
        self.evaluations, self.check_evaluations = state["evaluations"], state["check_evaluations"]
        set_random_state(state)


def _copied(place: str, value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def make_schedule(make: Callable[[Optimizer], LRScheduler] | None, optimizer: Optimizer) -> LRScheduler | None:
    """The learning-rate schedule of an optimizer, if there is one.

    Raises:
        TypeError: its steps need a metric.
    """
    schedule = make(optimizer) if make else None
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError(
            "a learning-rate schedule must step without a metric, got ReduceLROnPlateau: take one of epochs alone, or "
            "lower the rate in a callback"
        )
    return schedule


def optimizer_state(optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """Its ``state_dict``, its class, and the names that the network has for the parameters of each group."""
    return optimizer.state_dict() | {"class": type(optimizer).__name__, "names": _names(optimizer, network)}


def load_optimizer(optimizer: Optimizer, network: nn.Module, state: dict[str, Any]) -> None:
    """Take up :func:`optimizer_state`, whatever the order of the parameters within the groups.

    Raises:
        ValueError: it is that of another optimizer, or of other parameters.
    """
    kind, names = type(optimizer).__name__, _names(optimizer, network)
    if state.get("class", kind) != kind:
        raise ValueError(f"optimizer must be that of the checkpoint, {state['class']}, got {kind}")
    saved = state.get("names", names)
    if [sorted(group) for group in saved] != [sorted(group) for group in names]:
        raise ValueError("optimizer must hold the parameters that it held in the checkpoint, in the same groups")
    groups = []
    for group, old, new in zip(state["param_groups"], saved, names, strict=True):
        of = {key: dict(zip(old, group[key], strict=True)) for key in ("params", "param_names") if key in group}
        groups.append(group | {key: [by_name[name] for name in new] for key, by_name in of.items()})
    optimizer.load_state_dict(state | {"param_groups": groups})


def _names(optimizer: Optimizer, network: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group; of those that are not the network's, their numbers in the group."""
    names, groups = {p: name for name, p in network.named_parameters()}, []
    for group in optimizer.param_groups:
        numbers = itertools.count()
        groups.append([names.get(p) or f"#{next(numbers)}" for p in group["params"]])
    return groups


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


def check_optimizer(optimizer: Optimizer, *trained: nn.Module, stacklevel: int = 3) -> None:
    """That an optimizer trains what requires a gradient; a warning is of the line so many calls above.

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
            stacklevel=stacklevel,
        )
