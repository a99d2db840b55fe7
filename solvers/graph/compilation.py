"""Solves in graphs: in the caller's, or in one that is compiled here, once for each kind of solve."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import is_dynamo_supported
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config
from torch.compiler import assume_constant_result
from torch.utils._pytree import tree_leaves, tree_map_only

from solvers.controllers import SampleController, SampleStates
from solvers.gradients.captured import owner_of
from solvers.graph.clock import FAILED_FIRST, GOING
from solvers.graph.compiler import compile_loops, watched
from solvers.graph.fields import GraphField
from solvers.graph.result import checked, solution_of
from solvers.graph.solve import SLOTS, Ending, Numbers, Setting, solved
from solvers.packing import Packing
from solvers.solution import Solution
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import check_finite, in_state_shape, is_transformed

__all__ = ["check_graph", "forget", "solve_in_graph"]

BACKEND: Any = compile_loops
"""The compiler, as ``torch.compile`` takes it."""
PAYS = 1 << 15
"""Numbers of a state up to which a graph is the faster one: the loop on the host is then much of the time."""
TRACES, WRITES = (tuple(map(int, torch.__version__.split(".")[:2])) >= version for version in ((2, 11), (2, 14)))
"""Whether this torch takes a solve as a graph, and whether its loops write where it keeps what a gradient needs."""
MOST = 32
"""Kinds of solves of which compiled ones are kept."""

_names = count()
_compiled: OrderedDict[Any, Callable[..., Ending]] = OrderedDict()
_probed: set[Any] = set()
_long: set[Any] = set()  # kinds of solves that took more steps than have room
_numbers: set[Any] = set()  # those whose fields have numbers that change
_refused: set[Any] = set()  # those that the compiler fails at, or "auto" leaves, for their fields cannot be a graph
_warned = _lacking = False
_count = 0  # of graphs that were compiled


def check_graph(
    graph: Any, x: Tensor | None, *, steps: Any, event: Any, keep: str, gradient: Any, controller: Any,
    tableau: ButcherTableau, at: Any,
) -> bool:  # fmt: skip
    """Whether a solve is a graph: with "auto" where it can be one and pays.

    Args:
        graph: as the caller passed it.
        x: the first state, packed, or None where it is not known.
        steps, event, keep, gradient, controller, tableau, at: as :func:`~solvers.integrate` takes them.

    Raises:
        ValueError, TypeError: it cannot, and is to be one; the message names the argument.
    """
    if graph is False:
        return False
    if graph is not True and graph != "auto":
        raise ValueError(f"graph must be True, False or 'auto', got {graph!r}")
    reason: Exception | None = None
    if steps is not None:
        reason = ValueError(
            "graph=True holds the loop that chooses steps: steps=n takes none, and is a graph in torch.compile as it is"
        )
    elif event is not None:
        reason = ValueError("graph=True finds no event: leave out event, or graph=True")
    elif graph == "auto" and keep == "states" and at is None:
        return False  # of which a graph keeps the last
    elif keep == "steps":
        reason = ValueError("graph=True keeps no steps: leave out keep='steps', and give the times of states, at=")
    elif not tableau.explicit:
        reason = ValueError(f"graph=True takes explicit methods, got {tableau.name}: graph=False")
    elif gradient not in ("direct", "backsolve"):
        reason = ValueError(
            "graph=True has a gradient of its own, that of the steps, whose memory does not grow with them: leave out "
            f"gradient={gradient!r}"
        )
    elif at is not None and tableau.dense is None:
        reason = ValueError(
            f"graph=True reads states at times off an interpolant, and {tableau.name} has none: bs23, dopri5 and tsit5 "
            "have"
        )
    elif not hasattr(controller, "each"):
        reason = TypeError(f"controller must have a method each() with graph=True, got {type(controller).__name__}")
    elif not TRACES and graph is not True:
        return False
    elif not TRACES and torch.compiler.is_compiling():
        reason = ValueError(f"graph=True needs torch 2.11 or newer, this is {torch.__version__}: graph=False")
    elif not TRACES:
        return _without(f"it needs torch 2.11 or newer, this is {torch.__version__}", graph)
    elif torch.compiler.is_compiling():
        return True
    elif not is_dynamo_supported():
        return _without("this Python has no torch.compile", graph)
    elif _lacking:
        return False
    elif x is not None and (what := _at_work(x)):
        reason = ValueError(what)
    if reason is not None and graph is True:
        raise reason
    return reason is None and (graph is True or x is None or x.numel() <= PAYS)


def _at_work(x: Tensor) -> str:
    """What is at work that a graph of its own does not follow, and what to do."""
    if torch.is_autocast_enabled(x.device.type):
        return "graph=True computes in the precision of the state: call it outside of autocast, or graph=False"
    if is_transformed(x) or torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return "graph=True cannot be transformed by torch.func: graph=False"
    if x.is_complex():
        return f"graph=True takes real states, got {x.dtype}: torch.view_as_real, or graph=False"
    return "graph=True needs times in float64, which this device has not: graph=False" if x.device.type == "mps" else ""


def _without(why: str, graph: Any) -> bool:
    """That there is no graph; warned of once, where it was to be one."""
    global _warned
    if graph is True and not _warned:
        warnings.warn(f"graph=True solves as graph=False does, for {why}", stacklevel=4)
        _warned = True
    return False


def _compile(graph: Any, inputs: Any) -> Any:
    """Compile; the compiler overwrites no tensor that is saved for a backward pass (:func:`_keep_buffers`)."""
    global _count
    _count += 1
    with config.patch(donated_buffer=False):
        return (BACKEND if callable(BACKEND) else lookup_backend(BACKEND))(graph, inputs)


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
    parameters: Any, gradient: str = "direct", at: Any = None, times: Tensor | None, of: Any = None,
    graph: Any = True,
) -> Solution | None:  # fmt: skip
    """The solution, or None where there is no compiler, after a warning.

    Args:
        field, x0, t0, t1, args, tableau, tolerance, controller, parameters, gradient: as :func:`~solvers.integrate` has
            them, the first state packed.
        packing: of it.
        per_sample: whether each sample has its own steps.
        raises: whether a solve that cannot go on raises.
        at: output times as numbers, within the solve; those of ``times`` if not given.
        times: the same as a tensor, which gradients may flow to, as the solution shows them; or None.
        of: the function of the caller's that the field calls, if it is another.
        graph: True or "auto", as the caller passed it.
    """
    inside, of = torch.compiler.is_compiling(), field if of is None else of
    owner = _owner(of, parameters, inside)
    ends = _times((t0, t1), x0, per_sample)
    rows = None
    if times is not None:
        rows = times.to(torch.float64)
        if at is not None:
            exact = torch.as_tensor(at, dtype=torch.float64, device=x0.device)
            rows = rows + (exact - rows.detach()) if times.requires_grad else exact
        if per_sample:
            rows = rows.t() if rows.ndim > 1 else rows[:, None].expand(-1, x0.shape[0])
    setting = Setting(
        GraphField(field, owner, packing), tableau, tolerance, controller, raises, gradient == "backsolve", inside
    )
    if not WRITES and (times is not None or (gradient == "direct" and _needs_gradient(setting.field, x0, args))):
        why = f"gradients and output times need torch 2.14 or newer, this is {torch.__version__}"
        if inside:
            raise ValueError(f"graph=True: {why}; graph=False, or gradient='backsolve' for gradients")
        _without(why, graph)
        return None
    if inside:
        _keep_buffers()
        setting.field.check()
        if torch.is_grad_enabled():
            setting.field.check_reads(in_state_shape(ends[0], x0), x0, args)
        end = solved(setting, x0, *_apart(ends), rows, args)
        numbers = Numbers(*end.numbers.unbind())
        if raises:  # which a graph cannot
            over = in_state_shape(numbers.status == GOING, end.x)
            end = end._replace(x=torch.where(over, end.x, torch.nan))
        return solution_of(end, numbers, times, packing.unpack)
    x0, args = _distinct(x0, args, setting.field.parameters)
    key = _key_of(setting, of, x0, per_sample)
    if key in _refused:
        return None
    try:
        setting.field.check()
        end = _end(key, setting, of, x0, ends, rows, args, graph)
    except (ValueError, TypeError):
        if graph != "auto":
            raise
        _refused.add(key)
        return None
    if end is None:
        return None
    if end.x.requires_grad and setting.field.others:
        _guard(end, setting.field.others)
    numbers = Numbers(*end.numbers.tolist())  # waits for the device, once
    if per_sample or t0 == t1 or numbers.status == FAILED_FIRST:
        check_finite(x0, "x0")
    solution = solution_of(end, numbers, times, packing.unpack)
    if raises:
        checked(solution, end, numbers, setting.field.velocity(tuple(args)), t0, t1, tableau, tolerance)
    return solution


def _end(
    key: Any, setting: Setting, of: Any, x0: Tensor, ends: Tensor, rows: Tensor | None, args: Sequence[Any], graph: Any
) -> Ending | None:
    """How a solve ends that is compiled here, with room for its steps; None where there is no compiler."""
    if key not in _long:
        end = _run(key, setting, of, x0, ends, rows, args, graph)
        if end is None or not end.x.requires_grad or setting.backsolves or end.numbers[-1].max() <= SLOTS:
            return end
        _long.add(key)
    return _run(key, replace(setting, replays=True), of, x0, ends, rows, args, graph)


def _run(
    key: Any, setting: Setting, of: Any, x0: Tensor, ends: Tensor, rows: Tensor | None, args: Sequence[Any], graph: Any
) -> Ending | None:
    """How a solve ends that is compiled here; None where there is no compiler."""
    global _lacking
    run = _compiled_for(key, setting)
    start = in_state_shape(ends[0], x0)
    if run not in _probed:
        setting.field.probe(start, x0, args)
        _probed.add(run)
    inputs = (x for x in (x0, rows, *tree_leaves(tuple(args))) if isinstance(x, Tensor))
    asked = any(x.requires_grad and not x.is_leaf for x in inputs)  # for their gradients, with a warning
    quiet: Any = warnings.catch_warnings() if asked else nullcontext()
    numbers: Any = dynamo.patch(specialize_float=True) if key in _numbers else nullcontext()
    compiled = _count
    try:
        with quiet, numbers:
            if asked:
                warnings.filterwarnings("ignore", message="The .grad attribute")
            end = run(setting.field, setting.tolerance, setting.controller, x0, ends, rows, tuple(args))
        if compiled != _count:  # something that the field reads is another
            setting.field.probe(start, x0, args)
        return end
    except FailOnRecompileLimitHit:  # fields of one class that differ inside: room for others
        if (key, setting.replays) not in _compiled:
            raise
        del _compiled[key, setting.replays]
        return _run(key, setting, of, x0, ends, rows, args, graph)
    except TorchDynamoException as error:
        if "compiler" in str(error) and "CxxCompiler" in str(error):
            _lacking = True
            _without("there is no compiler of C++", graph)
            return None
        if type(error).__name__ == "InductorError":
            _refused.add(key)
            warnings.warn(
                f"graph=True solves as graph=False does, for the compiler failed at this field: {_first_lines(error)}",
                stacklevel=5,
            )
            return None
        if key not in _numbers:  # a number of the field that was another before: a constant again
            _numbers.add(key)
            return _run(key, setting, of, x0, ends, rows, args, graph)
        raise ValueError(
            f"field cannot be part of a graph: {_first_lines(error)}. It must not branch on values (torch.where for "
            "if), nor read them, as .item() does; or graph=False"
        ) from error


def _guard(end: Ending, others: Sequence[Tensor]) -> None:
    """Let the gradients of a solve look whether what its field reads beside its parameters was written over."""
    versions = [other._version for other in others]

    def look(gradient: Tensor) -> None:
        if versions != [other._version for other in others]:
            raise RuntimeError(
                "field reads a buffer or a frozen parameter that was modified by an inplace operation between the "
                "solve and its gradient, which calls the field again: change it after backward(), or graph=False"
            )

    for states in (end.x, end.outputs):
        if states.requires_grad:
            states.register_hook(look)


def _distinct(x0: Tensor, args: Sequence[Any], parameters: Sequence[Tensor]) -> tuple[Tensor, Sequence[Any]]:
    """The first state and arguments, of which a graph takes none twice, nor views of one."""
    if not args and not x0._is_view() and not isinstance(x0, nn.Parameter):
        return x0, args
    known = {p.untyped_storage().data_ptr() for p in parameters}

    def own(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place in known:
            return x.clone()
        known.add(place)
        return x

    return own(x0), tree_map_only(Tensor, own, tuple(args))


@assume_constant_result
def _keep_buffers() -> bool:
    """Let the compiler overwrite no tensor that is saved for a backward pass, while it compiles the caller's graph.

    It takes the inputs of a loop in such a pass for these by their position (torch 2.14), and writes over sums that are
    needed: gradients come out wrong without a word.
    """
    config.donated_buffer = False
    return True


def _needs_gradient(field: GraphField, x0: Tensor, args: Sequence[Any]) -> bool:
    """Whether one is asked for."""
    return torch.is_grad_enabled() and any(
        x.requires_grad for x in (x0, *field.parameters, *tree_leaves(tuple(args))) if isinstance(x, Tensor)
    )


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


def _times(ends: tuple[Any, Any], x: Tensor, per_sample: bool) -> Tensor:
    """Start and end as one tensor, float64, ``(2,)``, or ``(2, B)`` of each sample."""
    if any(isinstance(t, Tensor) for t in ends):
        t = torch.stack([torch.as_tensor(t, dtype=torch.float64, device=x.device) for t in ends])
    else:
        t = torch.as_tensor(ends if not per_sample else np.array(ends), dtype=torch.float64).to(x.device)
    return t[:, None].expand(-1, x.shape[0]).clone() if per_sample and t.ndim == 1 else t


def _apart(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end; of views of one tensor a loop cannot take several."""
    t0, t1 = ends.unbind()
    return t0.clone(), t1.clone()


