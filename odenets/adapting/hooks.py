"""Hooks: what tells the forward pass of an adapted model where the states of its blocks are."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.forward_pass import ForwardPass, InPlaceChanges
from odenets.adapting.program.places import Code, Path, Place, Site, at, code_of, tensors_in
from odenets.observing import running_recorder

__all__ = ["Hooks"]

Event = tuple[Callable[[ForwardPass, BlockSpec, Any, bool], None], BlockSpec, Path]
"""What a tensor that passes a place means for a step, and where it is in what passes."""


class Hooks:
    """What the hooks of a model share: the pass of each thread, and what passes learn of changes in place."""

    def __init__(self) -> None:
        self.passes: dict[int, ForwardPass | None] = {}
        self.in_place = InPlaceChanges()
        self.functions: dict[Place, list[Event]] = {}
        self.attached: list[tuple[nn.Module, str, int]] = []
        self.watches: dict[int, _Watch] = {}
        self.watched: nn.Module | None = None  # a model whose functions are watched in some of its modules alone
        self.decides = False  # whether passes are to note what functions say that is yes or no

    def attach(self, model: nn.Module, blocks: Iterable[BlockSpec]) -> None:
        """Let modules, and functions where states pass no module, call the events of the pass."""
        modules: dict[tuple[str, str], list[Event]] = {}
        for place, event in _events(blocks):
            if isinstance(place.of, str):
                modules.setdefault((place.of, place.side), []).append(event)
            else:
                self.functions.setdefault(place._replace(path=()), []).append(event)
        for (name, side), events in modules.items():  # hooks are not set by methods, which scripts refuse
            module = model.get_submodule(name)
            if side == "input":
                hook = partial(_input_hook, self, events)
                handle = nn.Module.register_forward_pre_hook(module, hook, with_kwargs=True)
            else:
                handle = nn.Module.register_forward_hook(module, partial(_output_hook, self, events))
            self.attached.append((module, side, handle.id))
        names = sorted({place.of.module for place in self.functions if isinstance(place.of, Site)})
        if names and all(names):  # a watch costs a call of Python for each function
            self.watched = model
            for name in names:
                module = model.get_submodule(name)
                begin = nn.Module.register_forward_pre_hook(module, partial(_begin_watch, self))
                end = nn.Module.register_forward_hook(module, partial(_end_watch, self))
                self.attached += [(module, "input", begin.id), (module, "output", end.id)]

    def detach(self) -> None:
        """Take the hooks off the modules."""
        for module, side, number in self.attached:
            hooks = module._forward_pre_hooks if side == "input" else module._forward_hooks
            hooks.pop(number, None)
        self.attached.clear()

    @property
    def current(self) -> ForwardPass | None:
        """The pass of this thread, if any: replicas of ``nn.DataParallel`` run in threads and share the hooks."""
        return self.passes.get(_thread())

    @contextmanager
    def running(self, current: ForwardPass | None, model: nn.Module) -> Iterator[None]:
        """The pass is that of this thread for a while, and then what was before.

        Raises:
            ValueError: functions are to be watched in a graph of ``torch.compile``.
        """
        thread = _thread()
        before, compiling = self.passes.get(thread), torch.compiler.is_compiling()
        watch = self.watches.pop(thread, None)  # of a pass in which this one is
        self.passes[thread] = current
        try:
            if (
                current is None
                or not (self.functions or self.decides)
                or (self.decides and compiling and not self.functions)
            ):
                yield
                return
            if compiling:
                place = next(iter(self.functions)).of
                raise ValueError(
                    f"the sum in {place.module or type(model).__name__!r} is in no module of its own, which "  # type: ignore[union-attr]
                    "torch.compile cannot watch: make the block a module, whose output is the state"
                )
            functions = _Functions(current, self.functions, model)
            if model is self.watched and not self.decides:
                with _Watch(functions) as self.watches[thread]:
                    yield
            else:
                with functions:
                    yield
        finally:
            if before is None:
                del self.passes[thread]
            else:
                self.passes[thread] = before
            self.watches.pop(thread, None)
            if watch is not None:
                self.watches[thread] = watch


def _events(blocks: Iterable[BlockSpec]) -> Iterator[tuple[Place, Event]]:
    """All places with what they mean: ends before starts, for a state ends one step and starts another."""
    blocks = [block for block in blocks if not block.recorder]
    for block in blocks:
        if block.branch is not None:
            yield block.branch, (ForwardPass.branch, block, block.branch.path)
    for block in blocks:
        for place in block.ends:
            yield place, (ForwardPass.end, block, place.path)
    for block in blocks:
        if block.start is not None:
            yield block.start, (ForwardPass.start, block, block.start.path)


def _input_hook(
    hooks: Hooks, events: list[Event], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if (current := hooks.current) is not None:
        with _unwatched():
            for event, block, path in events:
                event(current, block, _argument(args, kwargs, path, module), module.training)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, module: nn.Module | None = None) -> Any:
    """What is given by position or by keyword; the first argument of a module by its name."""
    if isinstance(path[0], str):
        return at(kwargs, path)
    value = at(args, path)
    if value is None and path == (0,) and module is not None:
        return kwargs.get(next(iter(inspect.signature(module.forward).parameters), ""))
    return value


def _output_hook(hooks: Hooks, events: list[Event], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (current := hooks.current) is not None:
        with _unwatched():
            for event, block, path in events:
                event(current, block, _result(output, path), module.training)


def _result(output: Any, path: Path) -> Any:
    """What is in an output; the first tensor where the whole is meant and is none."""
    value = at(output, path)
    if path or isinstance(value, Tensor):
        return value
    return next((x for _, x in tensors_in(value)), value)


def _unwatched() -> AbstractContextManager[Any]:
    """Functions are not watched while events are called: what is measured is no part of the pass."""
    if torch.compiler.is_compiling() or not isinstance(torch.overrides._get_current_function_mode(), _Functions):
        return nullcontext()
    return torch.overrides._pop_mode_temporarily()


class _Functions(TorchFunctionMode):
    """Calls the events of functions."""

    def __init__(self, current: ForwardPass, places: Mapping[Place, list[Event]], model: nn.Module) -> None:
        super().__init__()
        self.current, self.model = current, model
        self.sides = {
            side: {p.of: events for p, events in places.items() if p.side == side} for side in ("input", "output")
        }
        self.codes: set[Code] = {place.of.code for place in places if isinstance(place.of, Site)}
        self.names: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if running_recorder() is not None:
            return func(*args, **kwargs)
        code, frame = code_of(1) if self.codes else (None, None)
        if code not in self.codes:
            output = func(*args, **kwargs)
            if isinstance(output, bool) and running_recorder() is None:
                self.current.decisions.append(output)
            return output
        module = None if frame is None else frame.f_locals.get("self")
        if not self.names:
            self.names = {id(one): name for name, one in self.model.named_modules()}
        site = Site(self.names.get(id(module), ""), code)
        training = getattr(module, "training", False)
        for event, block, path in self.sides["input"].get(site, ()):
            event(self.current, block, _argument(args, kwargs, path), training)
        output = func(*args, **kwargs)
        for event, block, path in self.sides["output"].get(site, ()):
            event(self.current, block, at(output, path), training)
        return output


class _Watch:
    """Watches functions while modules run that call those of interest, each of which may call others of these.

    Args:
        functions: their events.
    """

    def __init__(self, functions: _Functions) -> None:
        self.functions = functions
        self.modules: list[nn.Module] = []

    def begin(self, module: nn.Module) -> None:
        """A module begins."""
        if not self.modules:
            self.functions.__enter__()
        self.modules.append(module)

    def end(self, module: nn.Module) -> None:
        """A module ends, if it is the last that has begun; after an error within the model it may not be."""
        if self.modules and self.modules[-1] is module:
            self.modules.pop()
            if not self.modules:
                self.functions.__exit__(None, None, None)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends what an error has left."""
        if self.modules:
            self.modules.clear()
            self.functions.__exit__(None, None, None)


def _begin_watch(hooks: Hooks, module: nn.Module, args: Any) -> None:
    if (watch := hooks.watches.get(_thread())) is not None:
        watch.begin(module)


def _end_watch(hooks: Hooks, module: nn.Module, args: Any, output: Any) -> None:
    if (watch := hooks.watches.get(_thread())) is not None:
        watch.end(module)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
