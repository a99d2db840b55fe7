"""Measures of an ODE whose steps are not kept, or are each sample's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odenets.measures import StepFunction
from odenets.neural_ode.inputs import owner_of
from odenets.recording import Records, check_values
from solvers import SampleSolution, Solution, Tolerance

__all__ = ["Beside", "of_the_state", "records_by_sample"]


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


def records_by_sample(solution: Solution, x: Tensor, measures: dict[str, StepFunction]) -> tuple[Tensor, Records]:
    """Records of steps that each sample has of its own."""
    assert isinstance(solution, SampleSolution)
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step, samples in zip(solution.steps, solution.samples, strict=True):
        samples = samples.to(x.device)
        for name, measure in measures.items():
            values = check_values(name, measure(step), step.x0)
            rows[name].append(values.new_zeros(len(x)).index_copy(0, samples, values))
    none = x.real.new_zeros(0, len(x))
    return solution.x1, Records({name: torch.stack(values) if values else none for name, values in rows.items()})
