"""A graph of a forward pass in consecutive parts: where one tensor crosses, and what each part computes again."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

__all__ = ["Border", "Events", "Operations", "split"]

aten = torch.ops.aten

SIZES = {aten.sym_size.int, aten.sym_numel.default}
"""Operators that read the shape of a tensor alone."""

SHAPED = {
    getattr(aten, name).default
    for name in ["ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"]
}
"""Operators that make a tensor of the shape, the dtype or the device of another."""

Events = Mapping[fx.Node, Sequence[str]]
"""Names of the modules that are called with the value of a node."""


@dataclass
class Operations:
    """The operations of a forward pass.

    Attributes:
        nodes: in order; the last is the output.
        inputs: the placeholders, in the order in which the parts are given their values; the first is cut.
        learned: names of attributes that hold what depends on training: parameters, and buffers that are written.
        modules: the modules that are called, by name.
        device: which constants of the graph stand for that of the state; None where there are none.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    learned: frozenset[str]
    modules: dict[str, nn.Module]
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.fixed = self._fixed()

    def _fixed(self) -> set[fx.Node]:
        """Nodes that depend neither on what is learned, nor on the first input but for its shape, nor on chance."""
        fixed: set[fx.Node] = set(self.inputs[1:])
        written = {one for node in self.nodes for one in _written(node)}
        for node in self.nodes:
            if node in fixed or node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                if str(node.target) not in self.learned:
                    fixed.add(node)
            elif node not in written and _repeatable(node, self.modules):
                shaped = node.target in SIZES or node.target in SHAPED
                if shaped or all(one in fixed for one in node.all_input_nodes):
                    fixed.add(node)
        return fixed

    def crossing(self, border: int) -> list[fx.Node]:
        """What is computed up to a border and used behind it, but for what can be computed again."""
        return [
            node
            for node in self.nodes[: border + 1]
            if node.op != "get_attr"
            and node not in self.fixed
            and any(self.order[user] > border for user in node.users)
        ]


@dataclass(frozen=True)
class Border:
    """Where a cut may be: behind one of the nodes from ``first`` to ``last``, by number; ``name`` is for errors."""

    first: int
    last: int
    name: str


def split(
    operations: Operations, borders: Sequence[Border], at: Literal["end", "start"], events: Sequence[Events] = ()
) -> list[tuple[fx.Graph, fx.Node]]:
    """The graphs of the parts, one more than borders, and the node of the state that enters each.

    Each takes the state and the further inputs.

    Args:
        operations: the whole.
        borders: where the cuts may be.
        at: whether a cut is at the first or the last such place of its border at which one tensor crosses.
        events: of each part.

    Raises:
        ValueError: more than one tensor crosses everywhere within a border, or what cannot be computed again.
    """
    cuts: list[tuple[int, fx.Node]] = [(-1, operations.inputs[0])]
    for border in borders:
        places = range(border.first, border.last + 1)
        for place in places if at == "end" else reversed(places):
            if len(crossing := operations.crossing(place)) == 1:
                cuts.append((place, crossing[0]))
                break
        else:
            raise _not_one(operations, border)
    graphs = []
    ends = [*cuts[1:], (len(operations.nodes) - 1, None)]
    for k, ((begin, entering), (end, leaving)) in enumerate(zip(cuts, ends, strict=True)):
        part = _Part(operations, entering, events[k] if k < len(events) else {})
        graphs.append((part.graph_of(operations.nodes[begin + 1 : end + 1], leaving), entering))
    return graphs


def _not_one(operations: Operations, border: Border) -> ValueError:
    crossing = operations.crossing(border.first)
    first = operations.inputs[0]
    learned = [node for node in crossing if not _depends(node, first)]
    names = ", ".join(map(str, crossing))
    text = f"the model cannot be cut {border.name}: {names} would cross the cut, and only one tensor may"
    if not crossing:
        text = f"the model cannot be cut {border.name}: nothing that depends on its first input crosses"
    elif first in crossing:
        text += f"; {first} is the first input itself, in whose place later parts get the state"
    elif learned:
        made = [path for path, _ in learned[0].meta.get("nn_module_stack", {}).values() if path]
        where = f" in {made[-1]!r}" if made else ""
        text += f"; {learned[0]} is computed of parameters{where} and used behind the cut"
    return ValueError(text)


