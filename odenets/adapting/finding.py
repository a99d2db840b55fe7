"""The blocks of a model, found in the program of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from odenets.adapting.blocks import BlockSpec, Samples, flow_spec
from odenets.adapting.chains import layers_of
from odenets.adapting.layouts import find_layouts, samples_of, with_distinct_samples
from odenets.adapting.matching import match
from odenets.adapting.program.additions import Found, find_additions
from odenets.adapting.program.graph import Node, Program
from odenets.adapting.program.tracing import trace
from odenets.modes import in_eval_mode, keeping_attributes

__all__ = ["Blocks", "find"]


@dataclass(frozen=True)
class Blocks:
    """What is found in a model.

    Attributes:
        steps: the specification of each step of a pass, in order.
        hidden: names of the blocks whose states cannot be seen.
        others: sums that are no steps though they have something of one, and why.
        output: of the batch in which they were found.
        draws: where it draws random numbers.
        reads: where the pass reads from its data, by which it may go another way.
        decisions: what it reads that is yes or no; None where it decides nothing by its data.
        axis: the axis of the inputs along which the samples lie.
    """

    steps: tuple[BlockSpec, ...]
    hidden: tuple[str, ...]
    others: tuple[str, ...]
    output: Any
    draws: tuple[str, ...]
    reads: tuple[str, ...]
    decisions: tuple[bool, ...] | None
    axis: int

    @property
    def specs(self) -> tuple[BlockSpec, ...]:
        """The specifications, each once."""
        return tuple(dict.fromkeys(self.steps))


@torch.no_grad()
def find(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, partial: bool = False) -> Blocks:
    """The blocks of a ``model`` in the programs of a batch, ``args`` and ``kwargs``, and of a part of it, in eval mode.

    Where the states of a sample depend on the others, a part along the second axis is tried.

    Args:
        model: any module; it is left as it was.
        args, kwargs: its inputs.
        partial: whether blocks that cannot be seen are left out.

    Returns:
        The specifications of its steps.

    Raises:
        ValueError: there are no samples, no additions, some that cannot be seen, or others in a part of the batch.

    Warns:
        UserWarning: states of a sample depend on the other samples of the batch, or the axis of the samples is the
            second or is not known.
    """
    if not samples_of(args, kwargs):
        raise ValueError("example must hold a tensor with at least one sample: adapt(model, torch.randn(2, 3, 32, 32))")
    args, kwargs = with_distinct_samples(args, kwargs)
    with keeping_attributes(model), in_eval_mode(model):
        program = trace(model, args, kwargs)
        found = find_additions(program)
        if not found.additions and not program.recorders:
            raise why_none(model, program, found)
        matched = match(model, program, found.additions)
        places = {addition: spec.start for spec, addition in matched.steps}
        axis, layouts = 0, find_layouts(model, program, found.additions, args, kwargs, places)
        if layouts is None or layouts.dependent:
            along = find_layouts(model, program, found.additions, args, kwargs, places, axis=1)
            if along is not None and not along.dependent:
                if layouts is not None:  # where the first axis has been tried
                    warnings.warn(
                        "states of a sample depend on others along the first axis of the inputs, and on none along the "
                        "second, which is taken for that of the samples: if it is not, batch_first=True or a model "
                        "whose samples do not depend on each other tells",
                        stacklevel=6,
                    )
                axis, layouts = 1, along
    if layouts is None:
        warnings.warn(
            f"{type(model).__name__} takes no other number of samples than that of the example, by which the axis of "
            "the samples could be told: the first of each state is taken for it",
            stacklevel=6,
        )
    if layouts is not None and layouts.dependent and not program.draws:
        warnings.warn(
            f"states of a sample depend on the other samples of the batch, in {layouts.dependent[0]!r} and "
            f"{len(layouts.dependent) - 1} more blocks: their measures do too",
            stacklevel=6,
        )
    hidden = tuple(one.block.name or "the model's own forward pass" for one in matched.hidden)
    if hidden and not partial:
        raise ValueError(
            f"{len(hidden)} of {len(found.additions)} residual additions pass no border of a module or a function at "
            f"which they could be recorded, in {', '.join(dict.fromkeys(hidden))}: what is within a script or one "
            "operator is not seen; partial=True leaves them out"
        )
    others = tuple(f"{reason} in {where(node)}" for node, reason in found.others)
    steps = [spec if layouts is None else replace(spec, samples=layouts.samples[one]) for spec, one in matched.steps]
    flows: dict[str, BlockSpec] = {}
    for i, run in enumerate(program.recorders):
        samples = None if layouts is None else layouts.runs[i]
        flows.setdefault(run.name, replace(flow_spec(run.name), samples=samples or Samples()))
    timed = [*zip(matched.times, steps, strict=True), *((run.time, flows[run.name]) for run in program.recorders)]
    steps = [spec for _, spec in sorted(timed, key=lambda one: one[0])]
    if program.numbers:
        warnings.warn(
            f"{type(model).__name__} reads numbers from its data at {'; '.join(program.numbers)}: a pass that takes "
            'other steps by them is not told from others; if there are some, adapt(model, blocks=["layer1.0", ...])',
            stacklevel=6,
        )
    decisions = None if program.decisions is None else tuple(program.decisions)
    draws, reads = tuple(program.draws), tuple(program.reads)
    return Blocks(tuple(steps), hidden, others, program.output, draws, reads, decisions, axis)


def why_none(model: nn.Module, program: Program, found: Found) -> ValueError:
    """Why a ``model`` has no blocks by its ``program`` and what was ``found`` in it, and the remedy, as an error."""
    kind = type(model).__name__
    hand = f"name the blocks by hand, adapt(model, blocks={_alike(model)})"
    if layers := layers_of(model):
        return ValueError(
            f"{kind} has no residual additions: it is a chain of layers, {len(layers)} of which keep the shape: "
            f"adapt(model, displacement=True) takes each of them for a step, or {hand}"
        )
    none = f"{kind} has no residual additions, sums of a state and a branch computed from it"
    if found.others:
        reasons = "; ".join(dict.fromkeys(f"{reason} in {where(node)}" for node, reason in found.others[:6]))
        return ValueError(f"{none}: {reasons}; {hand}")
    if joins := sum(node.op == "cat" and not node.fixed and node.floating for node in program.nodes):
        return ValueError(f"{none}: it only concatenates, {joins} times, so that no state is moved; {hand}")
    return ValueError(f"{none}; {hand}")


def _alike(model: nn.Module) -> list[str]:
    """The first two modules of one class that could be blocks, as an example of names; or what there is."""
    names: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if name and any(module.children()) and not isinstance(module, nn.Sequential | nn.ModuleList):
            names.setdefault(type(module), []).append(name)
    alike = next((some[:2] for some in names.values() if len(some) > 1), [])
    return alike or [name for name, _ in model.named_children()][:2] or ["block"]


def where(node: Node) -> str:
    """The module in which a ``node`` is computed."""
    return repr(node.call.name) if node.call is not None and node.call.name else "its own forward pass"
