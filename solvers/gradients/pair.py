"""The steps of a reversible pair of states, and whether the two stay together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.reductions import combine
from solvers.runge_kutta import rk_step
from solvers.step import Step
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import to_state_shape

__all__ = ["Move", "ReversibleSteps", "sizes"]

Time = float | Tensor

_FAR, _NEAR, _TOLERANCES = 0.25, 0.05, 20


class Move(NamedTuple):
    """A step that was taken: where it begins, its size, and by which samples, ``(B, 1, ..., 1)``; None of all."""

    t: Time
    h: Time
    taken: Tensor | None


def sizes(x: Tensor) -> Tensor:
    """The largest absolute value of each sample, ``(B,)``; of a state that is no batch of the whole, ``(1,)``."""
    rows = x.detach().abs().reshape(1 if x.ndim < 2 else len(x), -1)
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


class ReversibleSteps:
    """Takes the steps of the pair, and remembers which ones; each is that of y, with the stages at z.

    Where the field contracts at a rate r, the difference ``y - z`` grows by ``c exp(h r)`` a step, and the solution is
    off by half of it. It is looked at where a step begins, for nothing reads the one behind the last; at the first 16
    and every eighth. The states of a sample have come apart where it exceeds

    - a quarter of the largest value of the sample so far;
    - 1/20 of it at the end of five steps or more, if it has grown by more than the square of their number since half of
      them: as sums of local errors do not, and what is unstable does;
    - under error control, 20 tolerances for each step so far, in the tolerance's norm.

    Fixed steps wait for the device once, at the end.

    Args:
        tableau, x0, coupling: the method, the first state, and how much of y is kept.
        tolerance: of error control, or None.
        each: whether the error is that of each sample.

    Attributes:
        calls: field calls so far.
        moves: the steps taken.
        size: the largest value of each sample so far, ``(B,)``.
    """

    def __init__(
        self, tableau: ButcherTableau, x0: Tensor, coupling: float, tolerance: Tolerance | None = None, *,
        each: bool = False
    ) -> None:  # fmt: skip
        self.tableau, self.coupling, self.tolerance, self.each = tableau, coupling, tolerance, each
        self.calls, self.moves = 0, list[Move]()
        self.z = self._y = self._before = x0
        self._begun: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None  # where the last step begins
        self.size = sizes(x0)
        self._apart, self._far = torch.zeros_like(self.size), torch.zeros_like(self.size, dtype=torch.bool)
        self._earlier: list[tuple[int, Tensor]] = []  # the difference over the size, at the last two powers of two
        self._looked, self._moved = 0, False
        self._last: tuple[Field, Move, Tensor, Tensor] | None = None

    def __call__(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None = None, *, closing: bool = True
    ) -> Step:
        """A step from ``(x, z)``; ``first`` is the velocity at z, or is not used."""
        first = None if self._moved else first
        z, self._moved = self.z, False
        inner = rk_step(field, t, z, h, self.tableau, first, closing=closing)
        self.calls += len(inner.stages) - (first is not None)
        start = x + (1 - self.coupling) * (z - x)
        end = combine(start, inner.stages, self.tableau.b, h)
        self._last = field, Move(t, h, None), x, end
        return inner._replace(x0=start, x1=end, reductions=None)

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """The last step is taken, by all samples or by those of a mask ``(B,)``: z goes after y.

        Raises:
            RuntimeError: under error control, the states have come apart.
        """
        assert self._last is not None
        field, move, x, y = self._last
        if not (accepted is None or bool(accepted.all())):
            taken = to_state_shape(accepted, y)  # type: ignore[arg-type] - a mask here
            move, y = move._replace(h=torch.where(taken, move.h, 0.0), taken=taken), torch.where(taken, y, x)
        self._begun, n = (self._before, self._y, self.z, move.taken), len(self.moves)
        if n and (n <= 16 or n % 8 == 0):
            self._look(n)
            if self.tolerance is not None:
                self._raise_where(self._far)
        back = rk_step(field, move.t + move.h, y, -move.h, self.tableau, closing=False)
        self.calls += len(back.stages)
        z = combine(self.z, back.stages, self.tableau.b, move.h)
        if move.taken is not None:
            pairs = (x, self._before), (y, self._y), (z, self.z)
            x, y, z = (torch.where(move.taken, now, before) for now, before in pairs)
        self._before, self._y, self.z = x, y, z
        self.moves.append(move)
        self._moved = True

    def check(self) -> None:
        """That the two states are together where the last step begins.

        Raises:
            RuntimeError: they have come apart.
        """
        n = len(self.moves) - 1
        if n > 0:  # the first step is that of the method
            if self._looked < n:
                self._look(n)
            apart, far = self._apart / self.size, self._far
            if n >= 4:
                count, earlier = self._earlier[-1] if self._earlier[-1][0] <= n / 2 else self._earlier[-2]
                far = far | ((apart > _NEAR) & (apart > earlier * (n / count) ** 2))
            self._raise_where(far)
        self.size = torch.maximum(self.size, sizes(self._y))

    def _look(self, n: int) -> None:
        """Take note of the difference after n steps, where one begins; no device is waited for."""
        assert self._begun is not None
        self._looked, (before, y, z, taken) = n, self._begun
        difference = y - z if taken is None else torch.where(taken, y - z, 0.0)
        self.size = torch.maximum(self.size, sizes(y))
        self._apart = torch.maximum(self._apart, sizes(difference))
        if n & (n - 1) == 0:
            self._earlier = [*self._earlier[-1:], (n, self._apart / self.size)]
        self._far = self._far | (self._apart > _FAR * self.size)
        if self.tolerance is not None:
            scaled = self.tolerance.scaled(difference, before, y)
            self._far = self._far | (self.tolerance.size(scaled, each=self.each) > _TOLERANCES * n)

    def _raise_where(self, apart: Tensor) -> None:
        if not bool(apart.any()):
            return
        by = torch.where(apart, (self._apart / self.size).nan_to_num(math.inf), 0.0)
        i = int(by.argmax())
        whose = f"those of sample {i} " if len(apart) > 1 and not bool(apart.all()) else ""
        raise RuntimeError(
            f"gradient='reversible': the two states of the pair have come apart in {len(self.moves)} steps, {whose}by "
            f"{by[i].item():.2g} of the largest state: the solution would be wrong. Their difference grows where the "
            f"field contracts, at a rate with coupling * exp(h * rate) > 1: take a smaller coupling than "
            f"{self.coupling}, smaller steps, or gradient='checkpoint'"
        )
