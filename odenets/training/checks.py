"""What a training is called with: checked before anything trains, and what else it is called elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from inspect import getattr_static
from numbers import Real

from torch import nn

from odenets.errors import check_count, check_number
from odenets.recording import is_recorder
from odenets.training.objectives import Objective, Task

__all__ = ["check_arguments", "check_network", "check_objective", "check_recorder", "check_task", "other_names"]

RECORDER = ("record", "steps", "depth", "h", "evaluations")

_OTHER_NAMES = {
    "network": ("model", "net", "module"),
    "batches": ("loader", "dataloader", "train_loader", "train_dataloader", "train_dataloaders", "data", "dataset"),
    "epochs": ("max_epochs", "num_epochs", "n_epochs", "nb_epochs", "num_train_epochs"),
    "objective, such as Task(F.mse_loss)": ("criterion", "loss", "loss_fn", "loss_function", "loss_func"),
    "lr_scheduler": ("schedule", "scheduler", "rate", "lr_schedule"),
    "optimizer, as partial(torch.optim.SGD, lr=0.1)": ("lr", "learning_rate", "optim", "optimizers"),
    "metric, one function or object": ("metrics", "metric_fn"),
    "validation": (
        "valid", "val", "val_loader", "valid_loader", "validation_loader", "val_dataloader", "val_dataloaders",
        "validation_data", "valid_data", "val_data", "eval_loader",
    ),
    "collate": ("collate_fn",),
    "callbacks, as [EarlyStopping(patience=5)]": ("callback", "early_stopping", "patience"),
    "clip_norm": ("gradient_clip_val", "grad_clip", "clip_grad_norm", "max_norm", "max_grad_norm"),
    "accumulate, a number of parts": ("accumulate_grad_batches", "gradient_accumulation_steps"),
    "progress, the label of a bar": ("verbose", "progress_bar", "enable_progress_bar"),
    "fabric, as Fabric(accelerator='cuda', devices=1, precision='bf16-mixed', loggers=[...])": (
        "device", "devices", "accelerator", "precision", "strategy", "logger", "loggers", "amp",
    ),
}  # fmt: skip


def other_names(*arguments: str, **more: str) -> dict[str, str]:
    """Arguments of a training by the names that they have in other libraries, for :func:`odenets.errors.renamed`.

    Args:
        arguments: that it has.
        more: further names, or these with other arguments.
    """
    ours = [one for one in _OTHER_NAMES if one.partition(",")[0] in arguments]
    return {name: one for one in ours for name in _OTHER_NAMES[one]} | more


def check_network(network: object, call: str = "fit(network, batches, ...)") -> nn.Module:
    """A network, which is an instance of a module.

    Raises:
        TypeError: it is none.
    """
    if isinstance(network, type):
        raise TypeError(f"network must be an instance, got the class {network.__name__}: call it")
    if isinstance(network, nn.Module):
        return network
    kind = type(network).__name__
    if not is_recorder(network) and isinstance(network, Iterable) and not isinstance(network, str):
        raise TypeError(f"network must come first, {call}, got {kind}, which looks like batches")
    raise TypeError(f"network must be a torch.nn.Module, got {kind}")


def check_recorder(network: object) -> nn.Module:
    """A network that can be trained as a whole by what it records.

    Raises:
        TypeError: it is none.
    """
    network = check_network(network)
    kind = type(network).__name__
    if trainer := getattr(network, "trained_by", None):
        raise TypeError(f"network must be one that is trained as a whole, got {kind}: take {trainer}")
    if not (missing := [name for name in RECORDER if not _has(network, name)]):
        return network
    must = "network must be a module that records its steps, an odenets.Recorder"
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"{must}, got one in {kind}: pass network.module, and fabric=Fabric(devices=2, strategy='ddp')")
    if callable(getattr(network, "training_step", None)):
        inner = _inside(network)
        which = f"self.{inner}" if inner else "the network in it"
        raise TypeError(f"{must}, got {kind}, a LightningModule: pass {which}, or let Lightning's Trainer train it")
    if len(missing) < len(RECORDER):
        has = [name for name in RECORDER if name not in missing]
        raise TypeError(f"{must}, which has {', '.join(RECORDER)}, got {kind} with {', '.join(has)} alone")
    if inner := _inside(network):
        raise TypeError(
            f"{must}, got {kind} with a {type(network.get_submodule(inner)).__name__} in it at {inner!r}: write it as "
            f"odenets.Network(encoder, flow, head), or give it {', '.join(RECORDER)}"
        )
    raise TypeError(f"{must}, got {kind}: odenets.adapt makes one of any residual network")


def _has(network: nn.Module, name: str) -> bool:
    """Whether it has an attribute; a property is not asked for, which may cost or raise."""
    return getattr_static(network, name, None) is not None or hasattr(network, name)


def _inside(network: nn.Module) -> str | None:
    """The name of the first module in it that records its steps."""
    return next((name for name, module in network.named_modules() if name and is_recorder(module)), None)


def check_objective(objective: object) -> Objective:
    """An objective.

    Raises:
        TypeError: it is none.
    """
    if isinstance(objective, Objective):
        return objective
    must = "objective must be an odenets Objective"
    if isinstance(objective, type):
        call = f"{objective.__name__}(...)"
        call = call if issubclass(objective, Objective) else f"odenets.training.Task({call})"
        raise TypeError(f"{must}, got the class {objective.__name__}: call it, {call}")
    raise TypeError(
        f"{must}, got {objective!r}: odenets.training.Task makes one of any function (output, y) -> loss"
        + (f", Task({name})" if (name := getattr(objective, "__name__", None)) else "")
    )


def check_arguments(
    *, epochs: int, clip_norm: float | None, accumulate: int, progress: object, loss_limit: float
) -> None:
    """That arguments are in range.

    Raises:
        TypeError, ValueError: they are not.
    """
    check_count("epochs", epochs, 0)
    check_count("accumulate", accumulate, 1)
    if clip_norm is not None and not check_number("clip_norm", clip_norm) > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if math.isnan(check_number("loss_limit", loss_limit)):
        raise ValueError("loss_limit must be a number, infinity for none, got NaN")
    if progress is not None and not isinstance(progress, str):
        raise TypeError(f'progress must be the label of a bar, such as progress="label", got {progress!r}')


def check_task(task: object) -> None:
    """That a task is an objective.

    Raises:
        TypeError: it is none.
    """
    if isinstance(task, Objective):
        return
    got = type(task).__name__
    if isinstance(task, Real):
        remedy = f": a number is lambda0={task} of LeastAction, or the first argument of ActionPenalty"
    elif isinstance(task, str):
        got = repr(task)
        remedy = ": text comes by keyword, the kind of ErrorPenalty, the cost of ActionPenalty and LeastAction"
    elif isinstance(task, type):
        call = f"{task.__name__}({'F.mse_loss' if issubclass(task, Task) else ''})"
        got = f"the class {task.__name__}"
        remedy = f": call it, {call if issubclass(task, Objective) else f'Task({call})'}"
    else:
        remedy = f": Task({getattr(task, '__name__', repr(task))}) is one" if callable(task) else ""
    raise TypeError(f"task must be an objective, got {got}{remedy}")
