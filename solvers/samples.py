"""Error control per sample: one batch in which every sample has its own time and step size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.controllers import SampleController, SampleStates
from solvers.errors import MaxStepsError, NonFiniteError, SolverError, StepUnderflowError
from solvers.solution import SampleStatistics
from solvers.states import real_dtype
from solvers.step import Field, Step, beside, rk_step
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance, numbers

__all__ = ["Round", "SampleLoop", "align"]


class Round(NamedTuple):
    """One attempted step of every sample.

    Attributes:
        step: the step, with ``t`` and ``h`` of shape ``(B, 1, ..., 1)``; of no meaning for samples that finished.
        accepted: the samples that took it, ``(B,)`` on the host.
        t: time of each sample after it, ``(B,)`` float64 on the host.
        x: state of each sample after it, ``(B, *S)``.
    """

    step: Step
    accepted: Tensor
    t: Tensor
    x: Tensor


class SampleLoop:
    """The adaptive loop with a time and a step size per sample.

    Times and step sizes are float64 on the host, where the controller works on all of them at once; the device is
    waited for once per attempt. A finished sample stays in the batch and takes steps of size 0 until the last has
    finished, so that whatever the field knows of its samples, by position, stays true.

    Args:
        field: velocity ``v(t, x)``, with ``t`` of shape ``(B, 1, ..., 1)``.
        x: states at the start, ``(B, *S)``.
        t0, t1: start and end of each sample, ``(B,)`` float64 on the host.
        tableau, tolerance, controller: the method, what it accepts, how it chooses its steps.
        raises: whether a sample that cannot go on ends the solve; else it stays where it is and the others go on.
    """

    def __init__(
        self,
        field: Field,
        x: Tensor,
        t0: Tensor,
        t1: Tensor,
        tableau: ButcherTableau,
        tolerance: Tolerance,
        controller: SampleController,
        *,
        raises: bool = True,
    ) -> None:
        real = real_dtype(x)
        self.field: Field = lambda t, x: field(t.to(real), x)  # type: ignore[union-attr]
        self.x, self.t, self.t1 = x, t0.clone(), t1
        self.tableau, self.tolerance, self.controller, self.raises = tableau, tolerance, controller, raises
        self.direction = torch.where(t1 >= t0, 1.0, -1.0).double()
        self.moving = t0 != t1
        self.calls = 0
        zeros = torch.zeros(len(x), dtype=torch.long)
        self.stats = SampleStatistics(zeros.clone(), zeros.clone(), zeros.clone())
        self.failures: dict[int, SolverError] = {}
        self._parked: list[tuple[Tensor, Tensor]] = []
        self._t = self.t

    @property
    def states(self) -> Tensor:
        """The state of each sample, ``(B, *S)``."""
        x = self.x
        for samples, before in self._parked:
            x = torch.where(samples, before, x)
        return x

    def rounds(self) -> Iterator[Round]:
        """The attempts that took some sample on, until all have finished.

        Raises:
            StepUnderflowError, MaxStepsError, NonFiniteError: a sample cannot go on, where that raises.
        """
        order = self.tableau.error_order
        first = self.field(beside(self.t, self.x), self.x)
        self._count(1)
        states = self._first_states(first, order)
        ratio, bad_stage = torch.full_like(self.t, torch.nan), torch.where(states.h.isfinite(), -1, 0)
        attempts = 0
        while self.moving.any():
            size = states.h.clamp(self.tolerance.min_step, self.tolerance.max_step)
            left = (self.t1 - self.t).abs()
            self._fail_where_stuck(size, left, ratio, bad_stage, attempts)
            if not self.moving.any():
                return
            last = size >= left
            h = self.direction * torch.where(self.moving, torch.where(last, left, size), 0.0)
            step = rk_step(self.field, beside(self._t, self.x), self.x, beside(h, self.x), self.tableau, first)
            self._count(len(step.stages) - (first is not None))
            attempts += 1
            with torch.no_grad():
                found = self.tolerance.sizes(self.tolerance.scaled(step.error(), self.x, step.x1))
                ratio = torch.tensor(numbers(found), dtype=torch.float64)
            finite = ratio.isfinite() | ~self.moving
            before = states.errors
            states = self.controller.each(states._replace(h=h.abs()), ratio, order)
            accepted = self.moving & (states.accepted | (finite & (size <= self.tolerance.min_step)))
            if not finite.all():
                bad_stage = torch.where(finite, bad_stage, _first_not_finite(step))
                if torch.is_grad_enabled():  # a NaN beside good samples would reach their gradients: all try again
                    states = states._replace(h=torch.where(accepted, h.abs(), states.h), errors=before)
                    accepted = torch.zeros_like(accepted)
            self.stats.accepted.add_(accepted)
            self.stats.rejected.add_(self.moving & ~accepted)
            if not accepted.any():
                first = step.stages[0]
                continue
            everyone = bool((accepted == self.moving).all())
            took = beside(accepted, self.x)
            self.x = step.x1 if everyone else torch.where(took, step.x1, self.x)
            first = step.stages[-1] if self.tableau.fsal else None
            if first is not None and not everyone:
                first = torch.where(took, first, step.stages[0])
            self.t = torch.where(accepted, torch.where(last, self.t1, self.t + h), self.t)
            self._t = torch.where(accepted, self.t, self._t)
            self.moving = self.moving & (self.t != self.t1)
            yield Round(step, accepted, self.t, self.states)

    def stop(self, samples: Tensor) -> None:
        """Let the samples of a mask ``(B,)`` go no further."""
        self.moving = self.moving & ~samples

    def move(self, samples: Tensor, t: Tensor, x: Tensor) -> None:
        """Let the samples of a mask end at the times and states given for them."""
        self.t = self._t = t
        self.x = torch.where(beside(samples, x), x, self.x)
        self.stop(samples)

    def _count(self, calls: int) -> None:
        self.calls += calls
        self.stats.evaluations.add_(self.moving, alpha=calls)

    def _first_states(self, first: Tensor, order: int) -> SampleStates:
        size = self.tolerance.first_step
        if size is None:
            with torch.no_grad():
                t, direction = (beside(v, self.x) for v in (self.t, self.direction))
                x, p = self.x.detach(), first.detach()
                found = self.tolerance.choose_first_steps(self.field, t, x, p, direction, order)
                h = torch.tensor(numbers(found), dtype=torch.float64)
            self._count(1)
        else:
            h = torch.full_like(self.t, size)
        ones = torch.ones_like(self.t)
        return SampleStates(h, torch.ones_like(self.moving), (ones, ones))

    def _fail_where_stuck(self, size: Tensor, left: Tensor, ratio: Tensor, bad_stage: Tensor, attempts: int) -> None:
        smallest = 10 * (torch.nextafter(self.t, torch.full_like(self.t, torch.inf)) - self.t)
        stuck = self.moving & ~(size >= smallest) & (left > smallest)
        if attempts >= self.tolerance.max_steps:
            stuck = self.moving.clone()
        for i in stuck.nonzero().flatten().tolist():
            where: dict[str, Any] = {"t": float(self.t[i]), "h": float(self.direction[i] * size[i]), "sample": i}
            last = f"last error ratio {ratio[i]:.3g}"
            if attempts >= self.tolerance.max_steps:
                error: SolverError = MaxStepsError(
                    f"{attempts} attempted steps did not reach t1 = {self.t1[i]:g}; {last}: "
                    "raise max_steps, loosen the tolerance, or the problem is stiff",
                    stage=None, **where,
                )  # fmt: skip
            elif not ratio[i].isfinite():
                stage = int(bad_stage[i])
                error = NonFiniteError(
                    "NaN or infinity, and no smaller step avoids it", stage=stage if stage >= 0 else None, **where
                )
            else:
                error = StepUnderflowError(
                    f"the error asks for a step below {smallest[i]:.3g}; {last}: "
                    "the problem is stiff or discontinuous here, or the tolerance is below rounding",
                    stage=None, **where,
                )  # fmt: skip
            if self.raises:
                raise error
            self.failures[i] = error
        self.stop(stuck)
        if stuck.any() and self.moving.any():
            self._park(stuck)

    def _park(self, samples: Tensor) -> None:
        """Put samples beside one that goes on, so that no NaN of theirs reaches a gradient; keep their states."""
        other = int(self.moving.nonzero()[0])
        mask = beside(samples, self.x)
        self._parked.append((mask, self.x))
        self.x = torch.where(mask, self.x[other].detach(), self.x)
        self._t = torch.where(samples, self.t[other], self._t)


def align(accepted: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and sizes of the accepted steps, the k-th of every sample in row k; behind its last a sample has size 0.

    Args:
        accepted, start, end: of each round, ``(rounds, B)``.

    Returns:
        Two tensors ``(n, B)``.
    """
    n = int(accepted.sum(0).max()) if len(accepted) else 0
    order = (~accepted).to(torch.uint8).argsort(dim=0, stable=True)[:n]
    taken, start, end = (v.gather(0, order) for v in (accepted, start, end))
    return torch.where(taken, start, end), torch.where(taken, end - start, 0.0)


def _first_not_finite(step: Step) -> Tensor:
    """The first stage of each sample that holds NaN or infinity, -1 where none does, ``(B,)`` on the host."""
    bad = torch.stack([(~p.detach().isfinite()).flatten(1).any(1) for p in step.stages]).cpu()
    return torch.where(bad.any(0), bad.to(torch.uint8).argmax(0), -1).double()
