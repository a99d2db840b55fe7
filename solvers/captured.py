"""A field as a forward pass saw it, for the backward pass that calls it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from solvers.solution import Solution
from solvers.states import is_transformed

__all__ = ["Captured", "owner_of", "restored", "stored", "tensors_of"]

_DICTIONARIES = ("_parameters", "_buffers", "_modules")
_MISSING = object()
_FEW = 100_000
_Node = Any


def tensors_of(name: str, collection: Any) -> list[Tensor]:
    """What gets gradients, each tensor once: of a collection, of a module, or the values of a dictionary.

    Raises:
        TypeError: one tensor instead of a collection, or entries that are no tensors.
        ValueError: an iterator that has been read to its end.
    """
    if isinstance(collection, Tensor):
        raise TypeError(f"{name} must be a collection of tensors, got one tensor: pass [tensor]")
    if isinstance(collection, nn.Module):
        collection = list(collection.parameters())
    if isinstance(collection, str | bytes) or not isinstance(collection, Iterable):
        raise TypeError(f"{name} must be a collection of tensors, got {type(collection).__name__}")
    entries = list(collection.values() if isinstance(collection, Mapping) else collection)
    if not entries and isinstance(collection, Iterator):
        raise ValueError(f"{name}: the iterator yields nothing, it can be read once only: pass a list, or () for none")
    tensors: dict[int, Tensor] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, Tensor | nn.Module):
            raise TypeError(f"{name} must hold tensors, got {type(entry).__name__} at position {i}")
        for tensor in [entry] if isinstance(entry, Tensor) else entry.parameters():
            if tensor.requires_grad:
                tensors[id(tensor)] = tensor
    return list(tensors.values())


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


@dataclass
class _Known:
    """A tensor as it was: its version, and another tensor of the same memory."""

    tensor: Tensor
    version: int
    alias: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Known:
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


class Captured:
    """Calls a field; what it read in a forward pass it reads again in the backward pass, whatever has changed since.

    The modules that a field is, is bound to or closes over are held as weakly as their owner holds them, so that what
    is kept on a module does not keep the module; where nobody holds them any more, copies with the same tensors stand
    for them.

    Args:
        field: called with a time, a state and further arguments.
        parameters: what gets gradients, as the caller passed it; None for the tensors that the field reads.
        args: further arguments of the field, whose tensors get gradients.
        names: of the field, of ``parameters``, and of what to use instead, for errors.
        recompute: whether gradients flow through a graph that is computed again, to whatever the field reads.
        random: whether the field may draw random numbers.

    Attributes:
        tensors: what gets gradients; complete once the forward pass is over.
        looks: how often a later pass was seen to read what the forward pass read.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        parameters: Any,
        args: Sequence[Any] = (),
        *,
        names: tuple[str, str, str],
        recompute: bool = False,
        random: bool = False,
    ) -> None:
        self._names, self._random, self._recompute = names, random, recompute
        self._open = parameters is None or recompute
        owner = owner_of(field) if parameters is None else parameters
        self.tensors = tensors_of(names[1], [*tensors_of(names[1], () if owner is None else owner), *_tensors_in(args)])
        self._parts: list[_Part] = []
        self._index: dict[int, int] = {}
        self._visit(field, whole=isinstance(field, nn.Module))
        for value in tree_leaves(args):
            self._visit(value, whole=False)
        self._field: Callable[..., Any] | None = field
        self._loose = _loosened(field, self._index)
        self._known: dict[int, _Known] = {}
        self._now: dict[int, Tensor] = {}
        self._read: set[int] = set()
        self.looks = 0
        self._inputs: list[Tensor] = []
        self._calls, self._back, self._unclaimed = 0, False, dict[int, weakref.ref[Tensor]]()

    def __call__(self, *args: Any) -> Any:
        return self.field(*args) if self._calls > 1 else self._watch(*args)

    @property
    def field(self) -> Callable[..., Any]:
        """What is called, while a pass calls it."""
        assert self._field is not None
        return self._field

    @contextmanager
    def forward(self, device: torch.device) -> Iterator[None]:
        """While a forward pass calls the field."""
        if self._recompute and torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
            self._refuse_transforms()
        self._device = device
        kind = device.type
        self._autocast = None
        if torch.amp.is_autocast_available(kind):
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._autocast = (kind, dtype, enabled, torch.is_autocast_cache_enabled())
        try:
            yield
        finally:
            self._field = None
        if self._calls == 1:
            self._claim([leaf for reference in self._unclaimed.values() if (leaf := reference()) is not None])
        self._close()

    @contextmanager
    def again(self, *, cut: bool = False) -> Iterator[list[Tensor]]:
        """While a backward pass calls the field: everything as it was; yields the tensors that get gradients.

        Args:
            cut: without what the tensors of its modules were computed from, so that one's gradient holds no other's.

        Raises:
            RuntimeError: a tensor was changed in place since.
        """
        modules = self._resolve()
        within = {id(x) for part in self._parts for x in (*part.parameters.values(), *part.attributes.values())}
        now = {key: known.now(cut and key in within) for key, known in self._known.items()}
        if any(x is not self._known[key].tensor and key not in within for key, x in now.items()):
            raise RuntimeError("the data of a tensor that the field reads was replaced since the forward pass")
        outer = self._field, self._calls, self._back, self._unclaimed, self._now
        undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for part, module in zip(self._parts, modules, strict=True):
                values = vars(module)
                _exchange(values["_parameters"], {k: now.get(id(p), p) for k, p in part.parameters.items()}, undo)
                _exchange(values["_buffers"], {k: self._buffer(part, k, x) for k, x in part.buffers.items()}, undo)
                children = {k: modules[i] if isinstance(i, int) else i for k, i in part.children.items()}
                _exchange(values["_modules"], children, undo)
                plain = {k: now.get(id(x), x) for k, x in part.attributes.items()} | {"training": part.training}
                if any(values.get(k) is not x for k, x in plain.items()):
                    undo.append((values, {k: values.get(k, _MISSING) for k in plain}))
                    values.update(plain)
            calls = 2 if self._recompute and self.looks > 1 else 0  # not a look at every step
            self._field, self._calls, self._back, self._unclaimed = self._loose(modules), calls, True, {}
            self._now = now
            with torch.autocast(*self._autocast) if self._autocast else nullcontext():
                yield [now.get(id(x), x) for x in self.tensors]
        finally:
            self.looks += self._back and self._calls > 1
            self._field, self._calls, self._back, self._unclaimed, self._now = outer
            for values, old in reversed(undo):
                values.update(old)
                for name in [k for k, x in values.items() if x is _MISSING]:
                    del values[name]

    # -- what the field is -----------------------------------------------------------------------------------------

    def _visit(self, value: Any, whole: bool, depth: int = 0) -> None:
        """Note the modules in ``value``; ``whole``: everything they hold is the field's."""
        if isinstance(value, nn.Module):
            if id(value) in self._index or isinstance(value, torch.jit.ScriptModule):
                return
            self._index[id(value)] = len(self._parts)
            attributes = vars(value)
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
            for name, held in attributes.items():
                if name not in _DICTIONARIES and isinstance(held, list | tuple | dict) and depth < 4:
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

    def _close(self) -> None:
        """What is known when a forward pass is over."""
        read = {id(x) for x in self.tensors} | set(self._known)
        for part in self._parts:
            module = part.reference()
            if part.whole:
                for p in part.parameters.values():
                    if p is not None and id(p) not in self._known:
                        self._known[id(p)] = _Known.of(p)
            part.attributes = {name: x for name, x in part.attributes.items() if id(x) in read}
            few = sum(x.numel() for x in part.buffers.values() if x is not None) <= _FEW
            for name, x in part.buffers.items():  # what the field changes itself, running statistics without a version
                if x is not None and ((part.training and few) or part.versions.get(name) != _version(x)):
                    part.buffers[name] = x.detach().clone()
                    part.versions[name] = -1
            if module is not None:
                part.rest = {
                    k: v
                    for k, v in vars(module).items()
                    if k not in _DICTIONARIES and (k in part.attributes or not _has_history(v))
                }
        for x in self.tensors:
            if id(x) not in self._known:
                self._known[id(x)] = _Known.of(x)
        self._leave_out_what_arrives_through_others()
        self._index = {}

    def _leave_out_what_arrives_through_others(self) -> None:
        """The leaves of a tensor that cannot be cut off get their gradient through it, and would get it twice."""
        within = {id(x) for part in self._parts for x in (*part.parameters.values(), *part.attributes.values())}
        through = [x for x in self.tensors if x.grad_fn is not None and id(x) not in within]
        behind = {id(x) for x in _reads([], 0, set(), [(x.grad_fn, x.output_nr) for x in through])[0]}
        if self._recompute or not behind:
            return
        unread = any(id(x) not in self._read for x in through)
        if any(key in self._read and (unread or key in {id(x) for x in self.tensors}) for key in behind):
            raise ValueError(
                f"{self._names[1]}: {self._names[0]} reads a tensor, and another that was computed from it is to get a "
                "gradient: hand over the tensor that is read, or compute the other one inside"
            )
        self.tensors = [x for x in self.tensors if id(x) not in behind]

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

    # -- what it reads ---------------------------------------------------------------------------------------------

    def _watch(self, *args: Any) -> Any:
        """The first two calls of a pass: which tensors with a gradient does the field read, does it draw at random?"""
        first, graph = self._calls == 0, torch.is_grad_enabled()
        self._calls += 1
        if torch.compiler.is_compiling():
            return self.field(*args)
        if any(is_transformed(x) for x in (*tree_leaves(args), *self.tensors) if isinstance(x, Tensor)):
            self._refuse_transforms()
        if not graph:
            args = (*(tree_map_only(Tensor, Tensor.detach, x) for x in args[:2]), *args[2:])
        state = None if first or self._random or self._back else _random_state(self._device)
        with torch.enable_grad():
            mark = torch.zeros((), dtype=torch.float32, requires_grad=True).view(()).grad_fn._sequence_nr()  # type: ignore[union-attr]
            v = self.field(*args)
        if state is not None and not all(map(torch.equal, state, _random_state(self._device))):
            raise ValueError(
                f"{self._names[0]} draws random numbers at every call (dropout in training mode?): called again it is "
                f"another field, and the gradient is wrong. Draw once before the solve, or use {self._names[2]}"
            )
        outputs = [x for x in tree_leaves(v) if isinstance(x, Tensor)]
        if any(map(is_transformed, outputs)):
            self._refuse_transforms()
        self._note(outputs, mark, [x for x in tree_leaves(args[:2]) if isinstance(x, Tensor)], first)
        return v if graph else tree_map_only(Tensor, Tensor.detach, v)

    def _refuse_transforms(self) -> None:
        raise RuntimeError(
            "transforms of torch.func (grad, vjp, jacrev, vmap, ...) cannot go through a gradient that calls the field "
            f"again: use {self._names[2]}, or torch.autograd.grad"
        )

    def _note(self, outputs: list[Tensor], mark: int, inputs: list[Tensor], first: bool) -> None:
        if self._recompute and not self._back:  # the first state may also be read as itself
            self._inputs += [x for x in inputs if x.requires_grad and x.is_leaf]
        candidates = {id(x): x for x in (*self.tensors, *self._inputs, *self._now.values())}
        for part in self._parts:
            candidates |= {id(x): x for x in (*part.parameters.values(), *part.attributes.values()) if x is not None}
        made = {(x.grad_fn, x.output_nr): x for x in candidates.values() if x.grad_fn is not None}
        own = {id(x) for x in inputs}
        stops = set(made) | {(x.grad_fn, x.output_nr) for x in inputs if x.grad_fn is not None}
        leaves, outside = _reads(outputs, mark, stops)
        leaves = [x for x in leaves if id(x) not in own]
        self._read |= {id(x) for x in (*leaves, *(made[edge] for edge in outside if edge in made))}
        self._known |= {
            id(x): _Known.of(x) for x in (*leaves, *(made[edge] for edge in outside if edge in made))
            if not self._back and id(x) in candidates and id(x) not in self._known
        }  # fmt: skip
        if not self._open:
            return
        for node, number in () if self._recompute else outside:
            if (node, number) in stops:
                continue
            behind, _ = _reads([], 0, stops, [(node, number)])
            if not all(id(x) in candidates or id(x) in own for x in behind):
                raise ValueError(
                    f"{self._names[0]} reads a tensor computed outside of it ({type(node).__name__}), whose gradient "
                    f"would be lost: hand over what gets gradients in {self._names[1]}"
                )
        if not self._back:
            self._claim([made[edge] for edge in outside if edge in made])
            self._claim([x for x in leaves if id(x) in candidates])
        unclaimed = {id(x): x for x in leaves if id(x) not in candidates}
        if first:
            self._unclaimed = {key: weakref.ref(x) for key, x in unclaimed.items()}
            return
        # one that the field makes itself is another at every call
        both = [x for key, x in unclaimed.items() if key in self._unclaimed and self._unclaimed[key]() is x]
        if both and self._back:
            raise RuntimeError(
                f"{self._names[0]} reads other tensors than in the forward pass, one of shape {tuple(both[0].shape)}: "
                "call backward() before the field or its modules are replaced"
            )
        self._claim(both)

    def _claim(self, tensors: Iterable[Tensor]) -> None:
        known = {id(x) for x in self.tensors}
        for x in tensors:
            if not self._recompute and id(x) not in known:
                known.add(id(x))
                self.tensors.append(x)
            if id(x) not in self._known:
                self._known[id(x)] = _Known.of(x)


