"""Solves in graphs: in the caller's, or in one that is compiled here, once for each kind of solve."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from solvers.controllers import SampleController, SampleStates
from solvers.gradients.captured import owner_of
from solvers.graph.fields import GraphField
from solvers.graph.result import checked, solution_of
from solvers.graph.solve import Ending, Setting, solved
from solvers.packing import Packing
from solvers.solution import Solution
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import in_state_shape, is_transformed

__all__ = ["Graph", "check_graph", "forget", "solve_in_graph"]

Graph = bool | Literal["auto"]
BACKEND: Any = "inductor"
"""The compiler, as ``torch.compile`` names it."""
MOST = 32
"""Kinds of solves of which compiled ones are kept."""

_compiled: OrderedDict[Any, Callable[..., Ending]] = OrderedDict()
_probed: set[Any] = set()


def check_graph(
    graph: Any, *, steps: Any, event: Any, keep: str, gradient: str, controller: Any, tableau: ButcherTableau, at: Any
) -> None:
    """That a solve can be a graph.

    Raises:
        ValueError, TypeError: it cannot; the message names the argument.
    """
    if graph not in (True, False, "auto"):
        raise ValueError(f"graph must be True, False or 'auto', got {graph!r}")
    if graph is not True:
        return
    if steps is not None:
        raise ValueError("graph=True holds the loop that chooses steps: steps=n takes none, and is a graph as it is")
    if event is not None:
        raise ValueError("graph=True finds no event: leave out event, or graph=True")
    if keep == "steps":
        raise ValueError("graph=True keeps no steps: leave out keep='steps', and give the times of states, at=")
    if gradient != "direct":
        raise ValueError(
            f"graph=True has a gradient of its own, that of the steps, whose memory does not grow with them: leave out "
            f"gradient={gradient!r}"
        )
    if at is not None and tableau.dense is None:
        raise ValueError(f"graph=True reads states at times off an interpolant, and {tableau.name} has none: bs23, "
                         "dopri5 and tsit5 have")  # fmt: skip
    if not isinstance(controller, SampleController):
        raise TypeError(f"controller must have a method each() with graph=True, got {type(controller).__name__}")


def _check_controller(controller: SampleController, order: int) -> None:
    """That a rule takes tensors.

    Raises:
        TypeError: it does not.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    try:
        states = controller.each(SampleStates(one, one.bool(), (one, one)), 0.5 * one, order)  # type: ignore[arg-type]
        good = all(isinstance(x, Tensor) for x in (states.h, states.accepted, *states.errors))
    except Exception as error:
        raise TypeError(
            f"controller.each must take tensors with graph=True, {controller!r:.80} does not: {error}"
        ) from error
    if not good:
        raise TypeError(f"controller.each must return tensors with graph=True, {controller!r:.80} does not")


def solve_in_graph(
    field: Callable[..., Any], x0: Tensor, t0: Any, t1: Any, *, packing: Packing, args: Sequence[Any],
    tableau: ButcherTableau, tolerance: Tolerance, controller: SampleController, per_sample: bool, raises: bool,
    parameters: Any, at: Any, times: Tensor | None,
) -> Solution | None:  # fmt: skip
    """The solution, or None where there is no compiler, after a warning; arguments as :func:`integrate` has them.

    ``x0`` is packed, ``at`` are the output times as numbers and ``times`` as a tensor.
    """
    inside = torch.compiler.is_compiling()
    owner = _owner(field, parameters, inside)
    starts, ends = (_times(t, x0, per_sample) for t in (t0, t1))
    rows = None
    if times is not None:
        exact = torch.as_tensor(at, dtype=torch.float64, device=x0.device)
        rows = (
            exact if not times.requires_grad else times.to(torch.float64) + (exact - times.detach().to(torch.float64))
        )
        if per_sample:
            rows = rows.t() if rows.ndim > 1 else rows[:, None].expand(-1, len(x0))
    setting = Setting(GraphField(field, owner, packing), tableau, tolerance, controller, raises)
    if inside:
        setting.field.check()
        return solution_of(solved(setting, x0, starts, ends, rows, args), times, packing.unpack)
    _check_controller(controller, tableau.error_order)
    _check_here(x0, owner)
    setting.field.check()
    run = _compiled_for(setting, x0, per_sample)
    seen = (run, id(field), *(id(cell.cell_contents) for cell in getattr(field, "__closure__", None) or ()))
    if seen not in _probed:
        setting.field.probe(in_state_shape(starts, x0), x0, args)
        _probed.add(seen)
    try:
        end = run(setting.field, x0, starts, ends, rows, tuple(args))
    except Exception as error:
        raise _explained(error) from error
    solution = solution_of(end, times, packing.unpack)
    if raises:
        velocity = setting.field.velocity(tuple(args))
        checked(solution, end, velocity, t0, t1, tableau, tolerance)
    return solution


