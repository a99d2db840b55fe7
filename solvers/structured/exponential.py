"""Steps of exponential methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from solvers.field_calls import check_unchanged, velocity, versions_of
from solvers.reductions import combine
from solvers.step import Step
from solvers.structured.fields import check_structure
from solvers.tableaus import ButcherTableau
from solvers.validation import exact

__all__ = ["ExponentialSteps", "exponential_state"]


class ExponentialSteps:
    """Takes steps of :class:`~solvers.methods.exponential.ExponentialTableau`.

    With ``v = A x0 + n(t, x0)`` the first stage is ``p = phi_1(hA) v``, the mean velocity of exponential Euler's step.
    The second one of etd2rk is ``p + 2 phi_2(hA) (n(t + h, x0 + h p) - n(t, x0))``.

    Args:
        tableau: the method.

    Attributes:
        calls: calls of the network so far.
    """

    def __init__(self, tableau: ButcherTableau) -> None:
        self.tableau, self.calls = tableau, 0
        self._size = math.nan

    def accept(self, accepted: np.ndarray | None = None) -> None:
        """Nothing is remembered of a step but its size."""

    def __call__(
        self, field: Any, t: Any, x: Tensor, h: Any, first: Tensor | None = None, *, closing: bool = True
    ) -> Step:
        """One step, with all its stages; ``first`` is of no use to it.

        Raises:
            TypeError: the field is no SemiLinear.
            ValueError: a step size for each sample, or a state of another shape than A.
        """
        check_structure(self.tableau, field)
        if isinstance(h, Tensor) and h.numel() > 1:
            raise ValueError(f"h must be one for the batch with {self.tableau.name}, got shape {tuple(h.shape)}")
        n, v = _rates(field, t, x)
        versions, size = versions_of([n]), self._rounded(t, h.reshape(()) if isinstance(h, Tensor) else h)
        p = field.part(size, v, "phi1")
        self.calls += self.tableau.stages
        stages = (p,)
        if self.tableau.stages == 2:
            change = _change(field, t, h, x, p, n)
            check_unchanged([n], versions)
            stages = (p, p + 2 * field.part(size, change, "phi2"))
        return Step(t, h, x, combine(x, stages, self.tableau.b, h), stages, self.tableau)

    def _rounded(self, t: Any, h: Any) -> Any:
        """The last size, where this one differs from it by the rounding of times, whose functions are at hand."""
        if isinstance(t, Tensor) or isinstance(h, Tensor):
            return h
        if not abs(h - self._size) <= 4 * math.ulp(abs(t) + abs(h)):
            self._size = h
        return self._size


def exponential_state(step: Step, field: Any) -> Callable[[Any], Tensor]:
    """The method's own state inside a step, ``x0 + theta h phi_1(theta h A) v`` of exponential Euler.

    That of etd2rk has ``theta^2 h phi_2(theta h A) (n(t + h, x0 + h p) - n(t, x0))`` besides. The network is called
    anew, once for each stage.
    """
    t, h, x = step.t, step.h, step.x0
    h = h.reshape(()) if isinstance(h, Tensor) else h
    n, v = _rates(field, t, x)
    change = _change(field, t, h, x, step.stages[0], n) if step.tableau.stages == 2 else None

    def state(theta: Any) -> Tensor:
        size = theta * h
        many = size if isinstance(size, Tensor) else exact(size, x.device)  # of which no function is kept
        value = x + (size * field.part(many, v, "phi1")).to(x.dtype)
        if change is not None:
            value = value + (theta * size * field.part(many, change, "phi2")).to(x.dtype)
        return value

    return state


def _rates(field: Any, t: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The network's velocity and the whole one."""
    n = velocity(partial(field.part, name="network"), t, x)
    return n, n + velocity(partial(field.part, name="linear"), t, x)


def _change(field: Any, t: Any, h: Any, x: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """What the network's velocity changes by over a step of exponential Euler."""
    return velocity(partial(field.part, name="network"), t + h, x + p * h, 1) - n
