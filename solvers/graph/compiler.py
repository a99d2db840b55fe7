"""Inductor as solves in graphs need it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

__all__ = ["compile_loops", "watched"]

FEW = 8
"""Numbers to which a linear map is written the other way round."""

_OURS = re.compile(r"L\['(?:tableau|ways)'\]|G\['(?:__import_(?:solvers|torch)(?:_dot_|')|__builtins|_?[A-Za-z])")
_LINEAR: Any = torch.nn.functional.linear
_LOOPS = "torch.ops.higher_order.while_loop"


def compile_loops(graph: GraphModule, inputs: Sequence[Any]) -> Any:
    """What :func:`torch.compile` calls with a graph and examples of its inputs.

    On a CPU the loops themselves are compiled, which otherwise are Python's. Loops are kept on disk as all else is.
    """
    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
    patches: dict[str, Any] = {"unsafe_marked_cacheable_functions": {_LOOPS: "1"}}
    if on_cpu:
        patches["cpp_wrapper"] = True
        _for_mkl(graph)
    else:
        patches["max_fusion_size"] = 12  # Triton 3.6 fails at the kernels of longer fusions of the loop
    return compile_fx(graph, inputs, config_patches=patches)


def watched(guards: Sequence[Any]) -> list[bool]:
    """Which conditions of a compiled solve are looked at before each: those that the caller can change.

    Left out are the tableau, which is a constant of it, and functions of this package and of torch: hundreds, which
    take longer than a step of a small field.
    """
    return [_OURS.search(guard.name) is None for guard in guards]


def _for_mkl(graph: GraphModule) -> None:
    """Write linear maps as the library for them is fastest: it copies biases first, and is slow in few columns.

    The pass over numbers that follows takes the bias. It is subtracted with the other sign, for the compiler takes a
    sum of the two for a call of that library.
    """
    for part in (module for module in graph.modules() if isinstance(module, GraphModule)):
        nodes: Any = part.graph.find_nodes(op="call_function", target=_LINEAR)
        call, method = part.graph.call_function, part.graph.call_method
        for node in nodes:
            if len(node.args) < 2 or node.kwargs:
                continue
            parts: Any = (*node.args, None)[:3]
            x, weight, bias = parts
            matrix, state = (one.meta.get("example_value") for one in (weight, x))
            if matrix is None or state is None or matrix.dtype not in (torch.float32, torch.float64):
                continue
            with part.graph.inserting_before(node):
                if len(matrix) <= FEW and state.ndim == 2:
                    product = method("t", (call(torch.mm, (weight, method("t", (x,)))),))
                else:
                    product = call(_LINEAR, (x, weight))
                whole = product if bias is None else call(torch.sub, (product, call(torch.neg, (bias,))))
            node.replace_all_uses_with(whole)
            part.graph.erase_node(node)
        if nodes:
            part.recompile()
