"""How the samples lie in the states of a model: by the program of a batch, and by that of a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odenets.adapting.additions import Addition, find_additions
from odenets.adapting.blocks import Samples
from odenets.adapting.places import tensors_in
from odenets.adapting.program import FailedPass, Program, trace

__all__ = ["Layouts", "find_layouts", "samples_of"]


@dataclass(frozen=True)
class Layouts:
    """How the samples lie in the states of each addition.

    Attributes:
        samples: of each addition.
        dependent: names of the blocks in which the states of a sample depend on the other samples.
    """

    samples: dict[Addition, Samples]
    dependent: tuple[str, ...]


def samples_of(args: Any, kwargs: Mapping[str, Any], axis: int = 0) -> int | None:
    """The number of samples in the inputs of a model, along an ``axis`` of the first tensor; None where there is none.

    >>> samples_of((torch.zeros(3, 2),), {}), samples_of((), {"input_ids": torch.zeros(2, 9)})
    (3, 2)
    """
    return next((x.shape[axis] for _, x in tensors_in((args, dict(kwargs))) if x.ndim > axis), None)


def find_layouts(
    model: nn.Module,
    program: Program,
    additions: Sequence[Addition],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axis: int = 0,
) -> Layouts | None:
    """How the samples lie, where they do so along an ``axis`` of the inputs: along the axis that grows with them.

    Args:
        model: whose program and additions these are.
        program, additions: of the batch ``args`` and ``kwargs``.
        args, kwargs: the inputs.
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
        if x.ndim <= axis or x.shape[axis] != samples:
            return x
        return x.narrow(axis, 0, part) if part < samples else torch.cat([x, x], axis)

    try:
        other = trace(model, *tree_map_only(Tensor, fewer, (args, dict(kwargs))))
    except FailedPass:
        return None
    others = find_additions(other).additions
    _check_same(model, program, additions, others)
    layouts: dict[Addition, Samples] = {}
    dependent = []
    for one, two in zip(additions, others, strict=True):
        layout = _layout(one, two, samples, part)
        rows, fewer_rows = program.rows.get(one.node, ()), other.rows.get(two.node, ())
        if layout.axis < min(len(rows), len(fewer_rows)):
            apart = _apart(rows[layout.axis], fewer_rows[layout.axis], layout.rows, samples, part)
            if apart is None:
                dependent.append(one.block.name)
            layout = Samples(layout.axis, layout.rows, bool(apart))
        layouts[one] = layout
    return Layouts(layouts, tuple(dependent))


def _layout(one: Addition, two: Addition, samples: int, part: int) -> Samples:
    pairs = zip(one.node.shape, two.node.shape, strict=True)
    axes = [i for i, (a, b) in enumerate(pairs) if a * part == b * samples and a % samples == 0 and a != b]
    if len(axes) != 1:
        raise ValueError(
            f"the states of {one.block.name or 'the model'!r}, {one.node.shape}, have no axis of the samples: for "
            f"{samples} samples they are that, and for {part} {two.node.shape}"
        )
    return Samples(axes[0], one.node.shape[axes[0]] // samples)


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


def _check_same(model: nn.Module, program: Program, additions: Sequence[Addition], others: Sequence[Addition]) -> None:
    one, two = ([(a.block.name, a.node.op, a.node.site) for a in each] for each in (additions, others))
    if one != two:
        names = dict.fromkeys(a[0] or "its own forward pass" for a in (*one, *two) if one.count(a) != two.count(a))
        reads = f" (numbers are read from the data at {'; '.join(program.reads)})" if program.reads else ""
        raise ValueError(
            f"{type(model).__name__} takes other steps for a part of the batch, in {', '.join(names)}{reads}: name the "
            'blocks that passes take, adapt(model, blocks=["layer1.0", ...], partial=True)'
        )
