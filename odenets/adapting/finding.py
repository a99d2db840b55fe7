"""The blocks of a model, found in the programs of two passes: of a batch, and of a part of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odenets.adapting.additions import Addition, Found, find_additions
from odenets.adapting.blocks import BlockSpec, Samples
from odenets.adapting.chains import layers_of
from odenets.adapting.matching import match
from odenets.adapting.places import tensors_in
from odenets.adapting.program import Program, trace
from odenets.modes import evaluating, keeping_state

__all__ = ["Blocks", "find", "samples_of"]


@dataclass(frozen=True)
class Blocks:
    """What is found in a model.

    Attributes:
        steps: the specification of each step of a pass, in order.
        hidden: names of the blocks whose states cannot be seen.
        output: of the batch in which they were found.
        draws: where it draws random numbers.
        reads: where the pass reads numbers from its data, by which it may go another way.
    """

    steps: tuple[BlockSpec, ...]
    hidden: tuple[str, ...]
    output: Any
    draws: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def specs(self) -> tuple[BlockSpec, ...]:
        """The specifications, each once."""
        return tuple(dict.fromkeys(self.steps))


def samples_of(args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """The number of samples in the inputs of a model: that of the first tensor; None where there is none.

    >>> samples_of((torch.zeros(3, 2),), {}), samples_of((), {"input_ids": torch.zeros(2, 9)})
    (3, 2)
    """
    return next((len(x) for _, x in tensors_in((args, dict(kwargs))) if x.ndim), None)


@torch.no_grad()
def find(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, partial: bool = False) -> Blocks:
    """The blocks of a ``model`` in the programs of a batch, ``args`` and ``kwargs``, and of a part of it, in eval mode.

    Args:
        model: any module; it is left as it was.
        args, kwargs: its inputs.
        partial: whether blocks that cannot be seen are left out.

    Returns:
        The specifications of its steps.

    Raises:
        ValueError: there are no samples, no additions, some that cannot be seen, or others in a part of the batch.

    Warns:
        UserWarning: states of a sample depend on the other samples of the batch.
    """
    samples = samples_of(args, kwargs)
    if not samples:
        raise ValueError("example must hold a tensor with at least one sample: adapt(model, torch.randn(2, 3, 32, 32))")
    part = max(samples // 2, 1) if samples > 1 else 2
    with keeping_state(model), evaluating(model):
        program = trace(model, args, kwargs, samples)
        found = find_additions(program)
        if not found.additions and not program.recorders:
            raise _none(model, program, found)
        other = _traced_part(model, args, kwargs, samples, part)
    _check_same(model, program, found.additions, other)
    matched = match(model, program, found.additions)
    hidden = tuple(one.block.name or "a sum in the model's own forward pass" for one in matched.hidden)
    if hidden and not partial:
        raise ValueError(
            f"{len(hidden)} of {len(found.additions)} residual additions pass no border of a module or a function at "
            f"which they could be recorded, in {', '.join(dict.fromkeys(hidden))}: what is within a script or one operator is "
            "not seen; partial=True leaves them out"
        )
    layouts = _layouts(found.additions, program, other, samples, part)
    steps = [replace(spec, samples=layouts[addition]) for spec, addition in matched.steps]
    return Blocks(tuple(steps), hidden, program.output, tuple(program.draws), tuple(program.reads))


def _traced_part(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int, part: int
) -> tuple[Program, list[Addition]] | None:
    """The program of fewer samples, or of two where there is one; None where the model takes no other number."""

    def fewer(x: Tensor) -> Tensor:
        if not x.ndim or len(x) != samples:
            return x
        return x[:part] if part < samples else torch.cat([x, x])

    try:
        program = trace(model, *tree_map_only(Tensor, fewer, (args, dict(kwargs))), part)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
        return None
    return program, find_additions(program).additions


def _check_same(
    model: nn.Module, program: Program, additions: Sequence[Addition], other: tuple[Program, list[Addition]] | None
) -> None:
    if other is None:
        return
    one, two = ([(a.block.name, a.node.op, a.node.site) for a in each] for each in (additions, other[1]))
    if one != two:
        where = ", ".join(dict.fromkeys(a[0] or "its own forward pass" for a in one if a not in two)) or "a loop"
        reads = f" (numbers are read from the data at {'; '.join(program.reads)})" if program.reads else ""
        raise ValueError(
            f"{type(model).__name__} takes another way for a part of the batch: {where} differ{reads}. Name the blocks "
            'that every pass takes, adapt(model, blocks=["layer1.0", ...]), with partial=True if some are left out'
        )


def _layouts(
    additions: Sequence[Addition],
    program: Program,
    other: tuple[Program, list[Addition]] | None,
    samples: int,
    part: int,
) -> dict[Addition, Samples]:
    """How the samples lie in the states: along the axis that grows with their number."""
    if other is None:
        return dict.fromkeys(additions, Samples())
    layouts, dependent = {}, []
    for one, two in zip(additions, other[1], strict=True):
        pairs = zip(one.node.shape, two.node.shape, strict=True)
        axes = [i for i, (a, b) in enumerate(pairs) if a * part == b * samples and a % samples == 0 and a != b]
        if len(axes) != 1:
            raise ValueError(
                f"the states of {one.block.name or 'the model'!r}, {one.node.shape}, have no axis of the samples: "
                f"for {samples} samples, and for {part} they are {two.node.shape}"
            )
        (axis,) = axes
        rows = one.node.shape[axis] // samples
        apart = False
        if axis == 0 and one.node in program.rows and two.node in other[0].rows:
            values, fewer = program.rows[one.node], other[0].rows[two.node]
            apart, independent = _lie(values, fewer, rows, samples, part)
            if not independent:
                dependent.append(one.block.name)
        layouts[one] = Samples(axis, rows, apart)
    if dependent:
        warnings.warn(
            f"states of a sample depend on the other samples of the batch, in {dependent[0]!r} and {len(dependent) - 1} "
            "more: if the samples lie along another axis than the first, give the model batch_first=True",
            stacklevel=5,
        )
    return layouts


def _lie(values: Tensor, fewer: Tensor, rows: int, samples: int, part: int) -> tuple[bool, bool]:
    """Whether rows of a sample lie apart, and whether they are as they are among fewer samples."""

    def close(a: Tensor, b: Tensor) -> bool:
        a, b = (a, b) if samples > part else (b, a)
        return torch.allclose(a[: len(b)], b, rtol=1e-2, atol=1e-6)

    if close(values, fewer):
        return False, True
    if rows > 1:
        a, b = values.reshape(rows, samples).T.flatten(), fewer.reshape(rows, part).T.flatten()
        if close(a, b):
            return True, True
    return False, False


def _none(model: nn.Module, program: Program, found: Found) -> ValueError:
    """Why there are no blocks, and the remedy."""
    kind = type(model).__name__
    hand = 'name the blocks by hand, adapt(model, blocks=["layer1.0", "layer1.1"])'
    if layers := layers_of(model):
        return ValueError(
            f"{kind} has no residual additions: it is a chain of layers, {len(layers)} of which keep the shape: "
            f"adapt(model, displacement=True) takes each of them for a step, or {hand}"
        )
    if found.others:
        reasons = "; ".join(dict.fromkeys(f"{reason} in {_where(node)}" for node, reason in found.others[:6]))
        return ValueError(f"{kind} has no residual additions, sums of a state and a branch computed from it: {reasons}; {hand}")
    joins = sum(node.op == "cat" and not node.fixed and node.floating for node in program.nodes)
    if joins:
        return ValueError(
            f"{kind} has no residual additions: it only concatenates, {joins} times, so that no state is moved; {hand}"
        )
    return ValueError(f"{kind} has no residual additions, sums of a state and a branch computed from it; {hand}")


def _where(node: Any) -> str:
    return repr(node.call.name or "its own forward pass")
