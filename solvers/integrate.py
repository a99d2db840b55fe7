"""``integrate``: one call for every way to solve, control the error and let gradients flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from solvers.coefficients import as_numbers_or_tensors
from solvers.controllers import Controller, I, SampleController
from solvers.field_calls import Field
from solvers.gradient_modes import by_backsolving, by_recomputing, by_reversing, captured_field
from solvers.gradients.captured import Captured
from solvers.gradients.reversible import Reversible
from solvers.learned import LearnedTableau, check_gradient
from solvers.methods import get_tableau
from solvers.methods.rosenbrock import RosenbrockTableau
from solvers.output_times import output_times
from solvers.packing import Packing
from solvers.sample_loop import within
from solvers.separable import halves
from solvers.solution import Solution
from solvers.solve import Grid, Task, even_grid
from solvers.structured import BoundField, check_structure, part_of
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import check_call

__all__ = ["integrate"]

_TOLERANCE, _CONTROLLER, _COUPLING = Tolerance(), I(), Reversible().coupling
_ELSEWHERE = {
    name: ours
    for ours, names in {
        "solver, the name of a method": ("method",),
        "tolerance, as Tolerance(rtol=1e-3, atol=1e-6)": ("rtol", "atol", "tol"),
        "steps, the number of equal steps, or Tolerance(first_step=, max_step=)": (
            "options", "step_size", "dt", "dt0", "h", "h0", "num_steps", "first_step", "min_step", "max_step",
        ),
        "tolerance, as Tolerance(max_steps=1000)": ("max_steps", "max_num_steps", "mxstep"),
        "t0 and t1, and at=times for states between": ("t", "ts", "t_span", "tspan"),
        "at": ("t_eval", "times", "saveat"),
        "event": ("event_fn", "events"),
        'gradient="backsolve"': ("adjoint", "sensitivity", "use_adjoint", "adjoint_method", "adjoint_options"),
        "parameters": ("adjoint_params", "params"),
        'keep="steps", and solution(t)': ("dense_output", "dense"),
        "controller": ("stepsize_controller",),
        "gradient=Reversible(coupling=0.999)": ("coupling",),
    }.items()
    for name in names
}  # fmt: skip
"""Arguments by the names that they have in torchdiffeq, SciPy and diffrax."""


def integrate(
    field: Callable[..., Any],
    x0: Any,
    t0: float | Tensor,
    t1: float | Tensor | None = None,
    *,
    solver: str | ButcherTableau | LearnedTableau = "bs23",
    steps: int | None = None,
    tolerance: Tolerance | None = None,
    controller: Controller | None = None,
    control: Literal["batch", "sample"] = "batch",
    keep: Literal["last", "states", "steps"] = "states",
    at: Sequence[Any] | np.ndarray | Tensor | None = None,
    event: Callable[..., Tensor] | None = None,
    on_limit: Literal["raise", "return"] = "raise",
    gradient: Literal["direct", "checkpoint", "backsolve", "reversible"] | Reversible = "direct",
    parameters: Iterable[Tensor] | None = None,
    args: Sequence[Any] = (),
    graph: bool | Literal["auto"] = False,
    **unknown: Any,
) -> Solution:
    """Integrate ``dx/dt = v(t, x)`` from t0 to t1, which may lie before t0.

    Args:
        field: velocity ``v(t, x, *args)``, returning the shape, dtype and device of ``x``. Its ``t`` is a number, or
            with ``control="sample"`` a tensor ``(B, 1, ..., 1)`` of the state's precision that broadcasts against the
            state (``torch.where(t < 0.5, a, b)``, not ``if t < 0.5``); it lies between t0 and t1. The field must not
            write into x, nor into what it has returned (:func:`~solvers.rk_step`). It may use autograd inside.
        x0: state at t0: a tensor, floating or complex, or a tuple or dictionary of tensors ``(B, ...)``.
        t0, t1: start and end time; with ``control="sample"`` also ``(B,)``, one for each sample. Where t1 is None, the
            end is the last of the times ``at``.
        solver: name of a method, a tableau, or a :class:`LearnedTableau`, whose coefficients get gradients. Those that
            read the structure of the field take a :class:`~solvers.Separable` or a :class:`~solvers.SemiLinear` one and
            fixed steps.
        steps: that many equal steps, without error control and without waiting for the device; a state that becomes
            non-finite on the way is then returned as it is. Under "reversible" it is waited for once.
        tolerance: error control, when ``steps`` is None; :class:`Tolerance` with its defaults if not given.
        controller: the step-size rule of error control; :class:`~solvers.controllers.I` if not given.
        control: one step size for the batch, whose error is taken as a whole, or one for each sample, as if it were
            alone; as many field calls as the sample that needs most.
        keep: only the last state, every state, or every step with its stages, for ``solution(t)``.
        at: times ``(n,)`` between t0 and t1, in the direction of the solve, or with ``control="sample"`` also
            ``(B, n)``, those of each sample; equal neighbors may fill up a shorter row. ``solution.times`` are then
            these times and ``solution.states`` the states there, both tensors, ``(n,)`` and ``(n, B, *S)``, or
            ``(B, n)`` and ``(B, n, *S)``; ``solution.x1`` is the state at t1 as ever. Only ``keep="steps"`` keeps more,
            the steps. They are those taken without ``at``: a state inside a step is that of the method's interpolant
            or, where it has none, of cubic Hermite, at a field evaluation a step. A state is NaN where the solve ended
            before the time, at its event or where it could not go on. Gradients flow to ``at`` with
            ``gradient="direct"``. In a graph of ``torch.compile`` it is a list of floats.
        event: ``(t, x)`` to a tensor or a number: the solve ends where an entry changes sign, or a comparison turns,
            for the first time; where an entry is 0 at t0 it ends there, and no gradient flows through that time; with
            ``control="sample"`` the entries ``(B, ...)`` end their own sample. Changes inside a step are looked for on
            its interpolant, at 3 to 63 points; what comes and goes in less than a 64th of a step may be missed (give
            max_step or more steps). Gradients flow through the time of the event; where the event function has no
            slope, as a comparison has none, a backward pass raises.
        on_limit: raise where the solve cannot go on, or return what was solved, with its status.
        gradient: "direct", through the steps; "checkpoint", the same by recomputing the steps, with the memory of the
            square root of their number and two further evaluations of each (three if adaptive); "backsolve", those of
            the ODE by its adjoint solved backwards, with constant memory and the error of that solve, steps chosen by
            the seminorm; "reversible", or :class:`Reversible` with a coupling of one's own, through the steps of a
            pair of states (two a step) that are undone, in constant memory, up to rounding: where the two states come
            apart, as in contracting fields, and where the way back does not lead to x0 it raises, whatever on_limit;
            steps end at the times ``at``, and there is no event. The last three keep only the last state;
            under "backsolve" the gradient may lose digits where the ODE is unstable backwards.
        parameters: a collection of what gets gradients by "backsolve" or "reversible" beside x0 and the tensors in
            args. If not given, the parameters of the field, which must then be a module, a method of one or a
            ``functools.partial`` of these, and what else it reads; under "reversible" it may be any function.
        args: further arguments for the field.
        graph: whether the loop of error control is one graph of torch: in the caller's ``torch.compile`` with
            ``fullgraph=True`` or ``torch.export``, and otherwise compiled here, which takes some seconds once for each
            kind of field, method and tolerance. It takes the steps that the loop on the host takes, and its gradient is
            that of "direct", to x0, the parameters, args and the times ``at``, computed by the steps backwards in a
            graph of its own: it keeps the states of 100 steps, and takes the others anew; or "backsolve", NaN where the
            backward solve cannot go on. The field is a module or reads nothing that gets a gradient, and computes the
            same at each call; its t is a tensor, which no ``if`` takes. Only the last state is kept, and the states
            ``at``. In a caller's graph nothing raises: ``solution.status`` is a tensor, 0 where the solve is finished,
            and a last state that is not reached is NaN, with on_limit="return" the one where the solve stopped; counts
            and times are tensors. There are no second derivatives. Gradients and ``at`` need torch 2.14;
            where torch or a compiler lacks, the loop is the host's, after a warning. "auto" takes a graph where there
            can be one, what is kept is the last state or the states ``at``, and the state has at most 32,768 numbers:
            above that the field is most of the time.

    Returns:
        A :class:`Solution`; with ``control="sample"`` a :class:`~solvers.SampleSolution`.

    Raises:
        ValueError, TypeError: an argument is out of range, or has another name here; the message names it.
        SolverError: the solve cannot go on; its ``solution`` is the part that stands.
        RuntimeError: ``gradient="reversible"`` in a graph of ``torch.compile``, or where its states come apart.

    >>> import torch
    >>> solution = integrate(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, solver="rk4", steps=10)
    >>> round(solution.x1.item(), 5), solution.stats.evaluations
    (0.36788, 40)
    >>> solution = integrate(lambda t, x: -x, torch.ones(2, 1), 0.0, 1.0, steps=10, at=[0.25, 0.5])
    >>> solution.states.shape, round(solution.states[0, 0, 0].item(), 3)
    (torch.Size([2, 2, 1]), 0.779)
    """
    for name in unknown:
        raise TypeError(
            f"integrate() takes no {name!r}" + (f": that is {_ELSEWHERE[name]}" if name in _ELSEWHERE else "")
        )
    tableau, per_sample = get_tableau(solver), control == "sample"
    coupling, gradient = (
        (gradient.coupling, "reversible") if isinstance(gradient, Reversible) else (_COUPLING, gradient)
    )
    _check_choices(control, keep, on_limit, gradient)
    _check_kinds(field, tolerance, controller, event, args)
    _check_steps(steps, tolerance, controller, tableau)
    if torch.is_grad_enabled():
        check_gradient(tableau, gradient)
    packing = Packing(x0, "x0", batched=not isinstance(x0, Tensor), finite=graph is not True)  # which looks at its end
    if tableau.structure:
        _check_structure(tableau, field, x0, gradient)
    if isinstance(tableau, RosenbrockTableau) and gradient != "direct":
        raise ValueError(
            f"gradient={gradient!r} would differentiate the Jacobian of {tableau.name} again for each step: take "
            "'direct', or solver='kvaerno5'"
        )
    if per_sample:
        _check_per_sample(x0, packing, steps, controller, gradient)
    if gradient == "reversible":
        _check_reversible(tableau, event, at, per_sample)
    in_graph = False
    if graph is not False:
        from solvers.graph.compilation import check_graph  # the compiler takes seconds to load

        in_graph = check_graph(
            graph, x0 if packing.single else packing.pack(x0), steps=steps, event=event, keep=keep, gradient=gradient,
            controller=controller or _CONTROLLER, tableau=tableau, at=at,
        )  # fmt: skip
        packing = packing if in_graph else Packing(x0, "x0", batched=packing.batched)
    x = x0 if packing.single else packing.pack(x0)
    times, t = (), None
    if in_graph and at is None and torch.compiler.is_compiling():  # which has no numbers to look at
        start: Any = t0
        end: Any = t1
    else:
        samples = x.shape[0] if per_sample else None
        start, end = _time("t0", t0, samples), None if t1 is None and at is not None else _time("t1", t1, samples)
        if at is not None:
            times, t = output_times(at, start, end, x, gradient=gradient, per_sample=per_sample)
            end = end if end is not None else times[:, -1].copy() if per_sample else times[-1]
        longest = end - start if not per_sample else 2 * np.abs(end / 2 - start / 2).max().item()
        largest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max
        if not longest < math.inf or (steps is not None and longest / steps > largest):
            raise ValueError(f"t1 - t0 must be finite in the precision of x0, got t0 = {t0} and t1 = {t1}")
    if in_graph:
        from solvers.graph.compilation import solve_in_graph

        try:
            solution = solve_in_graph(
                field, x, start, end, packing=packing, args=args, tableau=tableau, tolerance=tolerance or _TOLERANCE,
                controller=controller or _CONTROLLER, per_sample=per_sample, raises=on_limit == "raise",  # type: ignore[arg-type] - checked
                parameters=parameters, gradient=gradient, at=None if t is None else times, times=t, graph=graph,
            )  # fmt: skip
        except TypeError:
            _check_field(field, args)
            raise
        if solution is not None:
            return solution
    captured = None
    traced = gradient == "checkpoint" and torch.compiler.is_compiling()  # which holds what the field reads
    if gradient != "direct" and torch.is_grad_enabled() and not traced:
        read = field.part if tableau.structure else field  # type: ignore[attr-defined] - checked
        captured = captured_field(read, parameters, args, gradient, steps is None or event is not None)
    v: Field = field if captured is None else captured
    if tableau.structure:
        v = BoundField(tableau.structure, captured or part_of(field), packing, args)
    elif args or not packing.single:
        call = v
        v = lambda t, x: packing.pack(call(t, packing.unpack(x), *args), "field")  # noqa: E731
    entries = None if event is None else lambda t, x: event(t, packing.unpack(x))
    tableau = as_numbers_or_tensors(tableau, x)
    task = Task(
        field=within(v, start, _latest(tableau, start, end), x) if per_sample else v,
        x0=x, t0=start, t1=end, tableau=tableau,
        grid=None if steps is None else even_grid(start, end, steps), tolerance=tolerance or _TOLERANCE,
        controller=controller or _CONTROLLER, keep=keep, event=entries, raises=on_limit == "raise",
        unpack=(lambda x: x) if packing.single else packing.unpack, per_sample=per_sample,
    )  # fmt: skip
    if t is not None and gradient == "reversible":  # steps end there
        grid = None if task.grid is None else Grid(times=_merged(list(task.grid.times), times, end >= start))
        task = replace(task, outputs=True, at=times, t=t, keep="last", stops=times, grid=grid)
    elif t is not None:
        task = _with_outputs(task, times, t)
    try:
        if gradient == "reversible":
            return by_reversing(task, captured, coupling)
        return _solved(task, captured, gradient, single=packing.single)
    except TypeError:
        _check_field(field, args)
        raise


def _latest(tableau: ButcherTableau, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How far the field of each sample is called: stages of implicit methods may lie behind the step."""
    return end if max(tableau.c) <= 1 else np.where(end >= start, np.inf, -np.inf)


