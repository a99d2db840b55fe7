"""What a neural ODE takes, checked: its field, its event, its settings and its times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.blocks import check_arguments
from odenets.functions import read_by
from odenets.normalization import StageBatchNorm
from solvers import SemiLinear, Separable
from solvers.separable import Slope
from solvers.validation import check_call, check_state

__all__ = [
    "SETTINGS",
    "check_event",
    "check_field",
    "check_measured",
    "check_mixing",
    "is_times",
    "owner_of",
    "time_of",
]

_DEPTH = 4  # how far a function's parts are followed
SETTINGS = {
    name: known
    for known, names in {
        "solver, the name of a method": ("method",),
        "tolerance=Tolerance(rtol=1e-3, atol=1e-6)": ("rtol", "atol", "tol"),
        'gradient="backsolve"': ("adjoint", "sensitivity", "use_adjoint", "adjoint_method", "adjoint_options"),
        "steps, the number of equal steps, or Tolerance(first_step=, max_step=)": (
            "options", "step_size", "depth", "h", "dt", "dt0", "h0", "n_steps", "num_steps",
        ),
        "tolerance=Tolerance(max_steps=1000)": ("max_steps", "max_num_steps"),
        "t0 and t1, and in the call at: ode(x, at=times)": (
            "t", "ts", "t_span", "t_eval", "times", "at", "saveat", "total_time",
        ),
        "the field, a module that holds what trains": ("adjoint_params", "parameters", "params"),
        "event": ("event_fn", "events"),
        "the call: ode(x, *args)": ("args",),
        "gradient=solvers.Reversible(coupling=0.999)": ("coupling",),
    }.items()
    for name in names
}  # fmt: skip


def check_field(field: Any) -> None:
    """That a field is a velocity whose parameters are seen.

    Raises:
        TypeError: no function of t and x, or a function, also a part of a field with a structure, that reads modules or
            parameters.
    """
    if not callable(field) or isinstance(field, type):
        raise TypeError(f"field must be a velocity v(t, x), a module or a function, got {field!r:.80}")
    check_arguments(field, None)
    _check_seen("field", field)
    modules = [*field.modules()] if isinstance(field, nn.Module) else []
    for module in modules:
        for name, part in vars(module).items() if isinstance(module, SemiLinear | Separable | Slope) else ():
            if isinstance(part, Tensor) and part.requires_grad:
                raise TypeError(f"{name} must be an nn.Parameter, which an optimizer sees, got a tensor that is none")
            if isinstance(part, FunctionType | MethodType | partial):
                _check_seen(name, part, modules)


def check_event(event: Any) -> None:
    """That an event is a function of t and x whose parameters are seen.

    Raises:
        TypeError: it is not.
    """
    if not callable(event) or isinstance(event, type):
        raise TypeError(f"event must be a function (t, x), got {event!r:.80}")
    check_call(event, name="event")
    _check_seen("event", event)


def owner_of(function: Any) -> nn.Module | None:
    """The module whose method a function is."""
    owner = function.__self__ if isinstance(function, MethodType) else None
    return owner if isinstance(owner, nn.Module) else None


def _check_seen(name: str, function: Any, known: Sequence[nn.Module] | None = None) -> None:
    owner = owner_of(function)  # any one, or one of those known
    if isinstance(function, nn.Module) or (owner is not None and (known is None or owner in known)):
        return
    hidden = next(_trained(function, getattr(function, "__name__", type(function).__name__), _DEPTH, set()), None)
    if hidden is not None:
        raise TypeError(
            f"{name} must be a module where it reads one: a function hides {hidden!r}, whose parameters no optimizer "
            "would see; put the function into the forward of a module that holds it"
        )


def _trained(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[str]:
    """The names of modules, and of tensors that require a gradient, within a function or another object."""
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad):
        yield name
        return
    if id(value) in seen or not depth or isinstance(value, Tensor | type | ModuleType | str | bytes | int | float):
        return
    seen.add(id(value))
    for key, part in _parts(value):
        yield from _trained(part, key or name, depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[str | None, Any]]:
    """What a function reads, what an object or a collection holds, by name where it has one."""
    if isinstance(value, FunctionType):
        if (value.__module__ or "").partition(".")[0] not in ("torch", "numpy"):
            yield from read_by(value)
    elif isinstance(value, MethodType):
        yield from ((None, value.__self__), (None, value.__func__))
    elif isinstance(value, partial):
        parts = ((None, arg) for arg in value.args)
        yield from ((type(value.func).__name__, value.func), *parts, *value.keywords.items())
    elif isinstance(value, Mapping):
        yield from ((None, part) for part in value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((None, part) for part in value)
    else:
        yield from getattr(value, "__dict__", {}).items()
        yield None, vars(type(value)).get("__call__")


def check_measured(x: Any, *, finite: bool) -> None:
    """That x is a batch of states that steps are measured from, real or complex.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be one tensor (B, *S) where steps are measured, got {type(x).__name__}: join its parts, with "
            "torch.cat, and part them in the field"
        )
    if finite:
        for part in (x.real, x.imag) if x.is_complex() else (x,):
            check_state(part)


def check_mixing(field: Any) -> None:
    """That a field treats samples apart, as control per sample has it.

    Raises:
        ValueError: it holds batch norm in training mode.
    """
    owner = field if isinstance(field, nn.Module) else owner_of(field)
    for module in () if owner is None else owner.modules():
        batch_norm = isinstance(module, StageBatchNorm | nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                "field must treat each sample as if it were alone with control='sample', but batch norm in training "
                "mode reads the whole batch, at other times and steps: take control='batch', or norm='group' or 'layer'"
            )


def time_of(name: str, t: Any) -> Any:
    """A start or end as a number, or ``(B,)`` of them on the CPU, where the steps are chosen.

    Raises:
        ValueError: it requires a gradient, which gets lost.
    """
    if isinstance(t, Tensor):
        if t.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, which would be lost: detach it; gradients flow to times in the "
                "call, ode(x, at=times)"
            )
        return t.cpu() if t.ndim else t.item()
    return torch.tensor(np.array(t, np.float64)) if isinstance(t, list | tuple | np.ndarray) and np.ndim(t) else t


def is_times(value: Any) -> bool:
    """Whether a value looks like times: a number or some in a row, as a tensor, an array or a list."""
    return not isinstance(value, str | Mapping) and len(getattr(value, "shape", np.shape(value))) <= 1
