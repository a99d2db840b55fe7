"""An explicit Runge-Kutta method whose coefficients are learned, and whose order holds whatever they become."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from solvers.coefficients import Coefficients
from solvers.methods import get_tableau
from solvers.tableaus import ButcherTableau, Embedded
from solvers.validation import is_transformed

__all__ = ["CONDITIONS", "LearnedTableau", "check_gradient", "nearest_weights"]

CONDITIONS = {1: 1, 2: 2, 3: 4}
"""Number of order conditions up to each order."""
_MISSED = 1e-12  # by which a condition may be off, that of a tableau's sums


class LearnedTableau(nn.Module):
    """A method of explicit Runge-Kutta steps whose coefficients are parameters, wherever a tableau goes.

    ``p_i = v(t + c_i h, x + h sum_j a_ij p_j)`` and ``x1 = x + h sum_i b_i p_i``, as of a
    :class:`~solvers.ButcherTableau`. The nodes c are the sums of the rows of a. The conditions of the order are linear
    in b where a and c are known, so b is the nearest to free weights w that satisfies them: with their matrix M, a row
    for each condition, and right sides r, ``b = w + M^+ (r - M w)``. So the order holds at every value of the
    parameters. Coefficients are computed in float64.

    The parameters are changes of the starting coefficients, zeros at first, so that decay of weights leads back to the
    start. Where there are as many conditions as stages, b follows from a, and there are no free weights.

    There is no embedded error: steps are fixed, ``steps=n``, or blocks of a flow. Gradients are those of
    ``gradient="direct"``. Looking at the conditions waits for a GPU once for each solve.

    Args:
        start: name of an explicit method, or its tableau, to begin with, whose embedded solutions are left behind; or
            None.
        stages: number of stages, in place of a start: it then begins with the method of Jameson, Schmidt and Turkel
            (1981), each stage from the one before, at the nodes ``1 / (stages + 1 - i)``; with order 3 its weights b
            are the nearest of that order.
        order: 1, 2 or 3, which is kept. If not given, that of the start, or 2 without one, at most that which so many
            stages keep: order 2 takes 2 stages, order 3 takes 4.

    Attributes:
        change_a: change of the entries of a below the diagonal, row by row, ``(stages (stages - 1) / 2,)``.
        change_b: change of the free weights, ``(stages,)``, or None where b follows from a.

    Raises:
        TypeError, ValueError: no start and no stages, or both, a start that is not explicit, or an order that is out of
            reach.

    References:
        Hairer, Norsett, Wanner. Solving Ordinary Differential Equations I, II.1 and II.2.
        Shaul, Perez, Chen, Thabet, Pumarola, Lipman. Bespoke solvers for generative flow models. ICLR 2024.

    >>> import torch
    >>> from solvers import integrate
    >>> learned = LearnedTableau("rk4")
    >>> solution = integrate(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, solver=learned, steps=2)
    >>> solution.x1.square().sum().backward()  # gradients flow to the coefficients
    >>> learned.change_a.grad.shape, learned.tableau().stages
    (torch.Size([6]), 4)
    """

    fsal: ClassVar[bool] = False
    explicit: ClassVar[bool] = True
    implicit: ClassVar[bool] = False
    structure: ClassVar[str] = ""
    low: ClassVar[None] = None
    dense: ClassVar[None] = None
    error_weights: ClassVar[None] = None

    def __init__(
        self, start: str | ButcherTableau | None = None, *, stages: int | None = None, order: int | None = None
    ) -> None:
        super().__init__()
        if (start is None) == (stages is None):
            raise ValueError(f"give start, a method to begin with, or stages, a number: got {start!r} and {stages!r}")
        begin = _chain(stages) if start is None else get_tableau(start)
        if not isinstance(begin, ButcherTableau):
            raise TypeError(f"start must be the name of a method or a ButcherTableau, got {type(begin).__name__}")
        if not begin.explicit:
            kind = "implicit" if begin.implicit else f"for fields that are {begin.structure}"
            raise ValueError(f"start must be an explicit method, as rk4, bs23 or dopri5: {begin.name} is {kind}")
        self.stages = begin.stages
        if self.stages < 2:
            raise ValueError(f"start must have at least 2 stages, for one leaves nothing to learn, got {begin.name}")
        reach = 3 if start is None else begin.order  # a chain takes the weights of its order
        most = min(reach, 3 if self.stages >= CONDITIONS[3] else 2)
        self.order: int = min(begin.order, most) if order is None else _check_order(order, most, reach, begin)
        self.name = f"learned {begin.name}"
        self._start = torch.tensor([*(value for row in begin.a for value in row), *begin.b], dtype=torch.float64)
        self.change_a = nn.Parameter(torch.zeros(self.stages * (self.stages - 1) // 2))
        free = self.stages > CONDITIONS[self.order]
        self.change_b = nn.Parameter(torch.zeros(self.stages)) if free else None

    @property
    def interior(self) -> int:
        """Number of stages that a step evaluates, all."""
        return self.stages

    @property
    def c(self) -> tuple[Tensor, ...]:
        """The nodes at this moment."""
        return self.coefficients().c

    @property
    def a(self) -> tuple[Tensor, ...]:
        """The weights of the earlier stages at this moment, row ``i`` of ``(i,)``."""
        return self.coefficients().a

    @property
    def b(self) -> Tensor:
        """The weights of the solution at this moment, ``(stages,)``."""
        return self.coefficients().b

    @property
    def calls(self) -> int:
        """Field calls of a step."""
        return self.stages

    @property
    def inside_calls(self) -> int:
        """Field calls for states inside a step, one, of cubic Hermite."""
        return 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the embedded outputs, the solution's alone."""
        return (f"order{self.order}",)

    @property
    def embedded(self) -> tuple[tuple[str, Any], ...]:
        """The solution, by its name."""
        now = self.coefficients()
        return tuple((name, now.solution(name)) for name in now.outputs)

    @property
    def error_order(self) -> int:
        """None, for there is no lower solution.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} carries no embedded error: take bs23, dopri5, dopri8 or kvaerno5")

    @property
    def settings(self) -> str:
        """What it is beside its coefficients, as text."""
        return f"{self.name} of order {self.order} and {self.stages} stages"

    def coefficients(self) -> Any:
        """The coefficients of this moment, in float64; gradients flow to the parameters.

        Raises:
            ValueError: no weights b satisfy the conditions, for parameters that are not finite or nodes of which too
                few differ. In a graph of ``torch.compile`` or ``torch.func`` b is NaN there.
        """
        n, device = self.stages, self.change_a.device
        start = self._start.to(device)
        entries = len(self.change_a)
        below = torch.tril_indices(n, n, -1, device=device)
        a = start.new_zeros(n, n).index_put((below[0], below[1]), start[:entries] + self.change_a.double())
        c = a.sum(1)
        free = start[entries:] + (0.0 if self.change_b is None else self.change_b.double())
        b = nearest_weights(free, a, c, self.order, self.name)
        rows = tuple([row[:i] for i, row in enumerate(a.unbind())])
        return Coefficients(self.name, self.order, c.unbind(), rows, b)

    def tableau(self, name: str | None = None) -> ButcherTableau:
        """The method as it is now, frozen: numbers, which no training changes, as fast as any tableau.

        Args:
            name: of the tableau; that of the method if not given.

        Returns:
            The tableau, which has checked its order.

        Raises:
            ValueError: as :meth:`coefficients`.

        >>> LearnedTableau("rk4").tableau().b
        (0.16666666666666666, 0.3333333333333333, 0.3333333333333333, 0.16666666666666666)
        """
        now = self.coefficients()
        a = tuple(tuple(row.tolist()) for row in now.a)
        b, c = tuple(now.b.tolist()), tuple(map(sum, a))
        own = (self.outputs[0], Embedded(self.order, b))
        return ButcherTableau(name or self.name, self.order, tuple(map(float, c)), a, b, embedded=(own,))

    def solution(self, name: str) -> Any:
        """The embedded solution called ``name``.

        Raises:
            ValueError: there is none.
        """
        return self.coefficients().solution(name)

    def forwarding(self, name: str) -> LearnedTableau:
        """Itself, for its one solution is the one carried on.

        Raises:
            ValueError: another ``name`` than that of its output.
        """
        if name not in self.outputs:
            raise ValueError(f"{self.name} has no output {name!r}; it has {self.outputs[0]}")
        return self

    def get_extra_state(self) -> Tensor:
        """The order and the starting coefficients, so that they travel with ``state_dict``, float64."""
        return torch.cat([torch.tensor([self.order], dtype=torch.float64), self._start])

    def set_extra_state(self, state: Tensor) -> None:
        """Take the starting coefficients of a ``state_dict``, the ``state`` that :meth:`get_extra_state` returns.

        Raises:
            ValueError: it is of another order or of other stages.
        """
        own = self.get_extra_state()
        if state.shape != own.shape or state[0] != own[0]:
            raise ValueError(
                f"the state is of order {int(state[0])} with {len(state) - 1} coefficients, and {self.settings} has "
                f"{len(own) - 1}: make LearnedTableau with the start, or stages, and the order of the saved one"
            )
        self._start = state[1:].double().cpu().clone()

    def extra_repr(self) -> str:
        """The method, as ``print`` shows it."""
        return f"{self.name!r}, stages={self.stages}, order={self.order}"


def nearest_weights(free: Tensor, a: Tensor, c: Tensor, order: int, name: str) -> Tensor:
    """The weights b nearest to ``free`` that satisfy the conditions of an order, ``(stages,)``.

    Args:
        free: weights, ``(stages,)``, float64.
        a: the weights of stages in each other, ``(stages, stages)``.
        c: the nodes, ``(stages,)``.
        order: 1, 2 or 3.
        name: of the method, for the message.

    Raises:
        ValueError: there are none; in a graph of ``torch.compile`` or ``torch.func`` b is NaN there.

    >>> a = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    >>> nearest_weights(torch.zeros(2), a, a.sum(1), 2, "trapezoid")
    tensor([0.5000, 0.5000])
    """
    matrix = torch.stack([torch.ones_like(c), c, c * c, a @ c][: CONDITIONS[order]])
    right = torch.tensor([1, 1 / 2, 1 / 3, 1 / 6], dtype=c.dtype, device=c.device)[: len(matrix)]
    q, r = torch.linalg.qr(matrix.T)  # M = r^T q^T, and M^+ = q r^-T
    b = free
    for _ in range(2):  # once more, for rounding
        b = b + q @ torch.linalg.solve_triangular(r.T, (right - matrix @ b)[:, None], upper=False)[:, 0]
    holds = (matrix @ b - right).abs().amax() <= _MISSED
    if torch.compiler.is_compiling() or is_transformed(b):
        return torch.where(holds, b, torch.nan)
    if not holds:
        raise ValueError(
            f"{name}: no weights b satisfy the conditions of order {order} with the nodes "
            f"{[round(node, 6) for node in c.tolist()]}: begin anew, with a smaller learning rate, more stages or "
            "a lower order"
        )
    return b


def check_gradient(tableau: Any, gradient: str) -> None:
    """That the gradient of a learned method is not lost.

    Raises:
        ValueError: coefficients that require one, with a ``gradient`` that goes to the field alone.
    """
    if gradient == "direct" or not isinstance(tableau, LearnedTableau):
        return
    if any(p.requires_grad for p in tableau.parameters()):
        raise ValueError(
            f"gradient={gradient!r} would lose the gradient of the coefficients of {tableau.name}: take "
            "gradient='direct', or solver=learned.tableau(), its coefficients as numbers"
        )


def _check_order(order: Any, most: int, reach: int, begin: ButcherTableau) -> int:
    if not isinstance(order, Integral) or isinstance(order, bool):
        raise TypeError(f"order must be 1, 2 or 3, got {order!r}")
    order = int(order)
    if not 1 <= order <= 3:
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if order > reach:
        raise ValueError(f"order must be at most {reach}, that of the start {begin.name}, got {order}")
    if order > most:
        needed = CONDITIONS[order]
        raise ValueError(
            f"order={order} holds at all coefficients from {needed} stages on, and {begin.name} has {begin.stages}: "
            f"take order={most}, or {needed} stages"
        )
    return order


def _chain(stages: Any) -> ButcherTableau:
    """The method of Jameson, Schmidt and Turkel: each stage from the one before, the last one is the solution's."""
    if not isinstance(stages, Integral) or isinstance(stages, bool):
        raise TypeError(f"stages must be a whole number, got {stages!r}")
    if stages < 2:
        raise ValueError(f"stages must be at least 2, for one leaves nothing to learn, got {stages}")
    n = int(stages)
    c = (0.0, *(1 / (n + 1 - i) for i in range(1, n)))
    a = tuple((*[0.0] * (i - 1), c[i])[:i] for i in range(n))
    return ButcherTableau(f"chain of {n} stages", 2, c, a, (*[0.0] * (n - 1), 1.0))
