"""Tensors and modules as a forward pass saw them, put back while a backward pass calls the field."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solvers.solution import Solution

__all__ = ["Buffer", "Known", "Snapshot"]

_DICTIONARIES = ("_parameters", "_buffers", "_modules")
_MISSING = object()
_FEW = 100_000
_PLAIN = {bool, int, float, str, type(None)}
_TABLES = {dict, OrderedDict, set, list, tuple}


@dataclass
class _Part:
    """A module as it was: what its dictionaries held, and the tensors with a gradient among its plain attributes."""

    reference: weakref.ref[nn.Module]
    kind: type[nn.Module]
    training: bool
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]
    versions: dict[str, int]
    children: dict[str, int | nn.Module | None]
    attributes: dict[str, Tensor]
    whole: bool
    rest: dict[str, Any] = attribute(default_factory=dict)


class Buffer(NamedTuple):
    """A buffer: where it is held, by which name, and its version."""

    held: dict[str, Any]
    name: str
    tensor: Tensor
    version: int


@dataclass
class Known:
    """A tensor as it was: its version, and another tensor of the same memory."""

    tensor: Tensor
    version: int
    alias: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Known:
        """The tensor as it is now."""
        return cls(tensor, _version(tensor), tensor.detach())

    def now(self, cut: bool) -> Tensor:
        """The tensor, or what stands for it where its data was replaced, or its history is to be ``cut`` off.

        Raises:
            RuntimeError: its data was changed in place.
        """
        x, old = self.tensor, self.alias
        if _version(x) != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(old.shape)} that the field reads was changed in place since the forward "
                "pass (by an optimizer's step or load_state_dict?): call backward() before it changes"
            )
        same = x.dtype == old.dtype and x.device == old.device and x.shape == old.shape
        if same and _address(x) == _address(old) and not (cut and x.grad_fn is not None):
            return x
        return old.detach().requires_grad_(x.requires_grad)


class Snapshot:
    """The modules that a field is, is bound to or closes over, and those in its arguments.

    They are held as weakly as their owner holds them, so that what is kept on a module does not keep the module; where
    nobody holds them any more, copies with the same tensors stand for them.

    Args:
        field: what is called.
        args: its further arguments, however nested.

    Attributes:
        weights: the parameters, and the tensors with a gradient among plain attributes, by their identity.
    """

    def __init__(self, field: Callable[..., Any], args: Any) -> None:
        self._parts: list[_Part] = []
        self._index: dict[int, int] = {}
        self._visit(field, whole=isinstance(field, nn.Module))
        for value in tree_leaves(args):
            self._visit(value, whole=False)
        self._loose = _loosened(field, self._index)
        self.weights = self._weights()

    def _weights(self) -> dict[int, Tensor]:
        parts = (x for part in self._parts for x in (*part.parameters.values(), *part.attributes.values()))
        return {id(x): x for x in parts if x is not None}

    @property
    def own(self) -> list[Tensor]:
        """The parameters of the module that the field is."""
        return [p for part in self._parts if part.whole for p in part.parameters.values() if p is not None]

    def buffers(self) -> list[Buffer]:
        """The buffers of the modules as they are now."""
        modules = [module for part in self._parts if (module := part.reference()) is not None]
        held = [(module._buffers, name, x) for module in modules for name, x in module._buffers.items()]
        return [Buffer(of, name, x, _version(x)) for of, name, x in held if x is not None]

    def close(self, read: set[int]) -> None:
        """The forward pass is over, and read these tensors: note what it changed itself."""
        for part in self._parts:
            part.attributes = {name: x for name, x in part.attributes.items() if id(x) in read}
            few = sum(x.numel() for x in part.buffers.values() if x is not None) <= _FEW
            for name, x in part.buffers.items():  # what the field changes itself, running statistics without a version
                if x is not None and ((part.training and few) or part.versions.get(name) != _version(x)):
                    part.buffers[name] = x.detach().clone()
                    part.versions[name] = -1
            module = part.reference()
            if module is not None:
                part.rest = vars(module).copy()
                lost = [k for k, v in _held(module).items() if k not in part.attributes and _has_history(v)]
                for name in (*_DICTIONARIES, *lost):
                    part.rest.pop(name, None)
        self._index, self.weights = {}, self._weights()

    @contextmanager
    def restored(self, now: Mapping[int, Tensor]) -> Iterator[Callable[..., Any]]:
        """While a backward pass calls the field: yields the field, with its modules as they were.

        Args:
            now: what stands for a weight, by the identity of that.

        Raises:
            RuntimeError: a buffer was changed in place since.
        """
        modules = self._resolve()
        undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for part, module in zip(self._parts, modules, strict=True):
                values = vars(module)
                if part.parameters or values["_parameters"]:
                    _exchange(values["_parameters"], {k: now.get(id(p), p) for k, p in part.parameters.items()}, undo)
                if part.buffers or values["_buffers"]:
                    _exchange(values["_buffers"], {k: self._buffer(part, k, x) for k, x in part.buffers.items()}, undo)
                if part.children or values["_modules"]:
                    children = {k: modules[i] if isinstance(i, int) else i for k, i in part.children.items()}
                    _exchange(values["_modules"], children, undo)
                plain: dict[str, Any] = {k: now.get(id(x), x) for k, x in part.attributes.items()}
                plain["training"] = part.training
                if any(values.get(k) is not x for k, x in plain.items()):
                    undo.append((values, {k: values.get(k, _MISSING) for k in plain}))
                    values.update(plain)
            yield self._loose(modules)
        finally:
            for values, old in reversed(undo):
                values.update(old)
                for name in [k for k, x in values.items() if x is _MISSING]:
                    del values[name]

    def _visit(self, value: Any, whole: bool, depth: int = 0) -> None:
        """Note the modules in ``value``; ``whole``: everything they hold is the field's."""
        if isinstance(value, nn.Module):
            if id(value) in self._index or isinstance(value, torch.jit.ScriptModule):
                return
            self._index[id(value)] = len(self._parts)
            attributes = _held(value)
            tensors = {k: v for k, v in attributes.items() if isinstance(v, Tensor) and v.requires_grad}
            buffers = dict(value._buffers)
            versions = {name: _version(x) for name, x in buffers.items() if x is not None}
            part = _Part(
                weakref.ref(value), type(value), value.training, dict(value._parameters), buffers, versions, {},
                tensors, whole,
            )  # fmt: skip
            self._parts.append(part)
            for name, child in value._modules.items():
                self._visit(child, whole, depth)
                part.children[name] = self._index.get(id(child), child)
            for held in attributes.values():
                if isinstance(held, list | tuple | dict) and depth < 4:
                    self._visit(held, whole, depth + 1)
        elif depth > 4:
            return
        elif isinstance(value, MethodType):
            self._visit(value.__self__, whole, depth + 1)
            self._visit(value.__func__, whole, depth + 1)
        elif isinstance(value, partial):
            for held in (value.func, *value.args, *value.keywords.values()):
                self._visit(held, whole, depth + 1)
        elif isinstance(value, FunctionType):
            names = value.__code__.co_names
            modules = [v for n in names if isinstance(v := value.__globals__.get(n), nn.Module)]
            for held in (*modules, *_contents(value), *(value.__defaults__ or ())):
                self._visit(held, False, depth + 1)
        elif isinstance(value, list | tuple | set | frozenset | dict):
            for held in value.values() if isinstance(value, dict) else value:
                if isinstance(held, nn.Module | MethodType | partial | FunctionType | list | tuple | dict):
                    self._visit(held, whole, depth + 1)
        elif depth <= 1 and callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            for held in vars(value).values():
                self._visit(held, False, depth + 2)

    def _buffer(self, part: _Part, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if part.versions[name] == -1:
            return x.clone()
        if part.whole and part.versions[name] != _version(x):
            raise RuntimeError(
                f"the buffer {name!r} of {part.kind.__name__} was changed since the forward pass: call backward() first"
            )
        return x

    def _resolve(self) -> list[nn.Module]:
        """The modules, or what stands for them."""
        modules: list[nn.Module] = []
        for part in self._parts:
            module = part.reference()
            if module is None:
                module = part.kind.__new__(part.kind)
                vars(module).update(part.rest)
                vars(module).update({name: {} for name in _DICTIONARIES})
            modules.append(module)
        return modules


def _loosened(value: Any, index: dict[int, int]) -> Callable[[list[nn.Module]], Any]:
    """``value`` as a function of the modules in it, which it does not hold."""
    if isinstance(value, nn.Module) and id(value) in index:
        i = index[id(value)]
        return lambda modules: modules[i]
    if isinstance(value, MethodType) and id(value.__self__) in index:
        i, function = index[id(value.__self__)], value.__func__
        return lambda modules: MethodType(function, modules[i])
    if isinstance(value, partial):
        call, args = _loosened(value.func, index), [_loosened(x, index) for x in value.args]
        named = {key: _loosened(x, index) for key, x in value.keywords.items()}
        return lambda ms: partial(call(ms), *(x(ms) for x in args), **{key: x(ms) for key, x in named.items()})
    if isinstance(value, FunctionType) and any(id(x) in index for x in _contents(value)):
        code, names, defaults, keywords = value.__code__, value.__globals__, value.__defaults__, value.__kwdefaults__
        name, cells = value.__name__, [_loose_cell(cell, index) for cell in value.__closure__ or ()]

        def function(modules: list[nn.Module]) -> FunctionType:
            rebuilt = FunctionType(code, names, name, defaults, tuple(cell(modules) for cell in cells))
            rebuilt.__kwdefaults__ = keywords
            return rebuilt

        return function
    return lambda modules: value


def _loose_cell(cell: CellType, index: dict[int, int]) -> Callable[[list[nn.Module]], CellType]:
    try:
        content = cell.cell_contents
    except ValueError:
        return lambda modules: cell
    if id(content) not in index:
        return lambda modules: cell
    i = index[id(content)]
    return lambda modules: CellType(modules[i])


def _contents(function: FunctionType) -> Iterator[Any]:
    """What a function closes over."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            continue


def _held(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beside its dictionaries, but plain values and empty collections, as most are."""
    return {
        k: v
        for k, v in vars(module).items()
        if (kind := type(v)) not in _PLAIN and (kind not in _TABLES or (v and k not in _DICTIONARIES))
    }


def _has_history(value: Any) -> bool:
    """Whether an attribute of a module holds the result of a computation, which may hold the module."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if isinstance(value, dict):
        return bool(value) and any(map(_has_history, value.values()))
    return isinstance(value, Solution) or (isinstance(value, list | tuple) and any(map(_has_history, value)))


def _exchange(values: dict[str, Any], new: dict[str, Any], undo: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Make ``values`` equal to ``new`` where it is not, and note what it was."""
    if values.keys() == new.keys() and all(values[name] is x for name, x in new.items()):
        return
    undo.append((values, dict.fromkeys(new, _MISSING) | values))
    values.clear()
    values.update(new)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _address(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0
