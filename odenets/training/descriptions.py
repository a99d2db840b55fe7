"""What a training is called with, as plain values, by which a resume tells what is another now."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from odenets.measures.marking import Measure
from odenets.neural_ode import NeuralODE
from odenets.training.data import Batches
from odenets.training.metrics import Metric
from odenets.training.objectives import Objective

__all__ = ["described_data", "described_settings", "text_of", "warn_of_changes"]

LOOKED_AT = 256
"""Numbers of a tensor that its checksum is of."""


def described_settings(network: nn.Module, objective: Objective, metric: Metric | None, **more: Any) -> dict[str, Any]:
    """The settings of a training by the names of its arguments: plain values, names of functions, and objects' own.

    Of a network those of its neural ODEs; those of its flows are in :func:`odenets.checkpoints.structure`.

    Args:
        network, objective: of the training.
        metric: of the training, if there is one.
        more: further settings, plain values.
    """
    odes = {name: one.extra_repr() for name, one in network.named_modules() if isinstance(one, NeuralODE)}
    return {
        **{f"network.{name}".rstrip("."): shown for name, shown in odes.items()},
        **_flat("objective", objective),
        "metric": metric and text_of(metric.function),
        **more,
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    """An objective and what it is made with, by place."""
    if not isinstance(value, nn.Module):
        return {name: text_of(value)}
    parts = [_flat(f"{name}.{key}", one) for key, one in _made_with(value).items()]
    return {name: type(value).__name__} | {key: one for part in parts for key, one in part.items()}


def described_data(data: Any, name: str) -> dict[str, Any]:
    """Data by what costs nothing to look at: kinds and lengths, and tensors in memory, of which some numbers.

    No batch is drawn of what draws it, a DataLoader or an iterable.

    Args:
        data: what ``fit`` is called with, or None.
        name: of the argument.
    """
    if data is None:
        return {name: None}
    parts: dict[str, Any] = {"": type(data).__name__}
    if isinstance(data, Batches):
        parts |= {"size": data.size, "seed": data.seed, "crop": data.crop, "flip": data.flip}
        parts |= {"samples": len(data.data)}
        parts |= _tensors({"data.x": data.data.x, "data.y": data.data.y})
    elif isinstance(data, DataLoader):
        parts |= {"batch_size": data.batch_size, "sampler": type(data.sampler).__name__, "drop_last": data.drop_last}
        parts |= {"dataset": type(data.dataset).__name__, "samples": _length(data.dataset)}
        if isinstance(data.dataset, TensorDataset):
            parts |= _tensors({f"dataset.tensors[{i}]": x for i, x in enumerate(data.dataset.tensors)})
    else:
        first = data[0] if isinstance(data, list | tuple) and data else None
        leaves = [leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)]
        parts |= {"length": _length(data)} | _tensors({f"tensor {i} of the first": x for i, x in enumerate(leaves)})
    return {f"{name}.{key}".rstrip("."): value for key, value in parts.items()}


def warn_of_changes(begun: Mapping[str, Any], now: Mapping[str, Any], place: str, stacklevel: int) -> None:
    """Name what a training goes on with that is not what it began with.

    Args:
        begun: descriptions in the checkpoint; what it does not hold is not compared.
        now: those of this call.
        place: of the checkpoint.
        stacklevel: of the warning.

    Warns:
        UserWarning: some differ.
    """
    changed = [f"{key}={now[key]} where it has {begun[key]}" for key in now if key in begun and now[key] != begun[key]]
    if changed:
        warnings.warn(
            f"{place}the training goes on with other data or settings than it began with, got {', '.join(changed)}: "
            "the weights will be those of neither; begin anew in another folder for one of them",
            stacklevel=stacklevel + 1,
        )


def text_of(value: Any, depth: int = 4) -> str:
    """A setting as text: numbers and names, of a function its name, of an object what it was made with, as far as kept.

    >>> from odenets.training import CrossEntropy, Task
    >>> text_of(CrossEntropy(label_smoothing=0.1)), text_of(Task(torch.nn.HuberLoss(delta=2.0)))
    ('CrossEntropy(label_smoothing=0.1)', "Task(function=HuberLoss(reduction='mean', delta=2.0))")
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 8 else f"tensor {_checksum(value)}"
    if isinstance(value, partial):
        given = [text_of(one, depth - 1) for one in value.args]
        given += [f"{key}={text_of(one, depth - 1)}" for key, one in value.keywords.items()]
        return f"{text_of(value.func, depth - 1)}({', '.join(given)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {text_of(one, depth - 1)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"[{', '.join(text_of(one, depth - 1) for one in value)}]"
    if isinstance(value, Measure):
        return repr(value)
    if (name := getattr(value, "__name__", None)) is not None or depth < 1:
        return str(name or type(value).__name__)
    return f"{type(value).__name__}({', '.join(f'{k}={text_of(v, depth - 1)}' for k, v in _made_with(value).items())})"


def _made_with(value: Any) -> dict[str, Any]:
    """The arguments of an object that it keeps under their names, but for those that are empty."""
    made: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__[:-1]):
        with suppress(TypeError, ValueError):  # of a class that has no signature to show
            for name in [*inspect.signature(kind.__init__).parameters][1:]:
                for held in (name, f"_{name}"):
                    if held in vars(value) or held in getattr(value, "_modules", {}) | getattr(value, "_buffers", {}):
                        made[name] = getattr(value, held)
    return {name: one for name, one in made.items() if not (isinstance(one, Mapping | list | tuple) and not one)}


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _checksum(x) for name, x in tensors.items()}


def _checksum(x: Tensor) -> str:
    """Shape, dtype, and a checksum of some of its numbers, spread evenly over it."""
    known = f"{' x '.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
    if x.layout != torch.strided or x.is_nested:
        return known
    count = min(x.numel(), LOOKED_AT)
    some = torch.arange(count) * (x.numel() - 1) // max(count - 1, 1)
    index = torch.unravel_index(some.to(x.device), x.shape) if x.ndim else ()
    numbers = x.detach()[index].reshape(-1).cpu().contiguous().view(torch.uint8)
    return f"{known} (checksum {zlib.crc32(numbers.numpy().data):08x})"
