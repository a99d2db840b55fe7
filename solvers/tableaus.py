"""Butcher tableaus of explicit and diagonally implicit Runge-Kutta methods: frozen, self-validating constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar

from solvers.order_conditions import missed_condition
from solvers.roots import RootFinder

__all__ = ["ButcherTableau", "Embedded", "Row"]

_ROOTS = RootFinder()

Row = tuple[float, ...]
"""Coefficients of a method, one per stage, as plain numbers, which hold no device and no dtype."""


def _row(name: str, values: Any) -> Row:
    """Numbers in a tuple, list, array or tensor as a row."""
    try:
        row = tuple(float(value) for value in values) if not isinstance(values, str) else None
    except (TypeError, ValueError):
        row = None
    if row is None:
        raise TypeError(f"{name} must be a row of numbers, got {values!r:.80}")
    if not all(map(math.isfinite, row)):
        raise ValueError(f"{name} must be finite, got {row}")
    return row


def _triangle(a: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a square array without what is zero from the diagonal on; other rows as they are."""
    if any(len(row) != len(a) for row in a):
        return a
    return tuple(row if any(row[i + 1 :]) else row[: i + bool(row[i])] for i, row in enumerate(a))


def _check_order(name: str, order: object) -> None:
    if not isinstance(order, Integral) or isinstance(order, bool):
        raise TypeError(f"{name} must be a whole number, got {order!r}")
    if order < 1:
        raise ValueError(f"{name} must be at least 1, got {order}")


@dataclass(frozen=True)
class Embedded:
    """A solution of a given order obtained from the stages of a step by other weights.

    Attributes:
        order: order of convergence when this solution is the one carried on.
        b: one weight per stage; they sum to 1.

    Raises:
        TypeError, ValueError: an order that is no whole number from 1 on, or weights that are no finite numbers.

    >>> from solvers import get_tableau
    >>> get_tableau("heun").solution("euler")
    Embedded(order=1, b=(1.0, 0.0))
    """

    order: int
    b: Row

    def __post_init__(self) -> None:
        _check_order("order of an embedded solution", self.order)
        object.__setattr__(self, "b", _row("b of an embedded solution", self.b))


