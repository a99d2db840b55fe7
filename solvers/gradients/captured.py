"""A field as a forward pass saw it, for the backward pass that calls it again."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from solvers.gradients.reads import mark, reads
from solvers.gradients.repeats import FirstCall, random_state
from solvers.gradients.snapshot import Known, Snapshot
from solvers.validation import is_transformed

__all__ = ["BegunAnew", "Captured", "owner_of", "tensors_of"]


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


class BegunAnew(RuntimeError):
    """The field differentiates with respect to its state, which is noted now: the pass is to begin anew."""


class Captured:
    """Calls a field; what it read in a forward pass it reads again in the backward pass, whatever has changed since.

    A field that differentiates with respect to its state (``torch.autograd.grad`` inside) gets a state that requires a
    gradient where a pass keeps no graph; that of a call ends with it.

    Args:
        field: called with a time, a state and further arguments.
        parameters: what gets gradients, as the caller passed it; None for the tensors that the field reads.
        args: further arguments of the field, whose tensors get gradients.
        names: of the field, of ``parameters``, and of what to use instead, for errors.
        recompute: whether gradients flow through a graph that is computed again, to whatever the field reads.
        random: whether the field may draw random numbers.

    Attributes:
        tensors: what gets gradients; complete once the forward pass is over.
        open: whether that is what the field reads, too.
    """

    def __init__(
        self, field: Callable[..., Any], parameters: Any, args: Sequence[Any] = (), *, names: tuple[str, str, str],
        recompute: bool = False, random: bool = False
    ) -> None:  # fmt: skip
        self._names, self._random, self._recompute = names, random, recompute
        self.open = parameters is None or recompute
        owner = owner_of(field) if parameters is None else parameters
        self.tensors = tensors_of(names[1], [*tensors_of(names[1], () if owner is None else owner), *_tensors_in(args)])
        self._claimed = {id(x) for x in self.tensors}
        self._at_first = len(self.tensors)
        self._snapshot = Snapshot(field, args)
        self._at_hand = parameters is None and not recompute and any(x.requires_grad for x in _in_sight(field))
        self._field: Callable[..., Any] | None = field
        self._differentiates, self._first = False, True
        buffers = self._snapshot.buffers()  # but counts, and averages, which normalizations write or read, not both
        self._changing = any(b.tensor.is_floating_point() and not b.name.startswith("running_") for b in buffers)
        self._known: dict[int, Known] = {}
        self._now: dict[int, Tensor] = {}
        self._read: set[int] = set()
        self._looked = False
        self._inputs: list[Tensor] = []
        self._gathered: tuple[Any, dict[int, Tensor], dict[tuple[Any, int], Tensor]] = None, {}, {}
        self._calls, self._back, self._unclaimed = 0, False, dict[int, weakref.ref[Tensor]]()

    def __call__(self, *args: Any) -> Any:
        """The velocity; the first two calls are watched."""
        if self._calls < 2:
            return self._watch(*args)
        return self._with_graph(*args) if self._differentiates else self.field(*args)

    def _with_graph(self, t: Any, x: Any, *args: Any) -> Any:
        """A call of a field that differentiates with respect to its state."""
        keeps = torch.is_grad_enabled()
        if not (keeps and any(part.requires_grad for part in tree_leaves(x))):
            x = _leaves_of(x)
        with torch.enable_grad():
            v = self.field(t, x, *args)
        return v if keeps else tree_map_only(Tensor, Tensor.detach, v)

    @property
    def instead(self) -> str:
        """What to use instead, for errors."""
        return self._names[2]

    @property
    def direct(self) -> str:
        """The same without what calls the field again."""
        return self._names[2].removesuffix(" or 'checkpoint'")

    @property
    def as_it_says(self) -> bool:
        """Whether the field has read the tensors that it is known to have alone, and nothing else is to be watched."""
        return len(self.tensors) == self._at_first and not self._differentiates and not self._changing

    @property
    def precision(self) -> float:
        """That of what is computed under autocast, as the forward pass was; 0 without."""
        return torch.finfo(self._autocast[1]).eps if self._autocast and self._autocast[2] else 0.0

    @property
    def may_read_more(self) -> bool:
        """Whether a function has tensors with a gradient at hand, as at times that its first calls are not at."""
        return self._at_hand or (self.open and any(x.requires_grad for x in self._snapshot.weights.values()))

    def lost(self, what: str) -> str:
        """That the field reads ``what``, which it did not read in its first calls."""
        return (
            f"{self._names[0]} reads {what} that it did not read in its first calls, and its gradient would be lost: "
            f"hand it over in {self._names[1]}, or use {self.direct}; or call backward() before the field or its "
            "modules are replaced"
        )

    def anew(self) -> None:
        """Another part of the field begins, whose first two calls are watched as well."""
        if self._calls == 1 and not self._back:
            self._claim_survivors()
        self._calls = 0

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
        if self._recompute and getattr(parametrize, "_cache_enabled", 0):
            raise RuntimeError(
                f"gradients that call the {self._names[0]} again need its weights anew: leave parametrize.cached() "
                f"before the solve, or use {self._names[2]}"
            )
        self._device = device
        self._autocast = _autocast(device.type)
        try:
            yield
        finally:
            self._field = None
        if self._calls == 1:
            self._claim_survivors()
        self._close()
        self._gathered = None, {}, {}

    @contextmanager
    def again(self, *, cut: bool = False, look: bool = True) -> Iterator[list[Tensor]]:
        """While a backward pass calls the field: everything as it was; yields the tensors that get gradients.

        Args:
            cut: without what the tensors of its modules were computed from, so that one's gradient holds no other's.
            look: at what the field reads now; a pass that calls it for the same gradient again need not.

        Raises:
            RuntimeError: a tensor was changed in place since.
        """
        weights = self._snapshot.weights
        now = {key: known.now(cut and key in weights) for key, known in self._known.items()}
        if any(x is not self._known[key].tensor and key not in weights for key, x in now.items()):
            raise RuntimeError("the data of a tensor that the field reads was replaced since the forward pass")
        outer = self._field, self._calls, self._back, self._unclaimed, self._now
        try:
            with (
                self._snapshot.restored(now) as field,
                nullcontext() if self._autocast == _autocast(self._device.type) else torch.autocast(*self._autocast),
            ):
                calls = 0 if look and not (self._recompute and self._looked) else 2
                self._field, self._calls, self._back, self._unclaimed, self._now = field, calls, True, {}, now
                self._gathered = None, {}, {}
                yield [now.get(id(x), x) for x in self.tensors]
        finally:
            self._looked = self._looked or (look and self._calls > 1)
            self._field, self._calls, self._back, self._unclaimed, self._now = outer
            self._gathered = None, {}, {}

    def _close(self) -> None:
        """What is known when a forward pass is over."""
        self._snapshot.close({id(x) for x in self.tensors} | set(self._known))
        for x in (*self._snapshot.own, *self.tensors):
            if id(x) not in self._known:
                self._known[id(x)] = Known.of(x)
        self._leave_out_what_arrives_through_others()

    def _leave_out_what_arrives_through_others(self) -> None:
        """The leaves of a tensor that cannot be cut off get their gradient through it, and would get it twice."""
        within = self._snapshot.weights
        through = [x for x in self.tensors if x.grad_fn is not None and id(x) not in within]
        behind = {id(x) for x in reads([], 0, set(), [(x.grad_fn, x.output_nr) for x in through])[0]}
        if self._recompute or not behind:
            return
        unread = any(id(x) not in self._read for x in through)
        if any(key in self._read and (unread or key in {id(x) for x in self.tensors}) for key in behind):
            raise ValueError(
                f"{self._names[1]}: {self._names[0]} reads a tensor, and another that was computed from it is to get a "
                "gradient: hand over the tensor that is read, or compute the other one inside"
            )
        self.tensors = [x for x in self.tensors if id(x) not in behind]

    def _watch(self, *args: Any) -> Any:
        """The first two calls of a pass: which tensors with a gradient does the field read, does it draw at random?"""
        first, graph = self._calls == 0, torch.is_grad_enabled()
        self._calls += 1
        if torch.compiler.is_compiling():
            return self.field(*args)
        held = self.tensors if self._first else ()
        if any(is_transformed(x) for x in (*tree_leaves(args), *held) if isinstance(x, Tensor)):
            self._refuse_transforms()
        if self._recompute and not self._back and graph:  # the first state may also be read as itself
            self._inputs += [
                x for x in tree_leaves(args[:2]) if isinstance(x, Tensor) and x.requires_grad and x.is_leaf
            ]
        if not graph:
            args = (*(tree_map_only(Tensor, Tensor.detach, x) for x in args[:2]), *args[2:])
        looks = first and not self._back and (self._first or self._changing)
        before = FirstCall(self._snapshot, self._device) if looks else None
        state = None if first or self._random or self._back else random_state(self._device)
        with torch.enable_grad():
            begun = mark()
            if self._differentiates and not any(x.requires_grad for x in tree_leaves(args[1])):
                args = (args[0], _leaves_of(args[1]), *args[2:])
            try:
                v = self.field(*args)
            except RuntimeError as error:
                if "does not require grad" not in str(error) or any(x.requires_grad for x in tree_leaves(args[1])):
                    raise
                self._differentiates = True
                if graph and self._recompute:  # what the first attempt saved would be looked for again
                    self._calls = 0
                    raise BegunAnew from error
                args = (args[0], _leaves_of(args[1]), *args[2:])
                v = self.field(*args)
        outputs = [x for x in tree_leaves(v) if isinstance(x, Tensor)]
        if state is not None and not all(map(torch.equal, state, random_state(self._device))):
            remedy = f"Draw once before the solve, or use {self._names[2]}"
            self._refuse_other("draws random numbers at every call (dropout in training mode?)", remedy)
        if before is not None and (reason := before.other(self.field, args, outputs)):
            self._refuse_other(reason, f"Put what changes into eval mode, or use {self.direct}")
        if any(map(is_transformed, outputs)):
            self._refuse_transforms()
        self._first = False
        self._note(outputs, begun, [x for x in tree_leaves(args[:2]) if isinstance(x, Tensor)], first)
        return v if graph else tree_map_only(Tensor, Tensor.detach, v)

    def _refuse_other(self, reason: str, remedy: str) -> None:
        raise ValueError(
            f"{self._names[0]} {reason}: called again it is another field, and the gradient is wrong. {remedy}"
        )

    def _refuse_transforms(self) -> None:
        raise RuntimeError(
            "transforms of torch.func (grad, vjp, jacrev, vmap, ...) cannot go through a gradient that calls the field "
            f"again: use {self._names[2]}, or torch.autograd.grad"
        )

    def _candidates(self) -> tuple[dict[int, Tensor], dict[tuple[Any, int], Tensor]]:
        """What may get gradients, by identity and, what was computed, by its node: as long as it is the same."""
        key = len(self.tensors), len(self._inputs), self._back
        if self._gathered[0] != key:
            every = {id(x): x for x in (*self.tensors, *self._inputs, *self._now.values())} | self._snapshot.weights
            by_edge = {(x.grad_fn, x.output_nr): x for x in every.values() if x.grad_fn is not None}
            self._gathered = key, every, by_edge
        return self._gathered[1:]

    def _note(self, outputs: list[Tensor], begun: int, inputs: list[Tensor], first: bool) -> None:
        candidates, by_edge = self._candidates()
        own = {id(x) for x in inputs}
        stops = set(by_edge) | {(x.grad_fn, x.output_nr) for x in inputs if x.grad_fn is not None}
        leaves, outside = reads(outputs, begun, stops)
        leaves = [x for x in leaves if id(x) not in own]
        read = {id(x): x for x in (*leaves, *(by_edge[edge] for edge in outside if edge in by_edge))}
        self._read |= set(read)
        if not self._back:
            self._known |= {k: Known.of(x) for k, x in read.items() if k in candidates and k not in self._known}
        if not self.open:
            return
        for node, number in () if self._recompute else outside:
            if (node, number) in stops:
                continue
            behind, _ = reads([], 0, stops, [(node, number)])
            if not all(id(x) in candidates or id(x) in own for x in behind):
                raise ValueError(
                    f"{self._names[0]} reads a tensor computed outside of it ({type(node).__name__}), whose gradient "
                    f"would be lost: hand over what gets gradients in {self._names[1]}"
                )
        if not self._back:
            self._claim([by_edge[edge] for edge in outside if edge in by_edge])
            self._claim([x for x in leaves if id(x) in candidates])
        unclaimed = {id(x): x for x in leaves if id(x) not in candidates}
        if first:
            self._unclaimed = {key: weakref.ref(x) for key, x in unclaimed.items()}
            return
        # one that the field makes itself is another at every call
        both = [x for key, x in unclaimed.items() if key in self._unclaimed and self._unclaimed[key]() is x]
        if both and self._back:
            raise RuntimeError(self.lost(f"a tensor of shape {tuple(both[0].shape)}"))
        self._claim(both)

    def _claim_survivors(self) -> None:
        """What a single call has read and not made itself, which would be gone."""
        self._claim([leaf for reference in self._unclaimed.values() if (leaf := reference()) is not None])

    def _claim(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if not self._recompute and id(x) not in self._claimed:
                self._claimed.add(id(x))
                self.tensors.append(x)
            if id(x) not in self._known:
                self._known[id(x)] = Known.of(x)


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


def _in_sight(field: Any) -> Iterator[Tensor]:
    """The tensors that a function closes over, or has among its globals and its defaults."""
    if isinstance(field, FunctionType):
        values = inspect.getclosurevars(field)
        yield from _tensors_in((values.nonlocals, values.globals, field.__defaults__))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors and the parameters of the modules in ``value``, however nested."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.parameters()


def _autocast(kind: str) -> tuple[Any, ...]:
    """The arguments of ``torch.autocast`` as they are now on a kind of device; none where it has none."""
    if not torch.amp.is_autocast_available(kind):
        return ()
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return (kind, dtype, enabled, torch.is_autocast_cache_enabled())


def _leaves_of(state: Any) -> Any:
    """The state, a tensor or several, without history and requiring a gradient."""
    return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), state)
