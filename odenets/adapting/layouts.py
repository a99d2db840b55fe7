"""How the samples lie in the states of a model: by the program of a batch, and by that of a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odenets.adapting.blocks import Samples
from odenets.adapting.program.additions import Addition, find_additions
from odenets.adapting.program.graph import FailedPass, Node, Program
from odenets.adapting.program.places import Place, tensors_in
from odenets.adapting.program.tracing import trace

__all__ = ["Layouts", "find_layouts", "samples_of", "with_distinct_samples"]


@dataclass(frozen=True)
class Layouts:
    """How the samples lie in the states of each addition, and in those of each run of a recorder.

    Attributes:
        samples: of each addition.
        runs: of each run, where that is known.
        dependent: names of the blocks in which the states of a sample depend on the other samples.
    """

    samples: dict[Addition, Samples]
    runs: tuple[Samples | None, ...]
    dependent: tuple[str, ...]


def samples_of(args: Any, kwargs: Mapping[str, Any], axis: int = 0) -> int | None:
    """The number of samples in the inputs of a model, along an ``axis``; None where there is no tensor.

    It is that of the first tensor of more than one dimension, or else of the first with one: a time may come before.

    >>> samples_of((torch.zeros(3, 2),), {}), samples_of((), {"input_ids": torch.zeros(2, 9)})
    (3, 2)
    >>> samples_of((torch.zeros(1), torch.zeros(4, 8)), {})
    4
    """
    tensors = [x for _, x in tensors_in((args, dict(kwargs))) if x.ndim > axis]
    return next((x.shape[axis] for x in sorted(tensors, key=lambda x: x.ndim < 2)), None)


def with_distinct_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, with numbers in the place of floating ones that are all equal, as an example of zeros is.

    >>> (x,), _ = with_distinct_samples((torch.zeros(2, 3),), {})
    >>> bool((x[0] == x[1]).any())
    False
    """

    def distinct(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.ndim < 2 or x.numel() < 2 or not bool((x == x.flatten()[0]).all()):
            return x
        numbers = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        return x + numbers.to(x.device, x.dtype)

    return tree_map_only(Tensor, distinct, (args, dict(kwargs)))


def find_layouts(
    model: nn.Module,
    program: Program,
    additions: Sequence[Addition],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    places: Mapping[Addition, Place | None],
    axis: int = 0,
) -> Layouts | None:
    """How the samples lie, where they do so along an ``axis`` of the inputs: along the axis that grows with them.

    Args:
        model: whose program and additions these are.
        program, additions: of the batch ``args`` and ``kwargs``.
        args, kwargs: the inputs.
        places: where x0 of each is recorded.
        axis: along which a part of the batch is taken.

    Returns:
        The layouts; None where the model takes no other number of samples.

    Raises:
        ValueError: the model goes another way for a part of the batch, or a state has no axis of the samples.
    """
    samples = samples_of(args, kwargs, axis)
    if not samples:
        return None
    part = max(samples // 2, 1) if samples > 1 else 2

    def fewer(x: Tensor) -> Tensor:
        along = axis
        if axis and x.ndim == 2 and x.shape[1] != samples:
            along = 0  # masks of padding are (B, T) wherever the samples of states lie
        if x.ndim <= along or x.shape[along] != samples:
            return x
        return x.narrow(along, 0, part) if part < samples else torch.cat([x, x], along)

    try:
        other = trace(model, *tree_map_only(Tensor, fewer, (args, dict(kwargs))))
    except FailedPass:
        return None
    others = find_additions(other).additions
    _check_same(model, program, additions, other, others)
    layouts: dict[Addition, Samples] = {}
    dependent = []
    for one, two in zip(additions, others, strict=True):
        state, fewer_state = (_state(*each, places.get(one)) for each in ((program, one), (other, two)))
        layout = _layout(state, fewer_state, samples, part)
        if layout is None:
            raise ValueError(
                f"the states of {one.block.name or 'the model'!r}, {state.shape}, have no axis of the samples: for "
                f"{samples} samples they are that, and for {part} {fewer_state.shape}: "
                "name the blocks, adapt(model, blocks=[...])"
            )
        layouts[one], independent = _in_order(layout, *_rows_of(program, state, other, fewer_state), samples, part)
        if not independent:
            dependent.append(one.block.name)
    runs: list[Samples | None] = []
    for run, fewer_run in zip(program.recorders, other.recorders, strict=True):
        run_layout = None
        if run.state is not None and fewer_run.state is not None:
            run_layout = _layout(run.state, fewer_run.state, samples, part)
            if run_layout is not None:
                rows = _rows_of(program, run.state, other, fewer_run.state)
                run_layout = _in_order(run_layout, *rows, samples, part)[0]
        runs.append(run_layout)
    return Layouts(layouts, tuple(runs), tuple(dependent))


def _state(program: Program, addition: Addition, place: Place | None) -> Node:
    """The sum; or the state as it passes where it is recorded, where that is in another shape."""
    seen = [
        one.node
        for one in program.passages
        if one.place == place and one.node.value is addition.x0.value and one.time <= addition.node.index
    ]
    return seen[-1] if seen and seen[-1].shape != addition.node.shape else addition.node


Rows = tuple[Tensor, ...]


def _rows_of(program: Program, node: Node, other: Program, other_node: Node) -> tuple[Rows, Rows]:
    return program.rows.get(node, ()), other.rows.get(other_node, ())


def _layout(one: Node, two: Node, samples: int, part: int) -> Samples | None:
    """The axis that grows with the samples; None where it is not one."""
    if len(one.shape) != len(two.shape):
        return None
    pairs = zip(one.shape, two.shape, strict=True)
    axes = [i for i, (a, b) in enumerate(pairs) if a * part == b * samples and a % samples == 0 and a != b]
    return Samples(axes[0], one.shape[axes[0]] // samples) if len(axes) == 1 else None


def _in_order(layout: Samples, rows: Rows, fewer: Rows, samples: int, part: int) -> tuple[Samples, bool]:
    """The layout with the order of the rows of a sample, and whether these are as they are among fewer samples."""
    if layout.axis >= min(len(rows), len(fewer)):
        return layout, True
    apart = _apart(rows[layout.axis], fewer[layout.axis], layout.rows, samples, part)
    return Samples(layout.axis, layout.rows, bool(apart)), apart is not None


def _apart(values: Tensor, fewer: Tensor, rows: int, samples: int, part: int) -> bool | None:
    """Whether rows of a sample lie apart; None where they are others among fewer samples."""

    rtol = 1e-3 if values.dtype in (torch.float32, torch.float64) else 5e-2

    def equal(a: Tensor, b: Tensor) -> bool:
        n = min(len(a), len(b))
        return torch.allclose(a[:n].float(), b[:n].float(), rtol=rtol, atol=1e-6, equal_nan=True)

    if equal(values, fewer):
        return False
    if rows > 1 and equal(values.reshape(rows, samples).T.flatten(), fewer.reshape(rows, part).T.flatten()):
        return True
    return None


def _check_same(
    model: nn.Module, program: Program, additions: Sequence[Addition], other: Program, others: Sequence[Addition]
) -> None:
    one: list[tuple[Any, ...]]
    one, two = ([(a.block.name, a.node.op, a.node.site) for a in each] for each in (additions, others))
    one += [(run.name,) for run in program.recorders]
    two += [(run.name,) for run in other.recorders]
    if one != two:
        names = dict.fromkeys(a[0] or "its own forward pass" for a in (*one, *two) if one.count(a) != two.count(a))
        reads = f" (numbers are read from the data at {'; '.join(program.reads)})" if program.reads else ""
        raise ValueError(
            f"{type(model).__name__} takes other steps for a part of the batch, in {', '.join(names)}{reads}: name the "
            'blocks that passes take, adapt(model, blocks=["layer1.0", ...], partial=True)'
        )