def _merged(grid: list[float], times: Sequence[float], forward: bool) -> list[float]:
    """The ends of steps with further ones, but for those that differ by rounding."""
    near = 1e-12 * max(abs(grid[0]), abs(grid[-1]))
    further = [time for time in dict.fromkeys(times) if all(abs(time - end) > near for end in grid)]
    return sorted([*grid, *further], reverse=not forward)


def _check_field(field: Any, args: Any) -> None:
    check_call(field, args, remedy="; args are what it takes besides; wrap a network, as lambda t, x: net(x)")


def _with_outputs(task: Task, times: Any, t: Tensor) -> Task:
    """The task with output times; fixed steps carry their closing stage where the interpolant in them needs it."""
    task = replace(task, outputs=True, at=times, t=t, keep="steps" if task.keep == "steps" else "last")
    if task.grid is None or task.tableau.dense is None:
        return task
    outputs, ends = task.batch_outputs(), pairwise(task.grid.times)
    inside = t.requires_grad or any(outputs.reading(start, end - start).inside for start, end in ends)
    return replace(task, closing=inside)


def _solved(task: Task, captured: Captured | None, gradient: str, *, single: bool) -> Solution:
    if gradient == "direct" or not torch.is_grad_enabled():
        plain = single and not (task.x0.requires_grad or torch.is_grad_enabled() or torch.compiler.is_compiling())
        solution = task.solve()
        for state in (solution.x1, *(() if task.outputs else solution.states)) if plain else ():
            if state.requires_grad:  # the field has said so of its input, to use autograd inside
                state.requires_grad_(False)
        return solution
    if gradient == "checkpoint":
        return by_recomputing(task, captured)
    assert captured is not None
    return by_backsolving(task, captured)


