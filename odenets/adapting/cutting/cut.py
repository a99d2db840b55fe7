"""An adapted network as consecutive parts: cut in the graph of torch.fx, or where that fails of torch.export."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError

from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.blocks import BlockSpec
from odenets.adapting.cutting.agreement import check_parts
from odenets.adapting.cutting.export_cut import cut_exported
from odenets.adapting.cutting.parts import CutPart, Inputs, PartMasking
from odenets.adapting.cutting.splitting import Border, Operations, split
from odenets.modes import keeping_modes

__all__ = ["blocks_in", "cut_adapted"]

At = Literal["end", "start"]
Blocks = Sequence[Sequence[BlockSpec]]

# What a forward pass that is called with proxies raises: fx itself (control flow, ``len``, a module that the model does
# not hold), and Python where a proxy is no number (``range``, ``math.sqrt``), no key and no tensor (``assert``).
UNTRACEABLE = (TraceError, RuntimeError, NameError, TypeError, KeyError, AssertionError, ValueError, IndexError)


def blocks_in(network: AdaptedModel) -> list[list[BlockSpec]]:
    """The steps of an adapted network by blocks, between which it can be cut; those of one block come together."""
    return [[*steps] for _, steps in groupby(network.blocks, lambda spec: spec.block)]


def cut_adapted(
    network: AdaptedModel, ends: Sequence[int], at: At = "end", example: Any = None
) -> tuple[list[AdaptedModel], nn.Module]:
    """The parts of an adapted network, which share its parameters, and the module of what comes after all blocks.

    Each part takes the state and the further inputs of the model, ``part(state, *args)``.

    Args:
        network: to be cut.
        ends: after how many of its blocks each part ends, rising; the last is the number of blocks.
        at: whether what stands between two blocks belongs to the later part ("end", the cut is at the end of the
            earlier block) or to the earlier ("start").
        example: inputs of the model, a tensor, a tuple of positional ones or a mapping of keywords, of two samples or
            more; by which a model is exported that torch.fx cannot trace.

    Raises:
        ValueError: the model, or a module of it that is not within a block, has hooks, which a graph leaves out; it
            cannot be traced or exported, calls its blocks in another order or not once, or more than one tensor
            crosses a cut.
    """
    inputs = None if example is None else Inputs.of(network.model, example)
    blocks = blocks_in(network)
    exported = False
    try:
        modules = _cut_traced(network, blocks, ends, at, inputs)
    except ValueError as error:
        if inputs is None:
            raise
        modules = _cut_exported(network, blocks, ends, at, inputs, error)
        exported = True
    for part in modules:
        for module in set(part.modules()) - set(network.model.modules()):  # the model's own keep their modes
            module.training = network.training
    *parts, head = modules
    adapted = []
    for part, (begin, end) in zip(parts, pairwise([0, *ends]), strict=True):
        specs = [spec for of_block in blocks[begin:end] for spec in of_block]
        masking = PartMasking(network.masking.mask, network.masking.per, part.inputs, first=begin == 0)
        adapted.append(AdaptedModel(part, specs, part_of=network, masking=masking))
    if exported and inputs is not None:
        check_parts(network, adapted, head, inputs)
    return adapted, head


def _cut_exported(
    network: AdaptedModel, blocks: Blocks, ends: Sequence[int], at: At, inputs: Inputs, reason: ValueError
) -> list[CutPart]:
    try:
        return cut_exported(network, blocks, ends, at, inputs)
    except ValueError as error:
        raise ValueError(f"{error}; by torch.fx: {reason}") from error


def _cut_traced(
    network: AdaptedModel, blocks: Blocks, ends: Sequence[int], at: At, inputs: Inputs | None
) -> list[CutPart]:
    model = network.model
    borders = [_border(network, steps) for steps in blocks]
    _check_hooks(model, type(model).__name__)
    names = inputs.names if inputs is not None else _required(model)
    parts: dict[bool, list[fx.GraphModule]] = {}
    for mode in (True, False):
        graph = _trace(network, frozenset(name for pair in borders for name in pair), mode, names)
        nodes = [*graph.nodes]
        calls = Counter(node.target for node in nodes if node.op == "call_module")
        called = {node.target: i for i, node in enumerate(nodes) if node.op == "call_module"}
        first = [called.get(first, -1) for first, _ in borders]
        last = [called.get(last, -1) for _, last in borders]
        if any(calls[name] != 1 for pair in borders for name in pair) or first != sorted(first):
            raise ValueError(
                "the model cannot be cut: it does not call its blocks once each, in the order of its modules"
            )
        places = [node for node in nodes if node.op == "placeholder"]
        learned = {str(node.target) for node in nodes if node.op == "get_attr"}  # whatever it is
        operations = Operations(nodes, places, frozenset(learned), dict(model.named_modules()))
        allowed = [
            Border(last[end - 1], first[end] - 1 if end < len(first) else last[end - 1], f"after block {end}")
            for end in ends
        ]
        parts[mode] = [fx.GraphModule(model, one) for one, _ in split(operations, allowed, at)]
    return [
        CutPart(train, train if train.code == evaluate.code else evaluate, inputs or Inputs(tuple(names)))
        for train, evaluate in zip(parts[True], parts[False], strict=True)
    ]


def _border(network: AdaptedModel, steps: Sequence[BlockSpec]) -> tuple[str, str]:
    """The modules with which a block begins and ends, if all its states pass borders of modules within these."""
    block = steps[0].block
    places = [place for spec in steps for place in (spec.start, *spec.ends, spec.branch) if place is not None]
    names = [str(place.of) for place in places if place.is_module]
    if len(names) == len(places):
        if all(name == block or name.startswith(f"{block}.") for name in names):
            return block, block
        first, _, last = block.partition(":")
        if last and all(name.startswith((first, last)) for name in names):
            return first, last
    raise ValueError(f"the model cannot be cut: the states of {steps[0].name!r} do not pass the borders of a module")


def _required(model: nn.Module) -> list[str]:
    """The names of the inputs that a model must be given."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]


class _Tracer(fx.Tracer):
    """Steps into modules, but not into blocks; inputs that are not given have their defaults."""

    def __init__(self, blocks: frozenset[str], names: Sequence[str], defaults: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks, self.names, self.defaults = blocks, names, defaults

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = module_qualified_name in self.blocks or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            _check_hooks(m, repr(module_qualified_name))
        return leaf

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, None)
        for i, one in enumerate(args):
            if isinstance(one, Proxy) and (name := str(one.node.target)) not in self.names:
                args[i] = self.defaults[name]
                self.graph.erase_node(one.node)
        return function, args


def _check_hooks(module: nn.Module, name: str) -> None:
    if module._forward_pre_hooks or module._forward_hooks:
        raise ValueError(
            f"{name} has hooks, which would be lost where it is cut: make what they do a module, "
            "nn.Sequential(normalize, model)"
        )


def _trace(network: AdaptedModel, blocks: frozenset[str], training: bool, names: Sequence[str]) -> fx.Graph:
    model = network.model
    parameters = inspect.signature(model.forward).parameters
    defaults = {name: one.default for name, one in parameters.items()}
    with keeping_modes(model):
        if model.training != training:
            model.train(training)
        try:
            return _Tracer(blocks, names, defaults).trace(model)
        except UNTRACEABLE as error:
            raise ValueError(
                f"{type(model).__name__} cannot be cut: torch.fx cannot trace its forward pass ({error})"
            ) from error
