"""``integrate``: one call for every way to solve, control the error and let gradients flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solvers.controllers import Controller, I, SampleController
from solvers.gradients.backsolve import backsolved, seminorm
from solvers.gradients.captured import Captured, owner_of
from solvers.gradients.checkpoint import recomputed
from solvers.methods import get_tableau
from solvers.packing import Packing
from solvers.sample_loop import align, within
from solvers.solution import SampleSolution, Solution, Statistics
from solvers.solve import Task, even_grid, with_gradient
from solvers.step import Field
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype, to_state_shape

__all__ = ["integrate"]

_TOLERANCE, _CONTROLLER = Tolerance(), I()


def integrate(
    field: Callable[..., Any],
    x0: Any,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    solver: str | ButcherTableau = "bs23",
    steps: int | None = None,
    tolerance: Tolerance | None = None,
    controller: Controller | None = None,
    control: Literal["batch", "sample"] = "batch",
    keep: Literal["last", "states", "steps"] = "states",
    event: Callable[..., Tensor] | None = None,
    on_limit: Literal["raise", "return"] = "raise",
    gradient: Literal["direct", "checkpoint", "backsolve"] = "direct",
    parameters: Iterable[Tensor] | None = None,
    args: Sequence[Any] = (),
) -> Solution:
    """Integrate ``dx/dt = v(t, x)`` from t0 to t1, which may lie before t0.

    Args:
        field: velocity ``v(t, x, *args)``, returning the shape, dtype and device of ``x``. Its ``t`` is a number, or
            with ``control="sample"`` a tensor ``(B, 1, ..., 1)`` of the state's precision that broadcasts against the
            state; it lies between t0 and t1. The field must not write into x, nor into what it has returned
            (:func:`~solvers.rk_step`). It may use autograd inside.
        x0: state at t0: a tensor, floating or complex, or a tuple or dictionary of tensors ``(B, ...)``.
        t0, t1: start and end time; with ``control="sample"`` also ``(B,)``, one for each sample.
        solver: name of a method or a tableau.
        steps: that many equal steps, without error control and without waiting for the device; a state that becomes
            non-finite on the way is then returned as it is.
        tolerance: error control, when ``steps`` is None; :class:`Tolerance` with its defaults if not given.
        controller: the step-size rule of error control; :class:`~solvers.controllers.I` if not given.
        control: one step size for the batch, whose error is taken as a whole, or one for each sample, as if it were
            alone; as many field calls as the sample that needs most.
        keep: only the last state, every state, or every step with its stages, for ``solution(t)``.
        event: ``(t, x)`` to a tensor or a number: the solve ends where an entry changes sign, or a comparison turns,
            for the first time; with ``control="sample"`` the entries ``(B, ...)`` end their own sample. Changes inside
            a step are looked for on its interpolant, at 3 to 63 points; what comes and goes in less than a 64th of a
            step may be missed (give max_step or more steps). Gradients flow through the time of the event; where the
            event function has no slope, as a comparison has none, a backward pass raises.
        on_limit: raise where the solve cannot go on, or return what was solved, with its status.
        gradient: "direct", through the steps; "checkpoint", the same by recomputing the steps, with the memory of the
            square root of their number and two further evaluations of each (three if adaptive); "backsolve", those of
            the ODE by its adjoint solved backwards, with constant memory and the error of that solve, steps chosen by
            the seminorm. The last two keep only the last state; under "backsolve" the gradient may lose digits where
            the ODE is unstable backwards.
        parameters: a collection of what gets gradients by "backsolve" beside x0 and the tensors in args. If not given,
            the parameters of the field, which must then be a module, a method of one or a ``functools.partial`` of
            these, and what else it reads.
        args: further arguments for the field.

    Returns:
        A :class:`Solution`; with ``control="sample"`` a :class:`SampleSolution`.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
        SolverError: the solve cannot go on; its ``solution`` is the part that stands.

    >>> import torch
    >>> solution = integrate(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, solver="rk4", steps=10)
    >>> round(solution.x1.item(), 5), solution.stats.evaluations
    (0.36788, 40)
    """
    tableau = get_tableau(solver)
    _one_of("control", control, ("batch", "sample"))
    _one_of("keep", keep, ("last", "states", "steps"))
    _one_of("on_limit", on_limit, ("raise", "return"))
    _one_of("gradient", gradient, ("direct", "checkpoint", "backsolve"))
    packing = Packing(x0, "x0", batched=not isinstance(x0, Tensor))
    if steps is not None and not (isinstance(steps, Integral) and not isinstance(steps, bool) and steps >= 1):
        raise ValueError(f"steps must be a whole number, at least 1, got {steps!r}")
    _check_kinds(tolerance, controller, event, args)
    if steps is not None and (tolerance is not None or controller is not None):
        raise ValueError("steps excludes tolerance and controller: a solve is fixed or adaptive")
    if gradient != "direct" and keep == "steps":
        raise ValueError(f"gradient={gradient!r} keeps no steps: leave out keep='steps'")
    per_sample = control == "sample"
    if per_sample:
        _check_per_sample(x0, packing, steps, controller, gradient)
    captured = None
    graph = gradient == "checkpoint" and torch.compiler.is_compiling()  # which holds what the field reads
    if gradient != "direct" and torch.is_grad_enabled() and not graph:
        captured = _captured(field, parameters, args, gradient, steps is None or event is not None)
    v: Field = field if captured is None else captured
    if args or not packing.single:
        call = v
        v = lambda t, x: packing.pack(call(t, packing.unpack(x), *args), "field")  # noqa: E731
    entries = None if event is None else lambda t, x: event(t, packing.unpack(x))
    x = x0 if packing.single else packing.pack(x0)
    start, end = _time("t0", t0, len(x) if per_sample else None), _time("t1", t1, len(x) if per_sample else None)
    longest = end - start if not per_sample else 2 * np.abs(end / 2 - start / 2).max().item()
    largest = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max
    if not longest < math.inf or (steps is not None and longest / steps > largest):
        raise ValueError(f"t1 - t0 must be finite in the precision of x0, got t0 = {t0} and t1 = {t1}")
    task = Task(
        field=within(v, start, end, x) if per_sample else v, x0=x, t0=start, t1=end, tableau=tableau,
        grid=None if steps is None else even_grid(start, end, steps), tolerance=tolerance or _TOLERANCE,
        controller=controller or _CONTROLLER, keep=keep, event=entries, raises=on_limit == "raise",
        unpack=(lambda x: x) if packing.single else packing.unpack, per_sample=per_sample,
    )  # fmt: skip
    if gradient == "direct" or not torch.is_grad_enabled():
        plain = packing.single and not (x.requires_grad or torch.is_grad_enabled() or torch.compiler.is_compiling())
        solution = task.solve()
        for state in solution.states if plain else ():
            if state.requires_grad:  # the field has said so of its input, to use autograd inside
                state.requires_grad_(False)
        return solution
    if gradient == "checkpoint":
        return _by_recomputing(task, captured)
    assert captured is not None
    return _by_backsolving(task, captured)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, got {value!r}")


def _check_kinds(tolerance: Any, controller: Any, event: Any, args: Any) -> None:
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(f"tolerance must be a Tolerance, as Tolerance(rtol=1e-3), got {type(tolerance).__name__}")
    if controller is not None and (not callable(controller) or isinstance(controller, type)):
        raise TypeError(f"controller must be a step-size rule, as I(), got {controller!r:.80}")
    if event is not None and not callable(event):
        raise TypeError(f"event must be a function (t, x), got {type(event).__name__}")
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple of arguments for the field, got {type(args).__name__}")


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
        if not isinstance(t, Tensor | Real | np.ndarray):
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


def _captured(field: Any, parameters: Any, args: Sequence[Any], gradient: str, searching: bool) -> Captured:
    """The field with what gets gradients; ``searching``: its steps are found before they are taken."""
    if gradient == "backsolve" and parameters is None and owner_of(field) is None:
        raise ValueError("gradient='backsolve' needs a torch module as field, or parameters to say what gets gradients")
    recompute = gradient == "checkpoint"
    instead = "gradient='direct'" if searching or recompute else "gradient='direct' or 'checkpoint'"
    names = ("field", "parameters", instead)
    return Captured(field, parameters, args, names=names, recompute=recompute, random=recompute and not searching)


def _by_recomputing(task: Task, captured: Captured | None) -> Solution:
    """Choose the steps without a graph where they are not given, then take them with one that keeps little."""
    forward = nullcontext() if captured is None else captured.forward(task.x0.device)
    if task.grid is not None and task.event is None:
        times = tuple(task.grid.times)
        stats = Statistics((len(times) - 1) * task.tableau.interior, len(times) - 1)
        solution = Solution(times=times, states=(task.x0,), stats=stats)
        with forward:
            return with_gradient(task, solution, _recomputed(task, captured, solution))
    with forward, torch.no_grad():
        solution = replace(task, keep="states").solve()
    with nullcontext() if captured is None else captured.again(look=False):
        x = _recomputed(task, captured, solution)
        if isinstance(solution, SampleSolution) and task.event is None:
            _check_apart(task, solution, x.detach())
        return with_gradient(task, solution, x)


def _check_apart(task: Task, solution: SampleSolution, x: Tensor) -> None:
    """That samples are solved as if each were alone: taken again, the k-th steps of all of them stand side by side.

    Raises:
        ValueError: another state than before, beyond ten times the tolerance.
    """
    before, after = solution.x1, task.unpack(x)
    if not isinstance(before, Tensor):
        before, after = (
            torch.cat([part.reshape(len(part), -1) for part in tree_leaves(states)], 1) for states in (before, after)
        )
    size = torch.maximum(before.abs(), after.abs()).to(torch.promote_types(real_dtype(x), torch.float32))
    rounding = 1000 * torch.finfo(real_dtype(x)).eps
    if bool(((after - before).abs() > 10 * (task.tolerance.atol + task.tolerance.rtol * size) + rounding * size).any()):
        raise ValueError(
            "field must treat each sample as if it were alone with control='sample' and gradient='checkpoint', which "
            "takes their steps again in another order, but reads the others of the batch (batch norm in training "
            "mode?): use gradient='direct', or control='batch'"
        )


def _recomputed(task: Task, captured: Captured | None, solution: Solution) -> Tensor:
    """The last state, by the steps of a solution."""
    steps: list[Any]
    if isinstance(solution, SampleSolution):
        times = torch.stack(solution.times).numpy()
        starts, sizes = align(times[1:] != times[:-1], times[:-1], times[1:])
        steps = [(to_state_shape(t, task.x0), to_state_shape(h, task.x0)) for t, h in zip(starts, sizes, strict=True)]
        real = real_dtype(task.x0)
        field: Field = lambda t, x: task.field(t.to(real), x)  # type: ignore[union-attr]  # noqa: E731
    else:
        steps = [(a, b - a) for a, b in pairwise(solution.times)]
        field = task.field
    take = recomputed if captured is None else _eagerly()
    return take(captured, field, task.x0, steps, task.tableau)


@cache
def _eagerly() -> Callable[..., Tensor]:
    """:func:`recomputed` outside graphs, for it remembers what the field reads."""
    return torch.compiler.disable(recomputed)  # type: ignore[return-value] - the same function


def _by_backsolving(task: Task, captured: Captured) -> Solution:
    """Solve without a graph, and the adjoint backwards when its gradient is asked for."""
    plain = replace(task, keep="last", unpack=lambda x: x)
    with captured.forward(task.x0.device), torch.no_grad():
        solution = plain.solve()
    t0, t1, x1 = task.t0, solution.t1, solution.x1
    if task.grid is None:
        plain = replace(plain, tolerance=seminorm(task.tolerance, task.x0, captured.tensors))
    elif t0 != t1:
        plain = replace(plain, grid=even_grid(t1, t0, len(tuple(task.grid.times)) - 1))

    def backward(system: Field, z: Tensor) -> Tensor:
        return replace(plain, field=system, x0=z, t0=t1, t1=t0, event=None, raises=True).solve().x1

    x = x1 if t0 == t1 else backsolved(captured, task.field, task.x0, x1, backward)
    with nullcontext() if solution.event_time is None else captured.again():
        return with_gradient(task, solution, x)
