"""Units of a network that may go: blocks at whose border the state passes, one after another in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from odenets.adapting import adapt
from odenets.analysis import count_macs
from odenets.inputs import is_by_keyword, rows
from odenets.recording import is_recorder

__all__ = ["Unit", "find_units", "lines_of", "positional", "state_of"]


@dataclass(frozen=True)
class Unit:
    """A block of a network, a module at whose border the states of its steps pass.

    Attributes:
        name: its dotted name.
        shape: of the state that it returns, of the first batch.
        dtype: of that state.
        argument: where the state is among its arguments, a position or a keyword.
        elements: length of the tuple that the module returns, the state first; None if it returns the state.
        follows: whether its state is the output of the unit before.
        keeps: whether it returns a state of the shape and dtype that it takes, so that it may go.
        resizes: whether it returns a state of another shape, and is a block for the rest.
        adds: whether what it returns is added to the state outside of it, and no state.
        rectified: whether its states come out of a ReLU.
        macs: multiplications of one call of the first batch, with an addition each, of a sample.
        alone: whether it takes and returns the state alone.
        reason: why it may not go; empty where it may.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    argument: int | str = 0
    elements: int | None = None
    follows: bool = False
    keeps: bool = True
    resizes: bool = False
    adds: bool = False
    rectified: bool = False
    macs: int = 0
    alone: bool = True
    reason: str = ""


def state_of(output: Any, unit: Unit) -> Tensor:
    """The state in the ``output`` of the module of a ``unit``."""
    return output if unit.elements is None else output[0]


def positional(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a batch as arguments by position and by keyword."""
    if is_by_keyword(inputs):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple) else (inputs,)), {}


@dataclass
class _Call:
    """A call of a module: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None


@torch.no_grad()
def find_units(model: nn.Module, inputs: Any, samples: int) -> list[Unit]:
    """The units of a ``model``, in the order in which a batch of ``inputs`` passes them.

    Args:
        model: any module of residual blocks, in eval mode.
        inputs: of a batch.
        samples: how many samples it holds.

    Returns:
        The units, those too that may not go.

    Raises:
        ValueError: no residual blocks, as :func:`odenets.adapt` tells.
    """
    args, kwargs = positional(inputs)
    adapted = adapt(model, args or kwargs)
    blocks = {spec.name: spec.block for spec in adapted.blocks}
    names = [name for name in dict.fromkeys(blocks.values()) if name]
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    handles = []
    for name in names:

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name].append(_Call(*tree_map(_copy, (args, dict(kwargs)))))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls[name][-1].output = tree_map(_copy, output)

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        steps = adapted.steps(*args, closing=False, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        adapted.hooks.detach()
    if len(steps) != len(adapted.names):
        raise ValueError("model has a neural ODE whose error chooses the steps: it has no blocks that could go")
    of_steps = [_block_of(name, blocks) for name in adapted.names]
    called = Counter(of_steps)
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for block, step in zip(of_steps, steps, strict=True):
        first.setdefault(block, step)
        last[block] = step
    few = min(samples, 2)
    one = rows(inputs, slice(None, few), samples)
    units: list[Unit] = []
    before_output: Tensor | None = None
    for name in names:
        if len(calls[name]) != 1 or not called[name]:
            raise ValueError(
                f"block {name!r} is called {len(calls[name])} times in a pass: one that is shared cannot go once"
            )
        unit, entry, output = _unit(name, model.get_submodule(name), calls[name][0], first[name], last[name])
        unit = replace(unit, macs=count_macs(model, one, within=model.get_submodule(name)) // few)
        follows = entry is not None and before_output is not None and _same(entry, before_output)
        units.append(replace(unit, follows=follows and not unit.adds))
        before_output = None if unit.adds else output
    return units


def _unit(name: str, module: nn.Module, call: _Call, first: Any, last: Any) -> tuple[Unit, Tensor | None, Tensor]:
    """A unit, the state that its module takes, and the one that it returns."""
    output, elements = call.output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        output, elements = output[0], len(output)
    if not isinstance(output, Tensor):
        raise ValueError(f"block {name!r} returns no tensor but a {type(call.output).__name__}")
    arguments: dict[int | str, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    tensors = {at: x for at, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    argument = next((at for at, x in tensors.items() if x.shape == output.shape), next(iter(tensors), 0))
    entry = tensors.get(argument)
    others = elements is not None and any(part is not None for part in call.output[1:])
    reason, adds = "", False
    if entry is None:
        reason = "takes no state"
    elif entry.shape != output.shape:
        reason = "changes the shape of the state"
    elif entry.dtype != output.dtype:
        reason = f"changes the dtype of the state, {entry.dtype} to {output.dtype}"
    elif others:
        reason = "returns tensors besides the state"
    elif not is_recorder(module) and not _is_state(entry, first.x0):
        added = first is last and _is_state(output, first.x1 - first.x0)
        adds, reason = added, "" if added else "has a state that does not pass its border"
    rectified = not reason and not adds and all(bool((x >= 0).all()) and bool((x == 0).any()) for x in (entry, output))  # type: ignore[union-attr]
    resizes = entry is not None and entry.shape != output.shape and not others and entry.dtype == output.dtype
    unit = Unit(
        name, tuple(output.shape), output.dtype, argument, elements, keeps=not reason, resizes=resizes, adds=adds,
        rectified=rectified, alone=elements is None and len(arguments) == 1 and argument == 0, reason=reason,
    )  # fmt: skip
    return unit, entry, output


def _block_of(step: str, blocks: Mapping[str, str]) -> str:
    """The block of a step by its name, which for the steps of a flow begins with that of the flow."""
    names = [name for name in blocks if step == name or step.startswith(f"{name} ")]
    return blocks[max(names, key=len)] if names else ""


def _copy(x: Any) -> Any:
    """A copy of a tensor, into which another module may write."""
    return x.clone() if isinstance(x, Tensor) else x


def _is_state(x: Tensor, state: Tensor) -> bool:
    return x.shape == state.shape and torch.allclose(x, state.to(x.dtype), rtol=1e-4, atol=1e-5)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and (x is y or torch.equal(x, y))


def lines_of(units: Sequence[Unit]) -> list[list[int]]:
    """The positions of the units in lines, in each of which the state of one is the output of the one before."""
    lines: list[list[int]] = []
    for m, unit in enumerate(units):
        if unit.follows and lines:
            lines[-1].append(m)
        else:
            lines.append([m])
    return lines