def _check_choices(control: Any, keep: Any, on_limit: Any, gradient: Any) -> None:
    _one_of("control", control, ("batch", "sample"))
    _one_of("keep", keep, ("last", "states", "steps"))
    _one_of("on_limit", on_limit, ("raise", "return"))
    if isinstance(gradient, Real) and not isinstance(gradient, bool):
        raise ValueError(f"gradient must be a name, got {gradient}: a coupling is gradient=Reversible({gradient})")
    _one_of("gradient", gradient, ("direct", "checkpoint", "backsolve", "reversible"))
    if gradient != "direct" and keep == "steps":
        raise ValueError(f"gradient={gradient!r} keeps no steps: leave out keep='steps'")


def _check_steps(steps: Any, tolerance: Any, controller: Any, tableau: ButcherTableau) -> None:
    whole = isinstance(steps, Integral) and not isinstance(steps, bool)
    if steps is not None and not (whole and int(steps) >= 1):
        raise ValueError(f"steps must be a whole number, at least 1, got {steps!r}")
    if steps is not None and (tolerance is not None or controller is not None):
        raise ValueError("steps excludes tolerance and controller: a solve is fixed or adaptive")
    if steps is None and tableau.low is None:
        raise ValueError(
            f"{tableau.name} carries no embedded error, by which steps are chosen: take steps=n, or one of bs23, "
            "dopri5, tsit5, heun, midpoint, or rodas4 and kvaerno5 for stiff problems"
        )