def _key_of(setting: Setting, of: Any, x0: Tensor, per_sample: bool) -> Any:
    """What is constant in a graph, but for what the compiler looks at before each run."""
    tolerance = setting.tolerance
    kinds = (v if not isinstance(v, Tensor) else (v.shape, v.dtype) for v in (tolerance.rtol, tolerance.atol))
    norm = getattr(tolerance.norm, "__code__", type(tolerance.norm))
    limits = tolerance.first_step, tolerance.min_step, tolerance.max_step, tolerance.max_steps
    return (
        type(of), getattr(of, "__code__", None), setting.tableau, *kinds, norm, *limits, type(setting.controller),
        setting.raises, setting.backsolves, per_sample, x0.dtype, x0.device, x0.shape[1:], setting.field.packing.single,
        tuple(p.shape for p in setting.field.parameters), setting.field.kinds(),
        torch.is_grad_enabled(),
    )  # fmt: skip


def _compiled_for(kind: Any, setting: Setting) -> Callable[..., Ending]:
    """The compiled solve of a kind; automatically of any batch size from the second one on."""
    key = (kind, setting.replays)
    if key in _compiled:
        _compiled.move_to_end(key)
        return _compiled[key]
    tableau = setting.tableau
    ways = setting.raises, setting.backsolves, setting.replays
    _check_controller(setting.controller, tableau.error_order)

    def run(
        field: GraphField, tolerance: Tolerance, controller: Any, x0: Tensor, ends: Tensor, at: Tensor | None,
        args: tuple[Any, ...],
    ) -> Ending:  # fmt: skip
        return solved(Setting(field, tableau, tolerance, controller, *ways), x0, *_apart(ends), at, args)

    # a code of its own, for the compiler counts and keeps what it compiles by code
    own = FunctionType(
        run.__code__.replace(co_name=f"solve_{next(_names)}"), run.__globals__, run.__name__, None, run.__closure__
    )
    _compiled[key] = torch.compile(own, fullgraph=True, backend=_compile, options={"guard_filter_fn": watched})
    while len(_compiled) > MOST:
        _compiled.popitem(last=False)
        _probed.clear()
    for kinds in (_long, _numbers, _refused):
        if len(kinds) > 1000:
            kinds.clear()
    return _compiled[key]


def forget() -> None:
    """Forget what was compiled, and what could not be."""
    global _lacking
    _lacking = False
    for kept in (_compiled, _probed, _long, _numbers, _refused):
        kept.clear()


def _first_lines(error: Exception) -> str:
    """What the compiler says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3]).rstrip(".")[:400]
