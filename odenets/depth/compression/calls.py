"""Calls of the blocks of a network on calibration data, and the states along a line of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odenets.depth.compression.calibration import Batches
from odenets.depth.compression.divergence import run
from odenets.depth.compression.last_maps import LastMap, last_map
from odenets.depth.compression.units import Unit, state_of

__all__ = ["Calls", "Passage", "captured"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Passage:
    """How a state passes a block.

    Attributes:
        x0, x1: the state before and after.
        before: the state after, before a ReLU at the end.
        features, output: of the block's last linear map; None where it has none.
    """

    x0: Tensor
    x1: Tensor
    before: Tensor
    features: Tensor | None = None
    output: Tensor | None = None

    @property
    def of_map(self) -> tuple[Tensor, Tensor]:
        """The input and the output of the last linear map, which the block has."""
        assert self.features is not None
        assert self.output is not None
        return self.features, self.output


class _Entered(BaseException):
    """All calls that are wanted have been made; no ``Exception``, which a model may catch."""


@torch.no_grad()
def captured(model: nn.Module, units: Sequence[Unit], inputs: Any, wanted: Sequence[int] | None = None) -> list[Call]:
    """The arguments of the modules of some ``units``, or of all, in a pass of a ``model`` that ends at the last.

    Args:
        model: in eval mode.
        units: of it.
        inputs: of a batch.
        wanted: positions of units, rising.

    Returns:
        For each unit that is wanted its arguments by position and by keyword.
    """
    wanted = range(len(units)) if wanted is None else wanted
    calls: dict[int, Call] = {}
    handles = []
    for m in wanted:

        def take(_: nn.Module, args: Any, kwargs: Any, m: int = m) -> None:
            calls[m] = _copied((args, dict(kwargs)), units[m])
            if len(calls) == len(wanted):
                raise _Entered

        module = model.get_submodule(units[m].name)
        handles.append(module.register_forward_pre_hook(take, with_kwargs=True, prepend=True))
    try:
        run(model, inputs)
    except _Entered:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [calls[m] for m in wanted]


class Calls:
    """The calls of the modules of a network's units on the calibration data, and the last linear map of each.

    States are kept where lines begin alone; the rest are computed again.

    Args:
        model: in eval mode.
        units: of it.
        batches: of the calibration.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], batches: Batches) -> None:
        self.model, self.units, self.batches = model, units, batches
        self.modules = [model.get_submodule(unit.name) for unit in units]
        self._calls: list[list[Call]] = []
        self.maps: list[LastMap | None] = []
        for b, inputs in enumerate(batches.inputs):
            calls = captured(model, units, inputs)
            if b in (0, len(batches.inputs) - 1):
                found = [
                    last_map(module, unit, *call) if unit.keeps or unit.resizes else None
                    for unit, module, call in zip(units, self.modules, calls, strict=True)
                ]
                self.maps = found if b == 0 else [_same_map(*pair) for pair in zip(self.maps, found, strict=True)]
            self._calls.append(
                [_with(call, unit, None) if unit.follows else call for unit, call in zip(units, calls, strict=True)]
            )

    def in_model(self, model: nn.Module, line: Sequence[int]) -> Calls:
        """The same with the arguments that the units of a ``line`` get in another ``model``, a compressed one."""
        other = copy.copy(self)
        other._calls = [[*calls] for calls in self._calls]
        for b, inputs in enumerate(self.batches.inputs):
            for m, call in zip(line, captured(model, self.units, inputs, line), strict=True):
                other._calls[b][m] = _with(call, self.units[m], None) if m != line[0] else call
        return other

    def rectified(self, m: int) -> bool:
        """Whether the states of unit ``m`` come out of a ReLU."""
        last = self.maps[m]
        return self.units[m].rectified if last is None else last.activation

    def call(self, batch: int, m: int, x0: Tensor) -> Call:
        """The arguments of unit ``m`` in a batch, with a copy of a state ``x0``, into which it may write."""
        return _with(self._calls[batch][m], self.units[m], x0.clone())

    def entry(self, batch: int, m: int) -> Tensor:
        """The state that enters unit ``m``, where a line begins, in a batch."""
        args, kwargs = self._calls[batch][m]
        at = self.units[m].argument
        return args[at] if isinstance(at, int) else kwargs[at]

    def passage(
        self, batch: int, m: int, x0: Tensor, module: nn.Module | None = None, last: LastMap | None = None
    ) -> Passage:
        """How a state ``x0`` passes unit ``m`` with its other arguments of a batch.

        Or a ``module`` in its place, with a ``last`` map of its own, if it has one.
        """
        args, kwargs = self.call(batch, m, x0)
        unit = self.units[m]
        if module is None:
            module, last = self.modules[m], self.maps[m]
        if last is None:
            x1 = state_of(module(*args, **kwargs), unit)
            return Passage(x0, x1, x1)
        features, output, before = last.run(module, unit, args, kwargs)
        return Passage(x0, before.relu() if last.activation else before, before, features, output)

    def output(self, batch: int, m: int, x0: Tensor, module: nn.Module) -> Tensor:
        """The state that a ``module`` in the place of unit ``m`` makes of ``x0``, beside the others of a batch."""
        args, kwargs = self.call(batch, m, x0)
        return state_of(module(*args, **kwargs), self.units[m])

    def along(self, batch: int, line: Sequence[int], x: Tensor) -> list[Passage]:
        """How a state ``x`` of a batch passes some units, one after another."""
        passages = []
        for m in line:
            passages.append(self.passage(batch, m, x))
            x = passages[-1].x1
        return passages

    def line(self, batch: int, line: Sequence[int]) -> list[Passage]:
        """How the state of a batch passes the units of a ``line`` from its beginning."""
        return self.along(batch, line, self.entry(batch, line[0]))


def _same_map(one: LastMap | None, other: LastMap | None) -> LastMap | None:
    """The last map of a block if it is that on another batch too, so that nothing beside the state scales it."""
    if one is None or other is None or one.name != other.name or one.activation != other.activation:
        return None
    return one if torch.allclose(one.scale, other.scale, rtol=1e-2, atol=1e-6) else None


def _copied(call: Call, unit: Unit) -> Call:
    """A call with a copy of the state, into which its module may write."""
    args, kwargs = call
    at = unit.argument
    return _with(call, unit, (args[at] if isinstance(at, int) else kwargs[at]).clone())


def _with(call: Call, unit: Unit, state: Tensor | None) -> Call:
    """A call with another state."""
    args, kwargs = call
    if isinstance(unit.argument, str):
        return args, {**kwargs, unit.argument: state}
    return (*args[: unit.argument], state, *args[unit.argument + 1 :]), kwargs
