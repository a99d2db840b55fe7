"""``options={"graph": True}``: an adaptive solve of :func:`~solvers.odeint` as one graph."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.errors import SolverError
from solvers.graph.compilation import check_graph, solve_in_graph
from solvers.methods import get_tableau
from solvers.packing import Packing
from solvers.torchdiffeq.problem import ADAPTIVE, make_rule, make_tolerance
from solvers.validation import real_dtype

__all__ = ["graph_states"]

_ELSEWHERE = ("jump_t", "step_t", "dtype")
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def graph_states(
    func: Any, packing: Packing, y0: Any, t: Tensor, rtol: Any, atol: Any, method: str, options: dict[str, Any]
) -> Any:
    """The states at the times, as ``y0`` with them in front; None where a warning says that there is no compiler.

    Raises:
        ValueError, TypeError: what a graph does not take.
        SolverError: the solve cannot go on; in a caller's graph states that are not reached are NaN instead.
    """
    if wrong := [name for name in _ELSEWHERE if options.get(name) is not None]:
        raise ValueError(f"options: graph excludes {', '.join(wrong)}")
    if wrong := [name for name in _CALLBACKS if getattr(func, name, None) is not None]:
        raise ValueError(f"options: graph calls no callbacks, func has {', '.join(wrong)}")
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim != 1 or len(t) == 0:
        raise TypeError("t must be a floating tensor of times, with one dimension and at least one time")
    x0, tableau, rule = packing.pack(y0), get_tableau(ADAPTIVE[method]), make_rule(options)
    if not check_graph(
        options["graph"],
        x0,
        steps=None,
        event=None,
        keep="last",
        gradient="direct",
        controller=rule,
        tableau=tableau,
        at=t,
    ):
        return None
    wide = t.to(x0.device, torch.float64)
    if not torch.compiler.is_compiling():
        signs = {(b > a) - (b < a) for a, b in pairwise(wide.tolist())}
        if not bool(wide.isfinite().all()) or len(signs) > 1 or 0 in signs:
            raise ValueError("t must be finite and strictly increasing or strictly decreasing")
    origin = wide[0] - wide[0].detach()  # 0; what depends on the start is moved by it
    args = (origin.to(real_dtype(x0)),) if t.requires_grad else ()

    def field(s: Any, x: Any, *shift: Tensor) -> Any:
        return func(s + shift[0] if shift else s, x)

    try:
        solution = solve_in_graph(
            field, x0, wide[0].detach(), wide[-1].detach(), packing=packing, args=args, tableau=tableau,
            tolerance=make_tolerance(packing, x0, rtol, atol, options), controller=rule, per_sample=False, raises=True,
            parameters=None, times=wide - origin, of=func,
            graph=options["graph"],
        )  # fmt: skip
    except SolverError as error:
        error.args = (str(error).replace("max_steps", "max_num_steps"),)
        error.solution = None
        raise
    return None if solution is None else solution.states