def _depends(node: fx.Node, source: fx.Node) -> bool:
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one is source:
            return True
        if one not in seen and one.target not in SIZES:
            seen.add(one)
            stack += one.all_input_nodes
    return False


class _Part:
    """The graph of a part as it is made."""

    def __init__(self, operations: Operations, entering: fx.Node, events: Events) -> None:
        self.whole, self.entering, self.events = operations, entering, events
        self.graph = fx.Graph()
        self.state = self.graph.placeholder("state")
        self.copies = {node: self.graph.placeholder(node.name) for node in operations.inputs[1:]}
        self.device = self.graph.call_function(getattr, (self.state, "device")) if operations.device else None
        self.copies[entering] = self.state

    def graph_of(self, nodes: Sequence[fx.Node], leaving: fx.Node | None) -> fx.Graph:
        """Some nodes, up to the value that leaves, or to the output."""
        if any(one is self.entering or _views(one, self.entering) for node in nodes for one in _written(node)):
            self.copies[self.entering] = self.graph.call_function(torch.clone, (self.state,))
        self._happen(self.entering)
        for node in nodes:
            if node.op not in ("placeholder", "get_attr") and node not in self.copies:
                self._copy(node)
                self._happen(node)
        if leaving is not None:
            self.graph.output(self.copies[leaving])
        for node in reversed(nodes):  # what only later parts use, which compute it again
            if node.op == "call_function" and node in self.whole.fixed and not self.copies[node].users:
                self.graph.erase_node(self.copies.pop(node))
        if self.device is not None and not self.device.users:
            self.graph.erase_node(self.device)
        return self.graph

    def _happen(self, node: fx.Node) -> None:
        for name in self.events.get(node, ()):
            self.graph.call_module(name, (self.copies[node],))

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self.copies[node] = self.graph.node_copy(node, self._copy_of)
        if self.device is not None:
            copy.args = map_aggregate(copy.args, self._on_device)
            copy.kwargs = map_aggregate(copy.kwargs, self._on_device)
        return copy

    def _on_device(self, value: Any) -> Any:
        return self.device if isinstance(value, torch.device) and value == self.whole.device else value

    def _copy_of(self, node: fx.Node) -> fx.Node:
        """The copy of what goes into an operation: it is there, or computed again."""
        if node in self.copies:
            return self.copies[node]
        if node.op == "get_attr":
            self.copies[node] = self.graph.node_copy(node)
            return self.copies[node]
        assert node in self.whole.fixed, node  # nothing else crosses a cut
        if isinstance(node.meta.get("val"), torch.SymInt) and (size := self._size(node.meta["val"])) is not None:
            self.copies[node] = size
            return size
        if node.target in SIZES or node.target in SHAPED:
            (of, *_) = node.all_input_nodes
            if of not in self.copies and of not in self.whole.fixed:
                self.copies[of] = self._of_shape(of.meta["val"])
        return self._copy(node)

    def _size(self, value: torch.SymInt) -> fx.Node | None:
        """A size by the sizes of the state or of further inputs."""
        wanted = value.node.expr
        for node in (self.entering, *self.whole.inputs[1:]):
            for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt) and (offset := wanted - size.node.expr).is_Integer:
                    read = self.graph.call_function(aten.sym_size.int, (self.copies[node], dim))
                    return self.graph.call_function(operator.add, (read, int(offset))) if offset else read
        return None

    def _of_shape(self, value: Tensor) -> fx.Node:
        """A tensor of the shape and dtype of one that is not there."""
        sizes = []
        for size in value.shape:
            one = self._size(size) if isinstance(size, torch.SymInt) else size
            if one is None:
                raise ValueError(f"the model cannot be cut: the state {self.entering} does not show the size {size}")
            sizes.append(one)
        return self.graph.call_function(aten.new_empty.default, (self.state, sizes), {"dtype": value.dtype})


def _repeatable(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node has the same value each time."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return (
            not any(True for _ in module.parameters())
            and not any(True for _ in module.buffers())
            and not any("Drop" in type(one).__name__ for one in module.modules())
        )
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return not name.endswith("_") and not any(word in name for word in ("drop", "rand", "bernoulli"))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What an operation writes into."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                yield from (
                    one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, fx.Node)
                )


def _views(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node may share the memory of another."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
        if node.target._schema.returns[0].alias_info is None and node.target not in (
            aten.reshape.default,
            aten.contiguous.default,
        ):
            return False
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
        if node is source:
            return True
    return False
