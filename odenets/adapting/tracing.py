"""An adapted network as consecutive parts, cut by torch.fx where one block ends or the next begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from odenets.adapting.adapted import AdaptedModel
from odenets.modes import keeping_modes

__all__ = ["cut_adapted"]

# What a forward pass that is called with proxies raises: fx itself (control flow, ``len``, a module that the model does
# not hold), and Python where a proxy is no number (``range``, ``math.sqrt``), no key and no tensor (``assert``).
UNTRACEABLE = (TraceError, RuntimeError, NameError, TypeError, KeyError, AssertionError)


def cut_adapted(
    network: AdaptedModel, ends: Sequence[int], at: Literal["end", "start"] = "end"
) -> tuple[list[AdaptedModel], nn.Module]:
    """The parts of an adapted network, which share its modules, and the module of what comes after all blocks.

    Args:
        network: to be cut; its forward pass must be one that torch.fx can trace.
        ends: after how many of its blocks each part ends, rising; the last is the number of blocks.
        at: whether what stands between two blocks belongs to the later part ("end", the cut is at the end of the
            earlier block) or to the earlier ("start").

    Raises:
        ValueError: the model, or a module of it that is not within a block, has hooks, which a graph leaves out; it
            cannot be traced, calls its blocks in another order or not once, or more than one tensor crosses a cut.
    """
    _check_hooks(network.model, type(network.model).__name__)
    traced = {mode: _trace(network, mode) for mode in (True, False)}
    parts = {mode: _split(network, graph, ends, at) for mode, graph in traced.items()}
    modules: list[nn.Module] = []
    for train, evaluate in zip(parts[True], parts[False], strict=True):
        part = train if train.code == evaluate.code else _ByMode(train, evaluate)
        for module in set(part.modules()) - set(network.model.modules()):  # the model's own keep their modes
            module.training = network.training
        modules.append(part)
    *modules, head = modules
    cuts = zip(modules, pairwise([0, *ends]), strict=True)
    return [AdaptedModel(part, network.blocks[a:b], part_of=network) for part, (a, b) in cuts], head


class _ByMode(nn.Module):
    """Two graphs of the same modules: what is computed in training mode, and what in eval mode."""

    def __init__(self, train: fx.GraphModule, evaluate: fx.GraphModule) -> None:
        super().__init__()
        self.in_training, self.in_eval = train, evaluate

    def forward(self, x: Tensor) -> Tensor:
        """The output of the graph of the mode."""
        return self.in_training(x) if self.training else self.in_eval(x)


class _Tracer(fx.Tracer):
    """Steps into modules, but not into blocks."""

    def __init__(self, blocks: frozenset[str]) -> None:
        super().__init__()
        self.blocks = blocks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = module_qualified_name in self.blocks or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            _check_hooks(m, repr(module_qualified_name))
        return leaf


def _check_hooks(module: nn.Module, name: str) -> None:
    if module._forward_pre_hooks or module._forward_hooks:
        raise ValueError(
            f"{name} has hooks, which would be lost where it is cut: make what they do a module, "
            "nn.Sequential(normalize, model)"
        )


def _trace(network: AdaptedModel, training: bool) -> fx.GraphModule:
    model = network.model
    blocks = frozenset(name for block in network.blocks for name in (block.first, block.last))
    with keeping_modes(model):
        if model.training != training:
            model.train(training)
        try:
            return fx.GraphModule(model, _Tracer(blocks).trace(model))
        except UNTRACEABLE as error:
            raise ValueError(
                f"{type(model).__name__} cannot be cut: torch.fx cannot trace its forward pass ({error})"
            ) from error


def _split(network: AdaptedModel, traced: fx.GraphModule, ends: Sequence[int], at: str) -> list[fx.GraphModule]:
    """The graph in as many parts as there are ends, and the rest."""
    nodes = list(traced.graph.nodes)
    called = {node.target: i for i, node in enumerate(nodes) if node.op == "call_module"}
    first = [called.get(block.first, -1) for block in network.blocks]
    last = [called.get(block.last, -1) for block in network.blocks]
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    if any(calls[block.first] != 1 or calls[block.last] != 1 for block in network.blocks) or first != sorted(first):
        raise ValueError("the model cannot be cut: it does not call its blocks once each, in the order of its modules")
    borders = [last[end - 1] if at == "end" or end == len(first) else first[end] - 1 for end in ends]
    order = {node: i for i, node in enumerate(nodes)}
    parts: list[fx.GraphModule] = []
    entering: fx.Node | None = None
    for begin, border in pairwise([-1, *borders, len(nodes) - 1]):
        leaving = [
            node
            for node in nodes[: border + 1]
            if node.op != "get_attr" and any(order[user] > border for user in node.users)
        ]
        if len(leaving) > 1:
            names = ", ".join(str(node) for node in leaving)
            raise ValueError(
                f"the model cannot be cut after block {ends[len(parts)]}: {names} would cross the cut, and only one "
                "tensor may"
            )
        parts.append(_part(network.model, nodes[begin + 1 : border + 1], entering, leaving[0] if leaving else None))
        entering = leaving[0] if leaving else None
    return parts


def _part(
    model: nn.Module, nodes: Sequence[fx.Node], entering: fx.Node | None, leaving: fx.Node | None
) -> fx.GraphModule:
    """Some nodes of a graph, from the value that enters to the one that leaves, or to the output."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if entering is not None:
        copies[entering] = graph.placeholder("x")

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter, which every part takes from the model by itself
            copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    if leaving is not None:
        graph.output(copies[leaving])
    graph.lint()
    return fx.GraphModule(model, graph)
