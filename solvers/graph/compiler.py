"""Inductor as solves in graphs need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

__all__ = ["compile_loops"]

THIN = 4
"""Columns up to which a product of matrices is written out, into the loops around it."""

_aten: Any = torch.ops.aten
_LOOPS = "torch.ops.higher_order.while_loop"


def compile_loops(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What :func:`torch.compile` calls with a graph and examples of its inputs.

    On a CPU the loops themselves are compiled, which otherwise are Python's. Loops are kept on disk as all else is. No
    tensor that is saved for a backward pass is written over: the compiler takes the inputs of a loop in such a pass for
    these by their position (torch 2.14), and would write over sums that are needed.
    """
    on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
    patches: dict[str, Any] = {"unsafe_marked_cacheable_functions": {_LOOPS: "1"}}
    if on_cpu:
        patches["cpp_wrapper"] = True
    with config.patch(donated_buffer=False):
        return compile_fx(graph, inputs, config_patches=patches)