def _check_reversible(tableau: ButcherTableau, event: Any, at: Any, per_sample: bool) -> None:
    other = "take gradient='checkpoint'"
    if not tableau.explicit:
        raise ValueError(f"gradient='reversible' takes explicit methods, got {tableau.name}: {other}")
    if event is not None:
        raise ValueError(f"gradient='reversible' finds no event: {other}, or 'direct'")
    if at is not None and per_sample:
        raise ValueError(f"gradient='reversible' has no output times with control='sample': {other}, or leave out at")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"gradient='reversible' cannot be part of a compiled graph: {other}, or compile the field")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, got {value!r}")


def _check_kinds(field: Any, tolerance: Any, controller: Any, event: Any, args: Any) -> None:
    if not callable(field):
        raise TypeError(f"field must be a function v(t, x), got {type(field).__name__}")
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(f"tolerance must be a Tolerance, as Tolerance(rtol=1e-3), got {type(tolerance).__name__}")
    if controller is not None and (not callable(controller) or isinstance(controller, type)):
        raise TypeError(f"controller must be a step-size rule, as I(), got {controller!r:.80}")
    if event is not None and not callable(event):
        raise TypeError(f"event must be a function (t, x), got {type(event).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of arguments for the field, got {type(args).__name__}")


def _check_structure(tableau: ButcherTableau, field: Any, x0: Any, gradient: str) -> None:
    check_structure(tableau, field)
    if tableau.structure == "separable":
        halves(x0)
    elif not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor (B, D) for a SemiLinear field, got {type(x0).__name__}")
    if gradient == "backsolve":
        raise ValueError(
            f"gradient='backsolve' solves the adjoint by the method of the solve, and {tableau.name} takes none but "
            f"{type(field).__name__} fields: use 'checkpoint', 'direct' or another solver"
        )


