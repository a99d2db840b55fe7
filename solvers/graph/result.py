"""What a solve in a graph returns: a solution as the loops on the host return it, or their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers.errors import NonFiniteError, SolverError, Status, failure
from solvers.graph.clock import FAILED_FIRST, GOING, MAX_STEPS, NOT_FINITE, TOO_LONG, UNDERFLOW
from solvers.graph.solve import Ending
from solvers.solution import SampleSolution, SampleStatistics, Solution, Statistics
from solvers.step import Field, rk_step
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance, too_small
from solvers.validation import in_state_shape

__all__ = ["checked", "solution_of"]

NAMES: dict[int, Status] = {
    GOING: "finished", MAX_STEPS: "max_steps", UNDERFLOW: "underflow", NOT_FINITE: "not_finite",
    FAILED_FIRST: "not_finite", TOO_LONG: "not_finite",
}  # fmt: skip


def solution_of(end: Ending, times: Tensor | None, unpack: Callable[[Tensor], Any]) -> Solution:
    """The solution that ends so.

    In a caller's graph its counts are tensors, its status is 0 where it is finished, and its times are tensors.

    Args:
        end: of the solve.
        times: the output times as the solution shows them, or None.
        unpack: a state as the caller gave it.
    """
    each, graph = end.t.ndim > 0, torch.compiler.is_compiling()
    counts: Any = (end.all_calls, end.taken.sum(), end.rejected.sum())
    status: Any = end.status
    t1: Any = end.t
    if not graph:
        counts = tuple(int(count) for count in counts)
        names = [NAMES[code] for code in end.status.reshape(-1).tolist()]
        status = tuple(names) if each else names[0]
        t1 = end.t.cpu() if each else end.t.item()
    common: dict[str, Any] = {
        "times": (t1,),
        "states": (unpack(end.x),),
        "stats": Statistics(*counts),
        "status": status,
    }
    if times is not None:
        outputs = end.outputs
        common |= {"times": times, "states": unpack(outputs), "end": (t1, common["states"][0])}
    if not each:
        return Solution(**common)
    one_each = (end.calls, end.taken, end.rejected)
    return SampleSolution(
        **common, sample_stats=SampleStatistics(*(one_each if graph else (count.cpu() for count in one_each)))
    )


def checked(
    solution: Solution, end: Ending, field: Field, t0: Any, t1: Any, tableau: ButcherTableau, tolerance: Tolerance
) -> Solution:
    """The solution, if the solve reached its end.

    Raises:
        StepUnderflowError, MaxStepsError, NonFiniteError: a sample cannot go on.
    """
    codes = end.status.reshape(-1).tolist()
    sample = next((i for i, code in enumerate(codes) if code != GOING), None)
    if sample is None:
        return solution
    error = _error(codes[sample], end, sample if end.t.ndim else None, field, t1, tableau, tolerance)
    error.solution = solution
    raise error


def _error(
    code: int, end: Ending, sample: int | None, field: Field, t1: Any, tableau: ButcherTableau, tolerance: Tolerance
) -> SolverError:
    """The error of the loops on the host."""

    def number(values: Tensor) -> float:
        return float(values if sample is None else values[sample])

    t, last = number(end.t), t1 if sample is None else t1[sample]
    h = (1 if last >= t else -1) * number(end.size)
    if code in (MAX_STEPS, UNDERFLOW):
        return failure(
            NAMES[code], t=t, h=h, sample=sample, ratio=number(end.ratio), attempts=int(end.attempts), t1=last,
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
        size = in_state_shape(torch.where(end.size.isfinite(), end.size, 0.0), end.x).to(end.x.real.dtype)
        size = size * (1 if last >= t else -1)
        stages = rk_step(field, in_state_shape(end.t, end.x), end.x, size, tableau).not_finite()
    if code == FAILED_FIRST:
        bad = (stages == 0).nonzero()[0].tolist()
        here = sample if sample is not None else bad[0] if bad and end.x.ndim > 1 else None
        if not bad:
            return NonFiniteError(too_small(tolerance, end.x), t=t, h=h, stage=None)
        where = "the first state" if int(end.attempts) == 0 else "an accepted state"
        return NonFiniteError(f"the field is not finite at {where}", t=t, h=h, stage=0, sample=here)
    stage = int(stages[sample]) if sample is not None else min((int(i) for i in stages if i >= 0), default=-1)
    here = sample
    if sample is None and stage >= 0 and end.x.ndim > 1:
        here = int((stages == stage).argmax())
    return failure("not_finite", t=t, h=h, stage=stage if stage >= 0 else None, sample=here)
