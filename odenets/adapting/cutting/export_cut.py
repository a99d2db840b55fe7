"""An adapted network cut in the graphs of torch.export: operators, and modules that tell a pass of its states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.blocks import BlockSpec
from odenets.adapting.cutting.exported import MODEL, Exported, StepNodes, export, steps_in
from odenets.adapting.cutting.parts import CutPart, Exports, Inputs
from odenets.adapting.cutting.sizes import Sizes
from odenets.adapting.cutting.splitting import Border, split
from odenets.adapting.hooks import Hooks
from odenets.modes import keeping_modes

__all__ = ["cut_exported"]

Steps = Sequence[tuple[BlockSpec, StepNodes]]


class StateEvent(nn.Module):
    """Tells the pass in progress of a state of a step.

    Args:
        hooks: of the network.
        spec: the step.
        event: what the state is to it.
    """

    def __init__(self, hooks: Hooks, spec: BlockSpec, event: Literal["start", "branch", "end"]) -> None:
        super().__init__()
        self.hooks, self.spec, self.event = hooks, spec, event

    def forward(self, state: Tensor) -> None:
        """Takes the ``state`` as it passes."""
        if (current := self.hooks.current) is not None:
            getattr(current, self.event)(self.spec, state, self.training)

    def extra_repr(self) -> str:
        """The step, and what of it."""
        return f"{self.event} of {self.spec.name}"


def cut_exported(
    network: AdaptedModel,
    blocks: Sequence[Sequence[BlockSpec]],
    ends: Sequence[int],
    at: Literal["end", "start"],
    inputs: Inputs,
) -> list[CutPart]:
    """The parts of an adapted network, and the last, of what comes after them.

    Args:
        network: to be cut.
        blocks: the steps of each of its blocks.
        ends: after how many blocks each part ends.
        at: whether what stands between two blocks belongs to the later part ("end") or to the earlier ("start").
        inputs: of the model, with an example.

    Raises:
        ValueError: the model cannot be exported or cut there.
    """
    model = network.model
    parts: dict[bool, list[tuple[fx.GraphModule, Sizes]]] = {}
    modes: dict[bool, dict[nn.Module, bool]] = {}
    output = None
    for mode in (True, False):
        with keeping_modes(model):
            if model.training != mode:
                model.train(mode)
            modes[mode] = {module: module.training for module in model.modules()}
            exported = export(model, inputs.args, inputs.kwargs)
        parts[mode], output = _parts(network, exported, blocks, ends, at), exported.output
    names = {module: name for name, module in model.named_modules()}
    leaves, structure = tree_flatten([*inputs.example])
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    cut = []
    for k, ((train, sizes), (evaluate, others)) in enumerate(zip(parts[True], parts[False], strict=True)):
        held = [
            module
            for module in {**dict.fromkeys(train.modules()), **dict.fromkeys(evaluate.modules())}
            if module in names
        ]
        flags = {mode: [(names[one], one, modes[mode][one]) for one in held] for mode in (True, False)}
        last = output if k == len(ends) else None
        exports = Exports(structure, constants, last, {True: sizes, False: others}, flags)
        cut.append(CutPart(train, evaluate, inputs, exports))
    return cut


def _parts(
    network: AdaptedModel,
    exported: Exported,
    blocks: Sequence[Sequence[BlockSpec]],
    ends: Sequence[int],
    at: Literal["end", "start"],
) -> list[tuple[fx.GraphModule, Sizes]]:
    """The parts in one mode, and the sizes that they take."""
    operations = exported.operations
    order = operations.order
    by_block = [*_matched(blocks, steps_in(exported, network.model))]
    borders = []
    for end in ends:
        last = max(order[step.x1] for _, step in by_block[end - 1])
        until = min(order[step.x0] for _, step in by_block[end]) if end < len(by_block) else last
        borders.append(Border(last, max(last, until), f"after block {end}, {blocks[end - 1][0].block!r}"))
    modules: dict[str, nn.Module] = {}
    events = [
        _events(network, [pair for of_block in by_block[begin:end] for pair in of_block], modules)
        for begin, end in pairwise([0, *ends])
    ]
    names = ["the state", *(node.name for node in operations.inputs[1:])]
    parts = []
    for graph, entering in split(operations, borders, at, events):
        values = [node.meta.get("val") for node in (entering, *operations.inputs[1:])]
        part = _module(graph, exported, network.model, modules)
        parts.append((part, Sizes(values, names, exported.largest, exported.conditions)))
    return parts


def _events(network: AdaptedModel, steps: Steps, modules: dict[str, nn.Module]) -> dict[fx.Node, list[str]]:
    """What happens at the states of steps, ends before starts: the names of modules, which are made."""
    events: dict[fx.Node, list[str]] = {}

    def add(node: fx.Node, spec: BlockSpec, event: Literal["start", "branch", "end"]) -> None:
        name = f"events.{len(modules)}"
        modules[name] = StateEvent(network.hooks, spec, event)
        events.setdefault(node, []).append(name)

    for spec, step in steps:
        if spec.branch is not None:
            add(step.summand, spec, "branch")
    for spec, step in steps:
        add(step.x1, spec, "end")
    for spec, step in steps:
        add(step.x0, spec, "start")
    return events


def _matched(blocks: Sequence[Sequence[BlockSpec]], steps: Sequence[StepNodes]) -> Iterator[Steps]:
    """The nodes of the steps of each block.

    Raises:
        ValueError: there are others.
    """
    specs = [spec for of_block in blocks for spec in of_block]
    if flows := [spec.name for spec in specs if spec.recorder]:
        raise ValueError(
            f"the model cannot be cut: {flows[0]!r} records its own steps, which no exported graph does; one that "
            "torch.fx can trace, all of whose blocks are modules that return the state, is cut with its flows whole"
        )
    if len(specs) != len(steps):
        steps = [step for step in steps if any(_is_in(step, spec) for spec in specs)]
    if len(specs) != len(steps):
        raise ValueError(
            f"the model cannot be cut: {len(steps)} residual additions are seen among its operators, and {len(specs)} "
            "steps are recorded"
        )
    matched = iter(zip(specs, steps, strict=True))
    for of_block in blocks:
        yield [next(matched) for _ in of_block]


def _is_in(step: StepNodes, spec: BlockSpec) -> bool:
    return step.block == spec.block or step.block.startswith(f"{spec.block}.")


def _module(graph: fx.Graph, exported: Exported, model: nn.Module, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A part as a module that holds the parameters it takes, within their own modules where these hold no others."""
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    attributes = {name: exported.attributes[name] for name in names} | {name: modules[name] for name in called}
    part = fx.GraphModule(attributes, graph, f"PartOf{type(model).__name__}")
    owners: dict[str, set[str]] = {}
    for name in names:
        if name.startswith(f"{MODEL}."):
            owner, _, last = name.removeprefix(f"{MODEL}.").rpartition(".")
            owners.setdefault(owner, set()).add(last)
    for owner, taken in owners.items():
        original = model.get_submodule(owner)
        held = {name for name, _ in original.named_parameters(recurse=False)}
        if owner and held <= taken and not any(True for _ in original.children()):
            parent, _, last = f"{MODEL}.{owner}".rpartition(".")
            setattr(part.get_submodule(parent), last, original)
    return part
