"""The operators of a forward pass by torch.export, with the model's own parameters, and the states among them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_map

from odenets.adapting.cutting.splitting import Operations
from odenets.adapting.program.additions import find_additions
from odenets.adapting.program.graph import Call, Node, Program
from odenets.adapting.program.operators import SAME_VALUES
from odenets.modes import device_of
from odenets.recording import is_recorder

if TYPE_CHECKING:
    import sympy

__all__ = ["MODEL", "Exported", "StepNodes", "export", "steps_in"]

MODEL, CONSTANTS = "model", "constants"
"""Where the graphs find the attributes of the model, and constants of the pass."""

CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_check")
"""Names with which operators begin that only check what is so at the cut."""


@dataclass(frozen=True)
class Exported:
    """A forward pass as operators.

    Attributes:
        operations: of which the inputs are the leaves of what the model is called with.
        attributes: what the graph takes, by name: parameters and buffers of the model, and constants.
        output: how the output is made of its tensors.
        largest: of sizes that are symbols, where there is such.
        conditions: on these symbols, under which the pass takes this way.
    """

    operations: Operations
    attributes: Mapping[str, Any]
    output: TreeSpec
    largest: Mapping[sympy.Symbol, int]
    conditions: Sequence[sympy.Basic]


@dataclass(frozen=True)
class StepNodes:
    """The nodes of the states of a step and of its branch, and the name of the module in which that is computed."""

    x0: fx.Node
    x1: fx.Node
    summand: fx.Node
    block: str


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Exported:
    """The operators of a pass of a ``model`` in the mode in which it is, for any number of samples and of tokens.

    Args:
        model: any module.
        args, kwargs: its inputs, of two samples or more.

    Returns:
        The graph.

    Raises:
        ValueError: the pass cannot be exported, because its control flow depends on the data, or the like.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    shapes = tree_map(_dynamic, dict(bound.arguments))
    try:
        with warnings.catch_warnings(), _without_cache(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever a model raises that is called with tensors of unknown size
        raise ValueError(
            f"{type(model).__name__} cannot be cut: torch.export cannot follow its forward pass ({_first_lines(error)})"
        ) from error
    return _exported(program, model)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face's models meanwhile make no cache of keys and values, which would cross all cuts."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _dynamic(value: Any) -> dict[int, Any] | None:
    """Which dimensions may be others later: samples, and tokens."""
    if not isinstance(value, Tensor):
        return None
    tokens = (
        range(1, value.ndim) if not value.is_floating_point() else range(1, value.ndim - 1) if value.ndim == 3 else ()
    )
    return {dim: torch.export.Dim.AUTO for dim in (0, *tokens) if value.ndim and value.shape[dim] > 1}


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def _exported(program: torch.export.ExportedProgram, model: nn.Module) -> Exported:
    """The graph with the attributes of the model in place of inputs that stand for them."""
    signature, graph = program.graph_signature, fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    inputs: list[fx.Node] = []
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in owned:
            name = f"{MODEL}.{owned[node.name]}"
            attributes[name] = _attribute(model, owned[node.name])
            copy = graph.get_attr(name)
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            name = f"{CONSTANTS}.{node.name}"
            attributes[name] = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            copy = graph.get_attr(name)
        elif node.op == "get_attr":  # the graph of a region
            attributes[str(node.target)] = getattr(program.graph_module, str(node.target))
            copy = graph.get_attr(str(node.target))
        elif node.op == "call_function" and not node.users and _checks(node):
            continue
        else:
            copy = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                inputs.append(copy)
        copy.meta = dict(node.meta)
        copies[node] = copy
    nodes = [*graph.nodes]
    written = {str(one.target) for node in nodes for one in _changed(node)}
    learned = {name for name, value in attributes.items() if isinstance(value, nn.Parameter)} | written
    operations = Operations(nodes, inputs, frozenset(learned), {}, device_of(model))
    assert program.call_spec.out_spec is not None
    ranges = {one: limits.upper for one, limits in program.range_constraints.items()}
    largest = {one: int(upper) for one, upper in ranges.items() if upper.is_Integer}
    return Exported(operations, attributes, program.call_spec.out_spec, largest, _conditions(inputs))


def _conditions(inputs: Sequence[fx.Node]) -> list[sympy.Basic]:
    """Conditions on the sizes of inputs."""
    for node in inputs:
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt) and size.node.shape_env is not None:
                return [guard.expr for guard in size.node.shape_env.guards]
    return []


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def _checks(node: fx.Node) -> bool:
    name = node.target._schema.name.rpartition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
    return name.startswith(CHECKS)


