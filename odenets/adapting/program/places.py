"""Places: where tensors pass the borders of modules and functions, and where they are in arguments and outputs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Code", "Path", "Place", "Site", "at", "code_of", "line_of", "tensors_in"]

Path = tuple[int | str, ...]
"""Where a tensor is in the arguments or the output of a module: positions, keys, attributes."""

Code = tuple[str, str, int | None, int | None, int | None]
"""Where a function is called: file, name of the code around it, line and columns."""


class Site(NamedTuple):
    """A call of a function: the dotted name of the module in whose forward pass it is, and the code there."""

    module: str
    code: Code


class Place(NamedTuple):
    """Where tensors pass: the input or output of a module, or of a function.

    Attributes:
        of: the dotted name of the module; or the site of a call of a function.
        side: "input" or "output".
        path: where among the arguments, by position or keyword, or in the output.

    >>> Place("layer1.0", "input")
    Place(of='layer1.0', side='input', path=())
    """

    of: str | Site
    side: Literal["input", "output"]
    path: Path = ()

    @property
    def is_module(self) -> bool:
        """Whether it is the border of a module."""
        return isinstance(self.of, str)


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested tuples, lists, mappings and data classes, a ``value``, with their paths behind ``path``.

    >>> [path for path, _ in tensors_in((torch.zeros(1), {"mask": torch.zeros(1)}))]
    [(0,), (1, 'mask')]
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if isinstance(key, str | int):
                yield from tensors_in(one, (*path, key))
    elif isinstance(value, tuple | list):
        for i, one in enumerate(value):
            yield from tensors_in(one, (*path, i))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), (*path, field.name))


def at(value: Any, path: Path) -> Any:
    """What is in a ``value`` at a ``path``; None where there is nothing.

    >>> at({"states": (1, 2)}, ("states", 1)), at((1, 2), (5,))
    (2, None)
    """
    for key in path:
        if isinstance(value, Tensor):
            return None
        try:
            holds = isinstance(value, Mapping | tuple | list)
            value = value[key] if holds else getattr(value, str(key))
        except (LookupError, AttributeError, TypeError):
            return None
    return value


_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_CALL = nn.Module._call_impl.__code__.co_filename
_POSITIONS: dict[CodeType, list[Any]] = {}


def code_of(depth: int) -> tuple[Code | None, Any]:
    """The code that calls a function, ``depth`` frames above: the innermost that is not torch's, and where it is in it.

    Returns:
        The code, None outside modules and in this room's own; and the frame of the call of the module around it.
    """
    frame: Any = sys._getframe(depth + 1)
    caller = None
    while frame is not None and frame.f_code.co_filename != _CALL:
        if caller is None or (_is_of_torch(caller) and not _is_of_torch(frame)):
            caller = frame
        frame = frame.f_back
    if caller is None or frame is None or caller.f_code.co_filename.startswith(_OURS):
        return None, frame
    code = caller.f_code
    if code not in _POSITIONS:  # of a call, whose instruction moves as Python specializes it
        _POSITIONS[code] = [(line, column, end) for line, _, column, end in code.co_positions()]
    return (code.co_filename, code.co_qualname, *_POSITIONS[code][caller.f_lasti // 2]), frame


def _is_of_torch(frame: Any) -> bool:
    return bool(frame.f_code.co_filename.startswith(_TORCH))


def line_of(depth: int) -> str:
    """The line of code outside torch that is run, ``depth`` frames above or further: "model.py:12"."""
    frame: Any = sys._getframe(depth + 1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS)):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
