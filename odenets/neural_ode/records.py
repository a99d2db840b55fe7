"""Measures of an ODE whose steps are not kept, or are each sample's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odenets.measures import StepFunction, integrand_of
from odenets.neural_ode.inputs import owner_of
from odenets.recording import Records, check_values, measure_steps
from solvers import SampleSolution, Solution, Statistics, Tolerance, integrate

__all__ = ["measure_beside", "records_of"]


class Beside(nn.Module):
    """The velocity of ``(x, q_1, ...)``, where ``dq_i/dt`` is an integrand of that of x."""

    def __init__(self, field: Any, integrands: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.field, self.integrands, self.owner = field, integrands, owner_of(field)

    def forward(self, t: Any, state: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
        """The velocity at the first part of the state, and its integrands."""
        v = self.field(t, state[0], *args)
        return (v, *(integrand(v).to(v.dtype) for integrand in self.integrands))


def of_the_state(tolerance: Tolerance, x: Tensor, further: int) -> Tolerance:
    """A tolerance of ``(x, q_1, ...)`` packed into ``(B, N)`` that looks at the error of x alone."""

    def norm(scaled: Tensor) -> Tensor:
        return tolerance.size(scaled[..., :-further].reshape(*scaled.shape[:-1], *x.shape[1:]))

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wide = value.expand(x.shape if value.ndim == x.ndim else (1, *x.shape[1:])).flatten(1)
        return torch.cat([wide, wide.new_ones(len(wide), further)], 1)

    return replace(tolerance, rtol=widened(tolerance.rtol), atol=widened(tolerance.atol), norm=norm)


def measure_beside(
    field: Any, x: Tensor, t0: Any, t1: Any, measures: dict[str, StepFunction], options: dict[str, Any]
) -> tuple[Any, Records, Statistics]:
    """Measures as further parts of the state, whose error no step is chosen by.

    Args:
        field: the velocity.
        x, t0, t1: state and time at the start, time at the end.
        measures: integrals over time, by name.
        options: the others of :func:`solvers.integrate`; with ``at`` the output is the states at these times.

    Returns:
        The output, the records, ``(1, B)`` by name, and the counts of the solve.

    Raises:
        ValueError: x of 16 bits, a measure that is no integral, or a method that reads the structure of its field.
    """
    if torch.finfo(x.dtype).bits < 32:
        raise ValueError(
            f"x must be float32 or wider where measures are integrated beside it, got {x.dtype}: "
            "take x.float() under torch.autocast, or gradient='direct' without an event"
        )
    if options["solver"].structure:
        raise ValueError(
            f"{options['solver'].name} takes no measures beside the state of its field: measure with gradient='direct' "
            "and no event, or take another solver"
        )
    integrands = [integrand_of(name, measure) for name, measure in measures.items()]
    options = options | {"parameters": None}
    if options["steps"] is None:
        options["tolerance"] = of_the_state(options["tolerance"] or Tolerance(), x, len(measures))
    if (event := options["event"]) is not None:
        options["event"] = lambda t, state: event(t, state[0])
    start = (x, *(x.new_zeros(len(x)) for _ in measures))
    solution = integrate(Beside(field, integrands), start, t0, t1, **options)
    end, *values = solution.x1
    parts = {name: q.real if q.is_complex() else q for name, q in zip(measures, values, strict=True)}
    rows = {name: check_values(name, q, x)[None] for name, q in parts.items()}
    output = end if options["at"] is None else solution.states[0]
    return output, Records(rows, blocks=["all steps"]), solution.stats


def records_of(solution: Solution, x: Tensor, measures: dict[str, StepFunction]) -> Records:
    """Records of the steps that a solution from ``x`` has kept; of a sample's own, 0 where it takes none."""
    none = x.real.new_zeros(0, len(x))
    if not solution.steps:
        return Records(dict.fromkeys(measures, none))
    if not isinstance(solution, SampleSolution):
        return measure_steps(solution.steps, x, measures)[1]
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step, samples in zip(solution.steps, solution.samples, strict=True):
        samples = samples.to(x.device)
        for name, measure in measures.items():
            values = check_values(name, measure(step), step.x0)
            rows[name].append(values.new_zeros(len(x)).index_copy(0, samples, values))
    return Records({name: torch.stack(values) for name, values in rows.items()})