def _changed(node: fx.Node) -> Iterator[fx.Node]:
    """Attributes into which a node writes: those that it takes and that batch norms change in training."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema
    running = "batch_norm" in schema.name or "instance_norm" in schema.name
    for i, argument in enumerate(schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        written = written or (running and argument.name.startswith("running"))
        if written and isinstance(value, fx.Node) and value.op == "get_attr":
            yield value


# -- states -------------------------------------------------------------------------------------------------------


def steps_in(exported: Exported, model: nn.Module) -> list[StepNodes]:
    """The residual additions of a pass of a ``model``, in order; not those of modules that record their own steps."""
    nodes: dict[fx.Node, Node] = {}
    calls: dict[tuple[str, ...], Call] = {}
    recorders = {name for name, module in model.named_modules() if name and is_recorder(module)}
    for index, node in enumerate(exported.operations.nodes):
        nodes[node] = _node(node, index, nodes, _call(node, calls, recorders), exported)
    for node in exported.operations.nodes[-1].all_input_nodes:
        nodes[node].returned = True
    operations = {one: node for node, one in nodes.items()}
    program = cast(Program, SimpleNamespace(nodes=[*nodes.values()]))  # what the search reads
    steps = []
    for one in find_additions(program).additions:
        x0 = next((operand for operand in one.node.inputs if operand.value is one.x0.value), one.x0)
        steps.append(StepNodes(operations[x0], operations[one.x1], operations[one.summand], one.block.name))
    return steps


def _call(node: fx.Node, calls: dict[tuple[str, ...], Call], recorders: set[str]) -> Call:
    """The call of the module in which a node is computed."""
    key: tuple[str, ...] = ()
    call = calls.setdefault(key, Call("", None))
    for part, (path, _) in node.meta.get("nn_module_stack", {}).items():
        if name := _dotted(path):
            key = (*key, str(part))
            call = calls.setdefault(key, Call(name, call, name in recorders))
    return call


def _dotted(path: str) -> str:
    return path.removeprefix("L['self']").removeprefix(".")


def _node(node: fx.Node, index: int, nodes: dict[fx.Node, Node], call: Call, exported: Exported) -> Node:
    value = node.meta.get("val")
    inputs = tuple(nodes[one] for one in node.all_input_nodes)
    op, fixed, learned = _name(node), False, False
    if node.op == "get_attr":
        learned = isinstance(exported.attributes[str(node.target)], nn.Parameter)
        op, fixed = "parameter" if learned else "constant", True
    elif node.op == "placeholder":
        op = "input"
    elif node.op != "output":
        fixed = all(one.fixed for one in inputs) or not isinstance(value, Tensor | list | tuple)
        learned = fixed and any(one.learned for one in inputs)
    shape = tuple(map(_hint, value.shape)) if isinstance(value, Tensor) else ()
    floating = isinstance(value, Tensor) and value.is_floating_point()
    one = Node(index, op, inputs, shape, floating, fixed, learned, _same(node, op, value), call)
    for each in inputs:
        each.users.append(one)
    return one


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).rpartition("::")[2].removesuffix("_")
    return "select" if node.op == "call_function" else node.op


def _same(node: fx.Node, op: str, value: Any) -> bool:
    """Whether a node has the elements of its first input, in the same order."""
    first = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(first, Tensor) or node.op != "call_function":
        return False
    if first.dtype != value.dtype or _count(first) != _count(value):
        return False
    if op in ("dropout", "feature_dropout", "alpha_dropout"):
        return bool(node.args[1] == 0) or node.args[2] is False
    if op in ("add", "sub", "mul", "div"):
        neutral = 0 if op in ("add", "sub") else 1
        return len(node.args) > 1 and isinstance(node.args[1], int | float) and node.args[1] == neutral
    return op in SAME_VALUES or op in ("to", "_to_copy")


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else cast(int, size.node.hint)


def _count(x: Tensor) -> int:
    count = 1
    for size in x.shape:
        count *= _hint(size)
    return count