@dataclass(frozen=True)
class ButcherTableau:
    """Coefficients of an explicit, or a diagonally implicit, Runge-Kutta method.

    ``p_i = v(t + c_i h, x + h sum_j a_ij p_j)`` and ``x1 = x + h sum_i b_i p_i``. A row of a with an entry on the
    diagonal makes its stage implicit: p_i is the root of its equation. Methods with entries above the diagonal, as
    those of Gauss and Radau, are refused.
    Reference: Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, II.1; II, IV.6.

    Coefficients may come as tuples, lists, arrays or tensors in float64; they become tuples of numbers.

    Attributes:
        name: a label, for messages and records; :func:`~solvers.get_tableau` finds the published methods alone.
        order: order of the solution that is carried on. The coefficients are checked for it, as those of embedded
            solutions for theirs: all conditions of the orders up to 4.
        c: node of each stage, as a fraction of the step; ``c[0] = 0`` if the first stage is explicit.
        a: row ``i`` holds the ``i`` weights of the earlier stages, and of an implicit stage its own, positive; each row
            sums to its ``c``. Or a square array, which is zero above its diagonal; a zero on it is an explicit stage.
        b: weights of the solution; they sum to 1.
        embedded: the solutions that the stages carry, by name, pairs or a dictionary; one of them, where there are any,
            has the weights ``b``.
        low: name of the embedded solution that the error is measured against, another than the method's own, or None.
        dense: the method's own interpolant, per stage the coefficients of ``theta, theta^2, ...`` in its weight
            ``b_i(theta)`` on ``x(t + theta h) = x0 + h sum_i b_i(theta) p_i``; or None.
        roots: how implicit stages are found.
        structure: of the class; what the method reads of a field: "" of a velocity for any state, "separable" of a
            :class:`~solvers.Separable` field, "semilinear" of a :class:`~solvers.SemiLinear` one.
        implicit: derived; whether a stage is implicit.
        explicit: derived; whether it is none of these, each stage one call of any field.
        fsal: derived; first same as last, the last stage is the velocity at the solution itself, and the first one
            that at the start.
        error_weights: derived; ``b - b_low``, or None without a lower solution.
        stages: derived; number of stages.
        interior: derived; number of stages that the solution ``x1`` needs, up to the last one that ``b`` reads; those
            behind, the closing stages, serve the error and the embedded outputs alone.

    Raises:
        TypeError: an order that is no whole number, or coefficients that are no numbers.
        ValueError: the coefficients are not finite, not those of a consistent method, or not of the order.

    >>> import torch
    >>> from solvers import integrate
    >>> ralston = ButcherTableau(
    ...     name="ralston", order=2, c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4)
    ... )
    >>> x0 = torch.ones(1, 1)
    >>> solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, solver=ralston, steps=10)
    >>> round(solution.x1.item(), 2)
    0.37
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    embedded: tuple[tuple[str, Embedded], ...] = ()
    low: str | None = None
    dense: tuple[Row, ...] | None = None
    roots: RootFinder = _ROOTS
    structure: ClassVar[str] = ""
    implicit: bool = field(init=False, default=False)
    explicit: bool = field(init=False, default=True)
    fsal: bool = field(init=False, default=False)
    error_weights: Row | None = field(init=False, default=None)
    stages: int = field(init=False, default=0)
    interior: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._read()
        self._check_coefficients()
        self._check_embedded()

        # Constants from here on: plain attributes, so that torch.compile reads them without a guard on code.
        stages = len(self.c)
        implicit = any(len(row) > i for i, row in enumerate(self.a))
        last = self.a[-1] == self.b if implicit else self.b[-1] == 0 and self.a[-1] == self.b[:-1]
        object.__setattr__(self, "implicit", implicit)
        object.__setattr__(self, "explicit", not implicit and not self.structure)
        object.__setattr__(self, "fsal", stages > 1 and not self.a[0] and self.c[-1] == 1 and last)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "interior", max(i for i, b in enumerate(self.b, 1) if b))
        if self.low is not None:
            low = self.solution(self.low).b
            object.__setattr__(self, "error_weights", tuple(b - b_low for b, b_low in zip(self.b, low, strict=True)))

    def __hash__(self) -> int:
        return hash((self.name, self.b))

    def _read(self) -> None:
        """What came, as rows of numbers."""
        _check_order(f"{self.name}: order", self.order)
        rows: dict[str, Any] = {key: _row(f"{self.name}: {key}", getattr(self, key)) for key in ("c", "b")}
        rows["a"] = _triangle(tuple(_row(f"{self.name}: row {i} of a", row) for i, row in enumerate(self.a)))
        if self.dense is not None:
            rows["dense"] = tuple(_row(f"{self.name}: row {i} of dense", row) for i, row in enumerate(self.dense))
        embedded = self.embedded.items() if isinstance(self.embedded, Mapping) else self.embedded
        rows["embedded"] = pairs = tuple(tuple(pair) for pair in embedded)
        for pair in pairs:
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Embedded):
                raise TypeError(f"{self.name}: embedded must hold pairs of a name and an Embedded, got {pair!r:.80}")
        for key, row in rows.items():
            object.__setattr__(self, key, row)

    def _check_coefficients(self) -> None:
        stages = len(self.c)
        if stages == 0 or len(self.a) != stages or len(self.b) != stages:
            raise ValueError(
                f"{self.name}: c, a and b must have one entry per stage, "
                f"got {len(self.c)}, {len(self.a)} and {len(self.b)}"
            )
        for i, (node, row) in enumerate(zip(self.c, self.a, strict=True)):
            if len(row) not in (i, i + 1):
                raise ValueError(
                    f"{self.name}: row {i} of a must have {i} entries, or {i + 1} where the stage is implicit, got "
                    f"{len(row)}; methods whose stages depend on later ones are not here"
                )
            if len(row) > i and not row[i] > 0:
                raise ValueError(f"{self.name}: the diagonal entry in row {i} of a must be positive, got {row[i]!r}")
            if abs(sum(row) - node) > 1e-12:
                raise ValueError(f"{self.name}: row {i} of a sums to {sum(row)!r}, but c[{i}] is {node!r}")
        if abs(sum(self.b) - 1) > 1e-12:
            raise ValueError(f"{self.name}: b must sum to 1, got {sum(self.b)!r}")
        self._check_conditions("order", self.order, self.b)
        if self.dense is not None:
            ends = [sum(row) for row in self.dense]
            if len(ends) != stages or any(abs(end - b) > 1e-9 for end, b in zip(ends, self.b, strict=True)):
                raise ValueError(f"{self.name}: dense weights at theta = 1 must be b, got {ends} for {self.b}")

    def _check_embedded(self) -> None:
        stages = len(self.c)
        for name, solution in self.embedded:
            if len(solution.b) != stages:
                raise ValueError(f"{self.name}: embedded {name!r} must have {stages} weights, got {len(solution.b)}")
            if abs(sum(solution.b) - 1) > 1e-12:
                raise ValueError(f"{self.name}: weights of embedded {name!r} must sum to 1, got {sum(solution.b)!r}")
            self._check_conditions(f"order of embedded {name!r}", solution.order, solution.b)
        if self.low is not None and self.low not in dict(self.embedded):
            raise ValueError(f"{self.name}: low must name an embedded solution {self.outputs}, got {self.low!r}")
        if self.low is not None and self.solution(self.low).b == self.b:
            raise ValueError(f"{self.name}: low must name another solution than the method's own, got {self.low!r}")
        if self.embedded and all(solution.b != self.b for _, solution in self.embedded):
            raise ValueError(
                f"{self.name}: embedded must hold the method's own solution, with the weights b, under a name, got "
                f"{self.outputs}: add ({self.name!r}, Embedded({self.order}, b))"
            )

    def _check_conditions(self, name: str, order: int, b: Row) -> None:
        if missed := missed_condition(order, self.a, b, self.c):
            most, condition = missed
            raise ValueError(
                f"{self.name}: {name} must be at most {most}, that of the coefficients, got {order}: {condition}"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the embedded outputs."""
        return tuple(name for name, _ in self.embedded)

    @property
    def calls(self) -> int:
        """Field calls of a step without closing stages that knows nothing of the step before."""
        return self.interior

    @property
    def inside_calls(self) -> int:
        """Field calls for states inside a step that carries all its stages, none or those of cubic Hermite."""
        return 0 if self.dense is not None else 1

    @property
    def error_order(self) -> int:
        """Order q of the lower solution; the embedded error of one step is ``O(h^(q+1))``.

        Raises:
            ValueError: the method has no lower solution.
        """
        if self.low is None:
            raise ValueError(f"{self.name} carries no embedded error: take bs23, dopri5, dopri8 or kvaerno5")
        return min(self.order, self.solution(self.low).order)

    def solution(self, name: str) -> Embedded:
        """The embedded solution called ``name``.

        Raises:
            ValueError: there is none; the message lists those that are.
        """
        for known, solution in self.embedded:
            if known == name:
                return solution
        raise ValueError(f"{self.name} has no output {name!r}; it has {', '.join(self.outputs)}")

    def weights_at(self, theta: Any) -> tuple[Any, ...]:
        """Weights ``b_i(theta)`` of the method's interpolant, for a number or a tensor ``theta`` in [0, 1].

        Raises:
            ValueError: the method has no interpolant of its own.
        """
        if self.dense is None:
            raise ValueError(f"{self.name} has no interpolant of its own; bs23, dopri5, dopri8 and kvaerno5 have")
        weights = []
        for row in self.dense:
            value = row[-1]
            for coefficient in reversed(row[:-1]):
                value = value * theta + coefficient
            weights.append(value * theta)
        return tuple(weights)

    def forwarding(self, name: str) -> ButcherTableau:
        """The method that carries the embedded output ``name`` on instead of its own solution [K24, eq. 43].

        The error is then measured against the same lower solution, or, if that is the one carried on, against the
        former solution.

        Raises:
            ValueError: no such output.

        >>> from solvers import get_tableau
        >>> get_tableau("bs23").forwarding("order2").b[-1]
        0.125
        """
        low = self.low
        if low is not None and self.solution(low).b == self.solution(name).b:
            low = next((other for other, solution in self.embedded if solution.b == self.b), None)
        chosen = self.solution(name)
        dense = self.dense if chosen.b == self.b else None
        name = f"{self.name} forwarding {name}"
        return replace(self, name=name, order=chosen.order, b=chosen.b, low=low, dense=dense)

    def solved_by(self, roots: RootFinder) -> ButcherTableau:
        """The implicit method whose stages are found by ``roots``.

        Raises:
            ValueError: the method is explicit.
            TypeError: roots is no :class:`~solvers.RootFinder`.
        """
        if not isinstance(roots, RootFinder):
            raise TypeError(f"roots must be a RootFinder, as RootFinder('newton_krylov'), got {type(roots).__name__}")
        if not self.implicit:
            raise ValueError(f"{self.name} is explicit: no stage of it is to be solved for")
        return replace(self, roots=roots)
