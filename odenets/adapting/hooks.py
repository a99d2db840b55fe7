"""Hooks: what tells the forward pass of an adapted model where the states of its blocks are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.forward_pass import ForwardPass, InPlaceChanges

__all__ = ["Hooks"]

Event = Callable[[ForwardPass, BlockSpec, Any, bool], None]


class Hooks:
    """What the hooks of a model share: the pass of each thread, and what passes learn of changes in place."""

    def __init__(self) -> None:
        self.passes: dict[int, ForwardPass | None] = {}
        self.in_place = InPlaceChanges()

    def attach(self, model: nn.Module, block: BlockSpec) -> None:
        """Let the modules of a block call the events of the pass."""
        inputs = {block.first: ForwardPass.start} | dict.fromkeys(block.mid, ForwardPass.middle)
        last = model.get_submodule(block.last)
        places = sum(module is last for _, module in model.named_modules(remove_duplicate=False))
        end = ForwardPass.end if places == 1 else ForwardPass.end_of_shared
        outputs = {end: block.last, ForwardPass.restart: block.shortcut, ForwardPass.branch: block.branch}
        for name, event in inputs.items():
            hook = partial(_input_hook, self, event, block)
            model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        for event, name in outputs.items():
            if name is not None:
                model.get_submodule(name).register_forward_hook(partial(_output_hook, self, event, block))

    @property
    def current(self) -> ForwardPass | None:
        """The pass of this thread, if any: replicas of ``nn.DataParallel`` run in threads and share the hooks."""
        return self.passes.get(_thread())

    @contextmanager
    def running(self, current: ForwardPass | None) -> Iterator[None]:
        """The pass is that of this thread for a while, and then what was before."""
        thread = _thread()
        before = self.passes.get(thread)
        self.passes[thread] = current
        try:
            yield
        finally:
            if before is None:
                del self.passes[thread]
            else:
                self.passes[thread] = before


def _input_hook(
    hooks: Hooks, event: Event, block: BlockSpec, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if (current := hooks.current) is not None:
        event(current, block, args[0] if args else next(iter(kwargs.values()), None), module.training)


def _output_hook(
    hooks: Hooks, event: Event, block: BlockSpec, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    if (current := hooks.current) is not None:
        event(current, block, output, module.training)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