def _check_per_sample(x0: Any, packing: Packing, steps: Any, controller: Any, gradient: str) -> None:
    if steps is not None:
        raise ValueError("control='sample' chooses its steps by their error: leave out steps")
    if packing.single and x0.ndim < 2:
        raise ValueError(f"x0 must have shape (B, *S) with control='sample', got {tuple(x0.shape)}")
    if controller is not None and not isinstance(controller, SampleController):
        raise TypeError(f"controller must have a method each() with control='sample', got {type(controller).__name__}")
    if gradient == "backsolve":
        raise ValueError("gradient='backsolve' needs one time for the batch: use 'direct' or 'checkpoint' per sample")


def _time(name: str, t: Any, samples: int | None) -> Any:
    if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, which would be lost: detach it, or call odeint")
    if samples is None:
        if isinstance(t, Tensor) and t.ndim:
            raise ValueError(f"{name} must be a number, got shape {tuple(t.shape)}; control='sample' takes (B,)")
        if not isinstance(t, (Tensor, Real, np.ndarray)):
            raise TypeError(f"{name} must be a number, got {type(t).__name__}")
        t = float(t)
        if not math.isfinite(t):
            raise ValueError(f"{name} must be finite, got {t}")
        return t
    t = np.array(t.tolist() if isinstance(t, Tensor) else t, dtype=np.float64)
    if t.shape not in ((), (samples,)):
        raise ValueError(f"{name} must be a number or have shape ({samples},), got {tuple(t.shape)}")
    if not np.isfinite(t).all():
        raise ValueError(f"{name} must be finite, got {t.tolist()}")
    return np.broadcast_to(t, samples).copy()