def owner_of(field: Any) -> Any:
    """The module whose parameters are those of the field, or a list of such; None where nothing says what they are."""
    if isinstance(field, nn.Module):
        return field
    if isinstance(field, MethodType):
        return owner_of(field.__self__)
    if isinstance(field, partial):
        owner = owner_of(field.func)
        return None if owner is None else [owner, *_tensors_in((field.args, field.keywords))]
    return None


def stored(rate: Tensor, like: Tensor) -> Tensor:
    """A rate of change of a tensor as a part of a state with the dtype of ``like``."""
    return (torch.view_as_real(rate) if rate.is_complex() and not like.is_complex() else rate).to(like)


def restored(x: Tensor, like: Tensor) -> Tensor:
    """A gradient from such a part, in the dtype of the tensor ``like``."""
    if like.is_complex() and not x.is_complex():
        x = torch.complex(x[..., 0].contiguous(), x[..., 1].contiguous())
    return (x if like.is_complex() else x.real).to(like)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors and the parameters of the modules in ``value``, however nested."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.parameters()


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
            found = FunctionType(code, names, name, defaults, tuple(cell(modules) for cell in cells))
            found.__kwdefaults__ = keywords
            return found

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


def _reads(
    outputs: list[Tensor], mark: int, stops: set[Any], edges: Sequence[tuple[_Node, int]] = ()
) -> tuple[list[Tensor], list[tuple[_Node, int]]]:
    """The leaves that tensors depend on, and the edges to what was computed before ``mark`` or is in ``stops``."""
    leaves: dict[int, Tensor] = {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    stack = [*edges, *((x.grad_fn, x.output_nr) for x in outputs if x.grad_fn is not None)]
    outside, seen = list[tuple[_Node, int]](), set[Any]()
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if edge in stops:
            outside.append(edge)
        elif type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = node.variable
        elif hasattr(node, "_sequence_nr") and node._sequence_nr() < mark:
            outside.append(edge)
        else:
            stack.extend(node.next_functions)
    return list(leaves.values()), outside


def _has_history(value: Any) -> bool:
    """Whether an attribute of a module holds the result of a computation, which may hold the module."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if isinstance(value, dict):
        return any(map(_has_history, value.values()))
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


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
