"""Optimizers and learning rates: made of parameters, checked, stepped, saved, and taken up again."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from odenets.training.sharding import sharded_like

__all__ = [
    "Interval",
    "MakeLRScheduler",
    "MakeOptimizer",
    "check_optimizer",
    "check_scheduler",
    "load_optimizer",
    "load_scheduler",
    "make_lr_scheduler",
    "make_optimizer",
    "optimizer_state",
    "scheduler_state",
    "step_lr_scheduler",
]

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters, as ``partial(torch.optim.SGD, lr=0.1)`` does."""

MakeLRScheduler = Callable[[Optimizer], LRScheduler]
"""Makes a scheduler of an optimizer, as ``partial(torch.optim.lr_scheduler.StepLR, step_size=30)`` does."""

Interval = Literal["epoch", "step"]


def make_optimizer(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of parameters.

    Raises:
        TypeError: what makes it is an optimizer already, or no function of parameters, or makes none, or one whose
            steps need a closure.
        ValueError: there are no parameters.
    """
    remedy = "pass a function of the parameters, partial(torch.optim.SGD, lr=0.1)"
    if isinstance(make, Optimizer):
        raise TypeError(
            "optimizer must be made once the network has all its parameters, got an instance of "
            f"{type(make).__name__}: {remedy}"
        )
    if not callable(make):
        raise TypeError(f"optimizer must be a function of parameters, got {type(make).__name__}: {remedy}")
    parameters = list(parameters)
    if not parameters:
        raise ValueError("network must have parameters to train, got none")
    try:
        optimizer = make(parameters)
    except AttributeError as error:
        if error.obj is not parameters:
            raise
        raise TypeError(
            f"optimizer must take the list of the network's parameters, got one that takes the network and asks for "
            f"its {error.name!r}: {remedy}; for groups of parameters take them from your network, "
            "lambda _: torch.optim.SGD([{'params': network.head.parameters()}, ...])"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}: {remedy}")
    closure = next(iter([*inspect.signature(type(optimizer).step).parameters.values()][1:]), None)
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"optimizer must take steps without a closure, got {type(optimizer).__name__}: {remedy}, or write a loop "
            "of your own, in which objective(network, x, y) is the loss"
        )
    return optimizer


def make_lr_scheduler(
    make: MakeLRScheduler | None, optimizer: Optimizer, interval: Interval = "epoch"
) -> LRScheduler | None:
    """The scheduler of an optimizer's learning rates, if there is one.

    Raises:
        TypeError: what makes it is a scheduler already, or no function of an optimizer, or makes none.
        ValueError: an unknown interval, one without a scheduler, or ReduceLROnPlateau each step or for a quantity that
            is to grow.
    """
    if interval not in ("epoch", "step"):
        raise ValueError(f"lr_interval must be 'epoch' or 'step', got {interval!r}")
    if make is None:
        if interval != "epoch":
            raise ValueError(f"lr_interval is of a scheduler, got lr_interval={interval!r} without lr_scheduler")
        return None
    remedy = "pass a function of the optimizer, partial(torch.optim.lr_scheduler.StepLR, step_size=30)"
    if isinstance(make, LRScheduler) or not callable(make):
        raise TypeError(f"lr_scheduler must be a function of the optimizer, got {type(make).__name__}: {remedy}")
    if missing := _required(make):
        name = getattr(make, "__name__", type(make).__name__)
        raise TypeError(
            f"lr_scheduler must be a function of the optimizer alone, but {name} takes {', '.join(missing)} too: pass "
            f"partial({name}, {', '.join(f'{one}=...' for one in missing)})"
        )
    scheduler = make(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"lr_scheduler must return a scheduler of torch.optim, got {type(scheduler).__name__}: {remedy}"
        )
    if interval == "step" and isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("lr_interval must be 'epoch' for ReduceLROnPlateau, which reads the loss of an epoch")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != "min":
        raise ValueError(f"mode of ReduceLROnPlateau must be 'min', since it reads a loss, got {scheduler.mode!r}")
    return scheduler


def _required(make: Callable[..., Any]) -> list[str]:
    """What a function must be called with beside its first argument."""
    try:
        parameters = [*inspect.signature(make).parameters.values()][1:]
    except (TypeError, ValueError):  # of a function that has none to show
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def step_lr_scheduler(scheduler: LRScheduler, loss: float) -> None:
    """One step of a scheduler; ReduceLROnPlateau reads the loss."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def scheduler_state(scheduler: LRScheduler | None) -> dict[str, Any] | None:
    """Its ``state_dict`` and its class; None without one."""
    return None if scheduler is None else scheduler.state_dict() | {"class": _kind(scheduler)}


def check_scheduler(scheduler: LRScheduler | None, state: dict[str, Any] | None) -> None:
    """That a scheduler is of the class of one that :func:`scheduler_state` tells of.

    Raises:
        ValueError: it is of another, or there is one on one side only.
    """
    if (scheduler is None) != (state is None):
        which = "one, and this training has none" if scheduler is None else "none, and this training has one"
        raise ValueError(f"lr_scheduler must be that of the checkpoint, which has {which}")
    if scheduler is not None and state is not None and state.get("class", here := _kind(scheduler)) != here:
        raise ValueError(f"lr_scheduler must be that of the checkpoint, {state['class']}, got {here}")


def load_scheduler(scheduler: LRScheduler | None, state: dict[str, Any] | None) -> None:
    """Take up :func:`scheduler_state`.

    Raises:
        ValueError: it is that of another scheduler.
    """
    check_scheduler(scheduler, state)
    if scheduler is not None and state is not None:
        scheduler.load_state_dict({key: value for key, value in state.items() if key != "class"})


def _kind(scheduler: LRScheduler) -> str:
    """Its class, with those of the schedulers that it is made of."""
    parts = [_kind(part) for part in getattr(scheduler, "_schedulers", ())]
    return type(scheduler).__name__ + (f"({', '.join(parts)})" if parts else "")


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
    groups, parameters = [], {}
    for group, old, new, here in zip(state["param_groups"], saved, names, optimizer.param_groups, strict=True):
        of = {key: dict(zip(old, group[key], strict=True)) for key in ("params", "param_names") if key in group}
        groups.append(group | {key: [by_name[name] for name in new] for key, by_name in of.items()})
        parameters |= dict(zip(groups[-1]["params"], here["params"], strict=True))
    values = {
        number: {key: sharded_like(parameters[number], value) for key, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    optimizer.load_state_dict(state | {"param_groups": groups, "state": values})


def _names(optimizer: Optimizer, network: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group; of those that are not the network's, their numbers in the group."""
    names, groups = {p: name for name, p in network.named_parameters()}, []
    for group in optimizer.param_groups:
        numbers = itertools.count()
        groups.append([names.get(p) or f"#{next(numbers)}" for p in group["params"]])
    return groups


def check_optimizer(optimizer: Optimizer, *trained: nn.Module, stacklevel: int = 3) -> None:
    """That an optimizer trains what requires a gradient; a warning is of the line so many calls above.

    Raises:
        ValueError: it holds no such parameter.

    Warns:
        UserWarning: it leaves some out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names: dict[Tensor, str] = {
        p: name for module in trained for name, p in module.named_parameters() if p.requires_grad
    }
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
