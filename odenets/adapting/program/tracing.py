"""Tracing: the program of a model, seen while it computes a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from odenets.adapting.copying import copied
from odenets.adapting.program.graph import Call, FailedPass, Node, Passage, Program, Run
from odenets.adapting.program.operators import READING, SAME_VALUES, SUMS
from odenets.adapting.program.places import Place, Site, code_of, line_of, tensors_in
from odenets.observing import observing, running_recorder
from odenets.records import Records

__all__ = ["trace", "without_fast_path"]


class _Functions(TorchFunctionMode):
    """Notes what passes the borders of functions, and where in Python they are called."""

    def __init__(self, operations: _Operations, passages: list[Passage]) -> None:
        super().__init__()
        self.operations, self.passages = operations, passages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        code, _ = code_of(1)
        if code is None or self.operations.call is None or running_recorder() is not None:
            return func(*args, **(kwargs or {}))
        site = self.operations.site = Site(self.operations.call.name, code)
        self._note(Place(site, "input"), args)
        self._note(Place(site, "input"), kwargs)
        reads = len(self.operations.numbers)
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            self.operations.site = None
        if args and output is args[0] and "dropout" in getattr(func, "__name__", ""):
            output = self.operations.dropped(output)
        self._note(Place(site, "output"), output)
        if func in (Tensor.tolist, Tensor.numpy) and not self.operations.node_of(args[0]).fixed:
            self.operations.read()
        if isinstance(output, bool):
            self.operations.decisions.append(output)
            self.operations.decides |= len(self.operations.numbers) > reads
            del self.operations.numbers[reads:]
        return output

    def _note(self, place: Place, value: Any) -> None:
        if isinstance(value, Tensor | tuple | Mapping):
            self.operations.note(place, value, self.passages)


class _Operations(TorchDispatchMode):
    """Makes a node of each operation; recorders are looked into as little as operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.site: Site | None = None
        self.time = 0
        self.nodes: list[Node] = []
        self.call: Call | None = None
        self.known = WeakTensorKeyDictionary()
        self.rows: dict[Node, tuple[Tensor, ...]] = {}
        self.decisions: list[bool] = []
        self.draws: dict[str, None] = {}
        self.reads: dict[str, None] = {}
        self.numbers: list[str] = []
        self.decides = False
        self.entered: dict[Call, Node] = {}  # the first argument of a call of a module
        self.recorders: list[Run] = []
        self.runs: dict[int, Call] = {}  # by the recorder
        self.entering: dict[Call, Tensor] = {}  # the first state that a call is given
        self.names = {id(module): name for name, module in model.named_modules()}
        self.learned = {id(p) for p in model.parameters()}

    def add(self, op: str, inputs: tuple[Node, ...] = (), **attributes: Any) -> Node:
        self.time += 1
        recorder = running_recorder()
        call = self.call if recorder is None else self.runs[id(recorder)]
        node = Node(self.time, op, inputs, call=call, site=self.site, **attributes)
        self.nodes.append(node)
        for one in inputs:
            one.users.append(node)
        return node

    def node_of(self, x: Tensor) -> Node:
        node = self.known.get(x)
        if node is None:  # no result of an operation
            learned = id(x) in self.learned or x.requires_grad
            node = self.add("parameter" if learned else "constant", shape=tuple(x.shape), fixed=True, learned=learned)
            self.known[x] = node
        return node

    def note(self, place: Place, value: Any, passages: list[Passage]) -> None:
        """What passes a place: the tensors in a value that can be states."""
        self.time += 1
        assert self.call is not None
        if running_recorder() is not None:
            return
        for path, x in tensors_in(value):
            if _may_move(x):
                passages.append(Passage(self.time, place._replace(path=path), self.node_of(x), self.call))
                if place.is_module and place.side == "input":
                    self.entering.setdefault(self.call, x)

    def measures_of(self, recorder: nn.Module) -> dict[str, Any] | None:
        """A module of the model records its steps: its run begins."""
        if id(recorder) not in self.names:
            return None
        self.runs[id(recorder)] = Call(self.names[id(recorder)], self.call, recorder=True)
        return {}

    def receive(self, recorder: nn.Module, output: Any, records: Records) -> None:
        """Its run ends."""
        self.time += 1
        name = self.names[id(recorder)]
        called = self.call is not None and self.call.name == name  # and not by its record
        state = self.entering.get(self.call) if called and self.call is not None else output
        if isinstance(state, Tensor):
            with _disable_current_modes():
                self.rows[self.node_of(state)] = _rows(state)
        self.recorders.append(Run(self.time, name, self.node_of(state) if isinstance(state, Tensor) else None))

    def dropped(self, x: Tensor) -> Tensor:
        """What a layer makes of x that in eval mode returns x itself: another state, for in training it may be."""
        before = self.node_of(x)
        with _disable_current_modes():
            after = x.detach()
        self.known[after] = self.add(
            "dropout",
            (before,),
            shape=before.shape,
            floating=before.floating,
            fixed=before.fixed,
            learned=before.learned,
        )
        return after

    def input(self, x: Tensor) -> None:
        self.known[x] = self.add("input", shape=tuple(x.shape), floating=_may_move(x))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(nn.parameter.is_lazy(one) for one in operands):  # which gets its shape
            return func(*args, **kwargs)
        inputs = tuple([self.node_of(one) for one in operands])
        output = func(*args, **kwargs)
        op = func._schema.name.rpartition("::")[2]
        within = running_recorder() is not None
        if op in READING and not within and not all(one.fixed for one in inputs):
            self.read()
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws[self._place()] = None
        written = self._written(func, args, kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        for one in [x for x in tree_leaves(output) if isinstance(x, Tensor)] or written:
            in_place = any(one is x for x in written)
            node = self.add(
                op.removesuffix("_"),
                inputs,
                shape=tuple(one.shape),
                floating=_may_move(one),
                fixed=all(n.fixed for n in inputs),
                learned=all(n.fixed for n in inputs) and any(n.learned for n in inputs),
                same=first is not None and not in_place and _same(op, args, one),
            )
            if in_place:
                self._pass_on(one, node)
            self.known[one] = node
            if node.floating and not node.fixed and not within and op.removesuffix("_") in SUMS:
                self.rows[node] = _rows(one)
        return output

    def read(self) -> None:
        """Note that Python reads from data, and where."""
        self.reads[self._place()] = None
        self.numbers.append(self._place())

    def _place(self) -> str:
        return line_of(2) + (f" in {self.call.name!r}" if self.call is not None and self.call.name else "")

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        if not func._schema.is_mutable:
            return []
        values = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                values.append(args[i] if i < len(args) else kwargs.get(argument.name))
        return [one for one in tree_leaves(values) if isinstance(one, Tensor)]

    def _pass_on(self, x: Tensor, node: Node) -> None:
        """What shares the memory that has been written over depends on what was written."""
        try:
            memory = x.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return
        for other, before in list(self.known.items()):
            if other is not x and _memory(other) == memory:
                whole = other.numel() == x.numel() and other.is_contiguous() and x.is_contiguous()
                self.known[other] = self.add(
                    "written",
                    (node, before),
                    shape=before.shape,
                    floating=before.floating,
                    fixed=before.fixed and node.fixed,
                    same=whole,
                )


def _drops(module: nn.Module) -> bool:
    """Whether a module that returns its input in eval mode may do otherwise in training."""
    return not isinstance(module, nn.Identity) and not any(module.children())


def _may_move(x: Tensor) -> bool:
    """Whether a tensor can be a state: floating, complex or quantized."""
    return x.is_floating_point() or x.is_complex() or x.is_quantized


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """The mean square of each row along the first axis, and along the second, on the CPU in the precision of x."""
    x = x.dequantize() if x.is_quantized else x.detach()
    squares = (x.abs() if x.is_complex() else x).float().square()
    axes = range(min(x.ndim, 2)) if x.numel() else ()
    return tuple(squares.movedim(axis, 0).reshape(x.shape[axis], -1).mean(1).to(x.real.dtype).cpu() for axis in axes)


def _memory(x: Tensor) -> int | None:
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _same(op: str, args: Any, output: Tensor) -> bool:
    first = args[0]
    if output.numel() != first.numel() or output.dtype != first.dtype:
        return False
    if op in ("add", "sub", "mul", "div"):
        return len(args) > 1 and not isinstance(args[1], Tensor) and args[1] == (0 if op in ("add", "sub") else 1)
    return op in SAME_VALUES


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The program of one pass of a ``model``, which is computed without gradients in the mode in which the model is.

    Args:
        model: any module.
        args, kwargs: its inputs.

    Returns:
        The program.

    Raises:
        FailedPass: from what the model raises.
    """
    args, kwargs = copied((args, dict(kwargs)))
    operations = _Operations(model)
    passages: list[Passage] = []
    for _, x in tensors_in((args, dict(kwargs))):
        operations.input(x)
    with ExitStack() as stack:
        stack.enter_context(_watched(model, operations, passages))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(without_fast_path())
        stack.enter_context(_Functions(operations, passages))
        stack.enter_context(operations)
        stack.enter_context(observing(operations))
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            raise FailedPass(model) from error
    for _, x in tensors_in(output):
        operations.node_of(x).returned = True
    return Program(
        operations.nodes,
        passages,
        output,
        operations.rows,
        [*operations.draws],
        [*operations.reads],
        [*dict.fromkeys(operations.numbers)],
        operations.decisions if operations.decides else None,
        operations.recorders,
    )


@contextmanager
def _watched(model: nn.Module, operations: _Operations, passages: list[Passage]) -> Iterator[None]:
    """Hooks on all modules that are called from Python, which note what passes their borders."""
    handles = []
    scripted: list[str] = []
    for name, module in model.named_modules():
        if any(not one or name.startswith(f"{one}.") for one in scripted):
            continue  # is called within the script
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(name)

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            operations.call = Call(name, operations.call)
            if args and isinstance(args[0], Tensor):
                operations.entered[operations.call] = operations.node_of(args[0])
            operations.note(Place(name, "input"), args, passages)
            operations.note(Place(name, "input"), kwargs, passages)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            assert operations.call is not None
            unchanged = isinstance(output, Tensor) and args and output is args[0] and _drops(module)
            if unchanged and operations.node_of(output) is operations.entered.get(operations.call):
                output = operations.dropped(output)
            operations.note(Place(operations.call.name, "output"), output, passages)
            operations.call = operations.call.parent
            return output

        # not as methods, which scripts refuse: these are called from Python all the same
        handles.append(nn.Module.register_forward_pre_hook(module, enter, with_kwargs=True))
        handles.append(nn.Module.register_forward_hook(module, leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Layers of torch's transformers as their parts; hooks on these turn the fast path off in later passes."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
