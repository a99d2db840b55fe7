"""A task solved with gradients by recomputing its steps, or by its adjoint solved backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solvers.errors import SolverError
from solvers.field_calls import Field
from solvers.gradients.backsolve import backsolved, seminorm
from solvers.gradients.captured import Captured, owner_of
from solvers.gradients.checkpoint import Read, recomputed
from solvers.gradients.pair import ReversibleSteps
from solvers.gradients.reversible import Taken, check_precision, increment_of, reversed_states
from solvers.implicit import check_found
from solvers.implicit.root import CALLED_AGAIN
from solvers.outputs import BatchOutputs, SampleOutputs, stacked
from solvers.runge_kutta import rk_step
from solvers.sample_loop import align
from solvers.solution import SampleSolution, Solution, Statistics
from solvers.solve import Task, even_grid, with_gradient
from solvers.step import Step
from solvers.steppers import stepper
from solvers.tableaus import ButcherTableau
from solvers.validation import is_mapped, real_dtype, to_state_shape

__all__ = ["by_backsolving", "by_recomputing", "by_reversing", "captured_field"]


def captured_field(field: Any, parameters: Any, args: Sequence[Any], gradient: str, searching: bool) -> Captured:
    """The field with what gets gradients; ``searching``: its steps are found before they are taken.

    Raises:
        ValueError: nothing says what gets gradients.
    """
    if gradient == "backsolve" and parameters is None and owner_of(field) is None:
        raise ValueError("gradient='backsolve' needs a torch module as field, or parameters to say what gets gradients")
    recompute = gradient == "checkpoint"
    instead = "gradient='direct'" if searching or recompute else "gradient='direct' or 'checkpoint'"
    names = ("field", "parameters", instead)
    return Captured(field, parameters, args, names=names, recompute=recompute, random=recompute and not searching)


def by_recomputing(task: Task, captured: Captured | None) -> Solution:
    """Choose the steps without a graph where they are not given, then take them with one that keeps little."""
    forward = nullcontext() if captured is None else captured.forward(task.x0.device)
    if task.grid is not None and task.event is None:
        times = tuple(task.grid.times)
        calls = 0 if task.tableau.implicit else (len(times) - 1) * task.tableau.calls
        stats = Statistics(calls, len(times) - 1)
        end = (times[-1], task.x0) if task.outputs else None
        solution = Solution(
            times=task.t if task.outputs else times, states=(task.x0,), end=end, step_times=times, stats=stats
        )
        with forward:
            return with_gradient(task, solution, *_recomputed(task, captured, solution, stats))
    with forward, torch.no_grad():
        try:
            solution = replace(task, keep="times").solve()
        except SolverError as error:
            if error.solution is not None and not task.outputs:
                error.solution = replace(error.solution, times=error.solution.times[-1:])
            raise
    with nullcontext() if captured is None else captured.again(look=False):
        x, outputs = _recomputed(task, captured, replace(solution, states=()) if task.outputs else solution)
        if isinstance(solution, SampleSolution) and task.event is None:
            _check_apart(task, solution, x.detach())
        return with_gradient(task, solution, x, outputs)


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


def _recomputed(
    task: Task, captured: Captured | None, solution: Solution, stats: Statistics | None = None
) -> tuple[Tensor, Tensor | None]:
    """The last state and those at the output times, by the steps of a solution; ``stats``: what is to count them.

    Where every sample has its own steps, the k-th of all of them are taken side by side.
    """
    outputs: BatchOutputs | SampleOutputs | None = None
    if isinstance(solution, SampleSolution):
        times = torch.stack(solution.step_times).numpy()
        starts, sizes = align(times[1:] != times[:-1], times[:-1], times[1:])
        steps = [(to_state_shape(t, task.x0), to_state_shape(h, task.x0)) for t, h in zip(starts, sizes, strict=True)]
        real = real_dtype(task.x0)
        field: Field = lambda t, x: task.field(t.to(real), x)  # type: ignore[union-attr]  # noqa: E731
        how: Any = field
        readings: list[Any] = []
        if task.outputs:
            over = np.array([s == "finished" for s in solution.status]) & (times[-1] == task.t0)
            outputs = SampleOutputs(task.at, task.t, task.x0, task.t0, over)
            readings = [outputs.reading(t, h, h != 0) for t, h in zip(starts, sizes, strict=True)]
    else:
        steps, field, how = [(a, b - a) for a, b in pairwise(solution.step_times)], task.field, task.state_in
        outputs = task.batch_outputs() if task.outputs else None
        readings = [outputs.reading(t, h) for t, h in steps] if outputs is not None else []
        if stats is not None:
            closing = 0 if task.tableau.implicit else task.tableau.stages - task.tableau.interior
            each = closing if task.tableau.dense else task.tableau.inside_calls
            stats.evaluations += each * sum(reading.inside for reading in readings)
    reads = [None if r is None else Read(lambda step, r=r: r(step, how), r.inside) for r in readings]
    calls: list[int] = []
    take: Any = partial(_implicit_step, task, captured, calls) if task.tableau.implicit else rk_step
    solve = recomputed if captured is None else _eagerly()
    x, states = solve(captured, field, task.x0, steps, task.tableau, reads, take)
    if stats is not None:
        stats.evaluations += sum(calls)
    if outputs is None:
        return x, None
    outputs.states += states
    return x, outputs.stacked()


def _implicit_step(
    task: Task, captured: Captured | None, calls: list[int], field: Field, t: Any, x: Tensor, h: Any,
    tableau: ButcherTableau, *, closing: bool
) -> Step:  # fmt: skip
    """A step whose stages are found as closely as those of the solve; ``calls`` counts what it takes."""
    take = stepper(tableau, task.tolerance if task.grid is None else None, each=task.per_sample)
    token = None if captured is None else CALLED_AGAIN.set(partial(captured.again, look=False))
    try:
        step = take(field, t, x, h, closing=closing)
    finally:
        if token is not None:
            CALLED_AGAIN.reset(token)
    check_found(step)
    calls.append(take.calls)
    return step


@cache
def _eagerly() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """:func:`recomputed` outside graphs, for it remembers what the field reads."""
    return torch.compiler.disable(recomputed)  # type: ignore[return-value] - the same function


def by_reversing(task: Task, captured: Captured | None, coupling: float) -> Solution:
    """Take the steps of a reversible pair without a graph, and undo them when the gradient is asked for.

    Raises:
        TypeError: a state in half precision.
        RuntimeError: the two states have come apart; a transform of torch.vmap, in which none is seen.
    """
    check_precision(task.x0, "gradient='reversible'")
    if is_mapped(task.x0):
        raise RuntimeError("gradient='reversible' looks at its states, which torch.vmap hides: take gradient='direct'")
    tolerance = task.tolerance if task.grid is None else None
    steps = ReversibleSteps(task.tableau, task.x0, coupling, tolerance, each=task.per_sample)
    plain = replace(task, keep="last", unpack=lambda x: x, take=steps)
    with nullcontext() if captured is None else captured.forward(task.x0.device), torch.no_grad():
        try:
            solution = plain.solve()
        except SolverError as error:
            steps.check()
            raise _unpacked(error, task) from None
        steps.check()
    x, outputs = solution.x1, None
    if captured is not None:
        states, ends = x.unsqueeze(0), [len(steps.moves)]
        if task.outputs:
            reached = [time for time in task.at if (time - solution.t1) * (task.t1 - task.t0) <= 0]
            times = [task.t0, *(move.t + move.h for move in steps.moves)]
            ends = [*(min(range(len(times)), key=lambda k: abs(times[k] - time)) for time in reached), *ends]
            states = torch.cat([solution.states[: len(reached)], states])
        increment = increment_of(task.field, task.tableau)
        taken = Taken(captured, lambda _: increment, steps.moves, coupling, steps.size)
        states = reversed_states(taken, task.x0, states, steps.z, ends)
        x = states[-1].clone()
        outputs = stacked(list(states[:-1].unbind()), len(task.at), x) if task.outputs else None
    elif task.outputs:
        outputs = solution.states
    return with_gradient(task, solution, x, outputs)


def _unpacked(error: SolverError, task: Task) -> SolverError:
    """The error of a solve of packed states, with its solution as the caller gave it."""
    if (solution := error.solution) is not None:
        states = task.unpack(solution.states) if task.outputs else tuple(map(task.unpack, solution.states))
        end = None if solution.end is None else (solution.end[0], task.unpack(solution.end[1]))
        error.solution = replace(solution, states=states, end=end)
    return error


def by_backsolving(task: Task, captured: Captured) -> Solution:
    """Solve without a graph, and the adjoint backwards when its gradient is asked for."""
    plain = replace(task, keep="last", unpack=lambda x: x)
    with captured.forward(task.x0.device), torch.no_grad():
        try:
            solution = plain.solve()
        except SolverError as error:
            raise _unpacked(error, task) from None
    t0, t1, x1 = task.t0, solution.t1, solution.x1
    plain = replace(plain, outputs=False)
    if task.grid is None:
        plain = replace(plain, tolerance=seminorm(task.tolerance, task.x0, captured.tensors))
    steps = 0 if task.grid is None else len(tuple(task.grid.times)) - 1

    def backward(system: Field, z: Tensor, start: float, end: float) -> Tensor:
        grid = None
        if steps:  # no longer ones than those forward
            grid = even_grid(start, end, max(1, math.ceil(abs((start - end) / (t1 - t0)) * steps - 1e-9)))
        return replace(plain, field=system, x0=z, t0=start, t1=end, grid=grid, event=None, raises=True).solve().x1

    states, reached = x1.unsqueeze(0), 0
    if task.outputs:
        reached = sum((time - t1) * (t1 - t0) <= 0 for time in task.at) if t0 != t1 else task.at.count(t0)
        states = torch.cat([solution.states[:reached], states])
    if t0 == t1:
        states = torch.stack([task.x0] * len(states))
    else:
        states = backsolved(captured, task.field, task.x0, states, [t0, *task.at[:reached], t1], backward)
    x, outputs = states[-1].clone(), None  # what is saved stays as it is, whatever is done to x
    if task.outputs:
        outputs = stacked(list(states[:-1].unbind()), len(task.at), x1)
    with nullcontext() if solution.event_time is None else captured.again():
        return with_gradient(task, solution, x, outputs)