def _owner(field: Any, parameters: Any, inside: bool) -> nn.Module | None:
    """The module whose parameters a field reads; None of a function, which must have none where gradients flow.

    Raises:
        ValueError: nothing says what gets gradients.
    """
    if parameters is not None and not (isinstance(parameters, tuple | list) and not parameters):
        raise ValueError("parameters are those of the field with graph=True, a module: leave them out, or pass ()")
    owner = owner_of(field)
    if isinstance(owner, list):
        owner = nn.ModuleList([one for one in owner if isinstance(one, nn.Module)])
    if inside and owner is None and parameters is None and torch.is_grad_enabled():
        raise ValueError(
            "field must be a module with graph=True in a graph of torch.compile, which takes what a function reads for "
            "constants: a module, a method of one, or parameters=() where it reads nothing that gets a gradient"
        )
    return owner


def _times(t: Any, x: Tensor, per_sample: bool) -> Tensor:
    """Times as float64 tensors, a scalar, or one for each sample."""
    t = t if isinstance(t, Tensor) else torch.as_tensor(t)
    t = t.to(x.device, torch.float64)
    return t.expand(len(x)).clone() if per_sample else t


def _check_here(x0: Tensor, owner: nn.Module | None) -> None:
    """That nothing is at work that a graph of its own does not follow.

    Raises:
        ValueError: autocast, a transform of torch.func, or complex states.
    """
    if torch.is_autocast_enabled(x0.device.type):
        raise ValueError(
            "graph=True computes in the precision of the state: call it outside of autocast, or graph=False"
        )
    if is_transformed(x0):
        raise ValueError("graph=True cannot be transformed by torch.func: graph=False, or a graph of the caller's")
    if x0.is_complex():
        raise ValueError(f"graph=True takes real states, got {x0.dtype}: torch.view_as_real, or graph=False")


def _compiled_for(setting: Setting, x0: Tensor, per_sample: bool) -> Callable[..., Ending]:
    """The compiled solve of a kind; automatically of any batch size from the second one on."""
    field = setting.field.field
    key = (
        type(field), getattr(field, "__code__", None), setting.tableau, id(setting.tolerance), setting.controller,
        setting.raises, per_sample, x0.dtype, x0.device, x0.shape[1:], setting.field.packing.single,
        tuple(p.shape for p in setting.field.parameters), torch.is_grad_enabled(),
    )  # fmt: skip
    if key in _compiled:
        _compiled.move_to_end(key)
        return _compiled[key]
    tableau, tolerance, controller, raises = setting.tableau, setting.tolerance, setting.controller, setting.raises

    def run(field: GraphField, x0: Tensor, t0: Tensor, t1: Tensor, at: Tensor | None, args: tuple[Any, ...]) -> Ending:
        return solved(Setting(field, tableau, tolerance, controller, raises), x0, t0, t1, at, args)

    # a code of its own, for the compiler counts and keeps what it compiles by code
    own = FunctionType(
        run.__code__.replace(co_name=f"solve_{len(_compiled)}"), run.__globals__, run.__name__, None, run.__closure__
    )
    _compiled[key] = torch.compile(own, fullgraph=True, backend=BACKEND)
    while len(_compiled) > MOST:
        _compiled.popitem(last=False)
        _probed.clear()
    return _compiled[key]


def forget() -> None:
    """Forget what was compiled."""
    _compiled.clear()
    _probed.clear()


def _explained(error: Exception) -> Exception:
    """An error of the compiler in words."""
    return error
