"""What functions read, and functions and other settings as text that is the same in every process."""

from __future__ import annotations

import dis
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["described", "read_by"]

_PLAIN = (Enum, type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_NAMED = (type, ModuleType, BuiltinFunctionType, MethodDescriptorType, np.ufunc)
_INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platlib", "purelib"))


def read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads and is not handed, by name: of the functions around it, of its module, its defaults."""
    yield from _held_by(function)
    names = _global_names(function.__code__)
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)


def _held_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What it closes over, and its defaults."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # of a name that is not bound yet
            continue
    yield from ((code.co_name, default) for default in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def _global_names(code: CodeType) -> list[str]:
    """Of a function and those within it, in the order of their code."""
    names = {step.argval: None for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for part in code.co_consts:
        names |= dict.fromkeys(_global_names(part)) if isinstance(part, CodeType) else {}
    return list(names)


def described(value: Any, name: str, known: Iterable[Any] = ()) -> str:
    """A setting as text that is equal where it computes the same: a number, a tensor, a function, a dataclass of such.

    A function is its code with what it reads, one that is installed its name; so another release of Python may tell it
    otherwise.

    Args:
        value: the setting.
        name: of it, for errors.
        known: what is told elsewhere.

    Raises:
        TypeError: it holds what is no such value.

    >>> def power(n):
    ...     return lambda x: x**n
    >>> described(power(2), "norm") == described(power(2), "norm"), described(power(2), "f") == described(power(3), "f")
    (True, False)
    """
    return "\n".join(_lines(value, name, {id(one): f"known {i}" for i, one in enumerate(known)}))


def _lines(value: Any, name: str, seen: dict[int, str]) -> Iterator[str]:
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if isinstance(value, Tensor | np.ndarray | np.generic):
        x = value.detach().cpu().contiguous() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        yield f"{tuple(x.shape)} {x.dtype} {sha256(x.reshape(-1).view(torch.uint8).numpy().data).hexdigest()}"
        return
    if id(value) in seen:
        yield seen[id(value)]
        return
    seen = seen | {id(value): f"again {len(seen)}"}
    yield f"{_name_of(value)} ("
    for key, part in _parts(value, name):
        yield f"{key}:"
        yield from _lines(part, f"{name}.{key}" if key else name, seen)
    yield ")"


def _name_of(value: Any) -> str:
    named = value if isinstance(value, (FunctionType, *_NAMED)) else type(value)
    if isinstance(value, FunctionType) and not _is_installed(value.__code__):
        return "function"
    return f"{getattr(named, '__module__', '')} {getattr(named, '__qualname__', named.__name__)}"


def _is_installed(code: CodeType) -> bool:
    return code.co_filename.startswith(_INSTALLED)


def _parts(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    """What a value is made of, by name."""
    if isinstance(value, _NAMED):
        owner = getattr(value, "__self__", None)
        return () if owner is None or isinstance(owner, type | ModuleType) else [("", owner)]
    if isinstance(value, FunctionType):
        return _held_by(value) if _is_installed(value.__code__) else [("code", value.__code__), *read_by(value)]
    if isinstance(value, CodeType):
        return [("", value.co_code), ("", value.co_names), ("", value.co_consts)]
    if isinstance(value, MethodType):
        return [("", value.__func__), ("", value.__self__)]
    if isinstance(value, partial):
        return [("", value.func), ("", value.args), ("", value.keywords)]
    if isinstance(value, Mapping):
        return [(f"{key!r}", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [("", part) for part in value]
    if isinstance(value, set | frozenset):
        return [("", part) for part in sorted(value, key=repr)]
    held = (
        {one.name: getattr(value, one.name) for one in fields(value)}
        if is_dataclass(value)
        else getattr(value, "__dict__", None)
    )
    if held is None:
        raise TypeError(
            f"{name} must be a number, a tensor, a function, or an object of such, to have a fingerprint, got "
            f"{type(value).__name__}: let a function or a dataclass hold what it computes with"
        )
    call = vars(type(value)).get("__call__")
    return [*held.items(), *([("", call)] if isinstance(call, FunctionType) else [])]
