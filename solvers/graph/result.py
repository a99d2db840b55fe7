"""What a solve in a graph returns: a solution as the loops on the host return it, or their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers.errors import NonFiniteError, SolverError, Status, failure
from solvers.field_calls import Field
from solvers.graph.clock import FAILED_FIRST, GOING, MAX_STEPS, NOT_FINITE, TOO_LONG, UNDERFLOW
from solvers.graph.solve import Ending, Numbers
from solvers.runge_kutta import rk_step
from solvers.solution import SampleSolution, SampleStatistics, Solution, Statistics
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance, too_small
from solvers.validation import in_state_shape

__all__ = ["checked", "solution_of"]

NAMES: dict[int, Status] = {
    GOING: "finished", MAX_STEPS: "max_steps", UNDERFLOW: "underflow", NOT_FINITE: "not_finite",
    FAILED_FIRST: "not_finite", TOO_LONG: "not_finite",
}  # fmt: skip


def solution_of(end: Ending, numbers: Numbers, times: Tensor | None, unpack: Callable[[Tensor], Any]) -> Solution:
    """The solution that ends so.

    In a caller's graph its counts are tensors, its status is 0 where it is finished, and its times are tensors.

    Args:
        end: of the solve.
        numbers: those of it, numbers or lists of them; tensors in a caller's graph.
        times: the output times as the solution shows them, or None.
        unpack: a state as the caller gave it.
    """
    each, graph = end.numbers.ndim > 1, torch.compiler.is_compiling()
    total: Any = sum if not graph else torch.sum
    counts: Any = [numbers.all_calls, numbers.taken, numbers.rejected]
    t1, status = numbers.t, numbers.status
    if graph:
        counts, status = [count.to(torch.int64) for count in counts], status.to(torch.int64)
    elif each:
        counts, status = [[int(c) for c in count] for count in counts], tuple(NAMES[int(code)] for code in status)
        t1 = torch.tensor(t1, dtype=torch.float64, device="cpu")
    else:
        counts, status = [int(count) for count in counts], NAMES[int(status)]
    wholes = [counts[0][0], total(counts[1]), total(counts[2])] if each else counts
    last = unpack(end.x)
    common: dict[str, Any] = {
        "times": (t1,), "states": (last,), "stats": Statistics(*wholes), "status": status,
    }  # fmt: skip
    if times is not None:
        outputs = end.outputs.movedim(0, 1) if times.ndim > 1 else end.outputs
        common |= {"times": times, "states": unpack(outputs), "end": (t1, last)}
    if not each:
        return Solution(**common)
    of_each: Any = [end.numbers[i].to(torch.int64) for i in map(Numbers._fields.index, ("calls", "taken", "rejected"))]
    return SampleSolution(**common, sample_stats=SampleStatistics(*(of_each if graph else (n.cpu() for n in of_each))))


def checked(
    solution: Solution, end: Ending, numbers: Numbers, field: Field, t0: Any, t1: Any, tableau: ButcherTableau,
    tolerance: Tolerance,
) -> Solution:  # fmt: skip
    """The solution, if the solve reached its end.

    Raises:
        StepUnderflowError, MaxStepsError, NonFiniteError: a sample cannot go on.
    """
    each = end.numbers.ndim > 1
    codes = numbers.status if each else [numbers.status]
    sample = next((i for i, code in enumerate(codes) if code != GOING), None)
    if sample is None:
        return solution
    here = Numbers(*(row[sample] for row in numbers)) if each else numbers
    error = _error(end, here, sample if each else None, field, t1, tableau, tolerance)
    error.solution = solution
    raise error


def _error(
    end: Ending, here: Numbers, sample: int | None, field: Field, t1: Any, tableau: ButcherTableau, tolerance: Tolerance
) -> SolverError:
    """The error of the loops on the host."""
    code, t, last = int(here.status), here.t, t1 if sample is None else t1[sample]
    h = (1 if last >= t else -1) * here.size
    if code in (MAX_STEPS, UNDERFLOW):
        return failure(
            NAMES[code], t=t, h=h, sample=sample, ratio=here.ratio, attempts=int(here.attempts), t1=last,
            smallest=10 * math.ulp(t),
        )  # fmt: skip
    if code == TOO_LONG:
        largest = torch.finfo(torch.promote_types(end.x.real.dtype, torch.float32)).max
        return NonFiniteError(
            f"steps grow beyond {largest:.3g}: the velocity vanishes and nothing ends the solve before "
            f"t1 = {last:g}; give max_step or another t1",
            t=t, h=h, stage=None,
        )  # fmt: skip
    with torch.no_grad():
        times, tried = end.numbers[0], end.numbers[Numbers._fields.index("tried")]
        size = in_state_shape(torch.where(tried.isfinite(), tried, 0.0), end.x).to(end.x.real.dtype)
        stages = rk_step(field, in_state_shape(times, end.x), end.x, size, tableau).not_finite()
    if code == FAILED_FIRST:
        bad = (stages == 0).nonzero()[0].tolist()
        first = sample if sample is not None else bad[0] if bad and end.x.ndim > 1 else None
        if not bad:
            return NonFiniteError(too_small(tolerance, end.x), t=t, h=h, stage=None)
        where = "the first state" if here.attempts == 0 else "an accepted state"
        return NonFiniteError(f"the field is not finite at {where}", t=t, h=h, stage=0, sample=first)
    stage = int(stages[sample]) if sample is not None else min((int(i) for i in stages if i >= 0), default=-1)
    if sample is None and stage >= 0 and end.x.ndim > 1:
        sample = int((stages == stage).argmax())
    return failure("not_finite", t=t, h=h, stage=stage if stage >= 0 else None, sample=sample)
