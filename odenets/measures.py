"""Measures on a solver step: values that map a ``Step`` to one number per sample, ``(B,)``.

Any function ``Step -> (B,)`` is a measure. One that :func:`measure` marks says besides what it reads, so that a step
evaluates no stage and makes no pass over memory that nobody needs; it is frozen, it can be compared, pickled and
composed, and options are bound to it:

>>> import torch, odenets
>>> flow = odenets.Flow(solver="bs23", depth=2)
>>> @measure(closing=False)
... def peak(step):
...     return step.x1.abs().amax(1)
>>> x1, records = flow.record(torch.randn(4, 3), cubic=action.bind(p=3), both=action + 0.1 * error, peak=peak)
>>> records["cubic"].shape, records["peak"].shape
(torch.Size([2, 4]), torch.Size([2, 4]))
>>> peak.closing, (action + error).closing, action.bind(p=3) == action.bind(p=3)
(False, True, True)
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from solvers import Step, finish_step
from solvers.reductions import power_mean, weighted_action, weighted_root_mean_square

__all__ = [
    "Measure",
    "StepFunction",
    "action",
    "cosine",
    "displacement",
    "error",
    "integrand_of",
    "measure",
    "needs_closing",
    "reductions_of",
    "residue",
    "square_norm",
    "step_size",
    "wide_residue",
]

StepFunction = Callable[[Step], Tensor]
"""A measure, be it a :class:`Measure` or a plain function, from a step to one number per sample, ``(B,)``."""


def _operators(function: Callable[..., Any]) -> tuple[Callable[[Any, Any], Measure], Callable[[Any, Any], Measure]]:
    return lambda one, other: _composed(function, one, other), lambda one, other: _composed(function, other, one)


@dataclass(frozen=True)
class Measure:
    """A measure and what it reads of a step; :func:`measure` makes one of a function.

    Measures are added, subtracted, multiplied and divided, with each other and with numbers, and mapped.

    Attributes:
        function: a step, and options by name, to ``(B,)``.
        closing: whether it may read the closing stage of an FSAL method.
        reductions: what it reads of ``step.reductions``, if that is there: "error", "action", "residue".
        integrand: a velocity ``(B, *S)``, and the same options, to ``(B,)``, where the measure of a step is the
            integral of that over the step, so that a solve that keeps no steps can integrate it beside the state. Sums
            of such measures and their products with numbers have one.
        options: bound by :meth:`bind`, name and value.
    """

    function: Callable[..., Tensor]
    closing: bool = True
    reductions: frozenset[str] = frozenset()
    integrand: Callable[..., Tensor] | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())

    __array_ufunc__ = None  # numbers of NumPy leave operators to it

    def __call__(self, step: Step, **options: Any) -> Tensor:
        """The measure of a step, one number per sample, ``(B,)``."""
        return self.function(step, **(dict(self.options) | options))

    @property
    def name(self) -> str:
        """That of its function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def bind(self, **options: Any) -> Self:
        """The same measure with options, such as ``action.bind(p=3)``; it is computed from the stages.

        Raises:
            TypeError: a composed measure, which has none.
        """
        if not options:
            return self
        if isinstance(self.function, _Composed):
            raise TypeError(f"a composed measure takes no {', '.join(options)}: bind options to its parts before")
        return replace(self, options=tuple(sorted((dict(self.options) | options).items())), reductions=frozenset())

    def map(self, function: Callable[[Tensor], Tensor]) -> Measure:
        """A function of the measure, such as ``action.map(torch.sqrt)``."""
        return _composed(function, self)

    def __neg__(self) -> Measure:
        return -1 * self

    __add__, __radd__ = _operators(operator.add)
    __sub__, __rsub__ = _operators(operator.sub)
    __mul__, __rmul__ = _operators(operator.mul)
    __truediv__, __rtruediv__ = _operators(operator.truediv)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        return f"<measure {self.name}{options}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By name, where a module holds the measure of the function under the function's name."""
        module, name = getattr(self.function, "__module__", ""), getattr(self.function, "__qualname__", "")
        named = getattr(sys.modules.get(module), name, None)
        if isinstance(named, Measure) and named.bind(**dict(self.options)) == self:
            return _by_name, (module, name, self.options)
        return super().__reduce_ex__(protocol)


def _by_name(module: str, name: str, options: tuple[tuple[str, Any], ...]) -> Measure:
    return getattr(import_module(module), name).bind(**dict(options))


@dataclass(frozen=True, eq=False)
class _Composed:
    """A function of measures and numbers as a function of a step, or of their integrands as one of a velocity."""

    function: Callable[..., Tensor]
    operands: tuple[Any, ...]

    def __call__(self, x: Any) -> Tensor:
        return self.function(*(one(x) if callable(one) else one for one in self.operands))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Composed) or self.function != other.function:
            return False
        return all(map(_equal, self.operands, other.operands))

    def __hash__(self) -> int:
        return hash(self.function)


def _equal(one: Any, other: Any) -> bool:
    """Tensors are equal where all their entries are."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return torch.equal(one, other) if both else type(one) is type(other) and bool(one == other)


def _composed(function: Callable[..., Any], *operands: Any) -> Measure:
    """Composed measures: what all of them read, and what they integrate where the function is linear.

    Raises:
        TypeError: an operand is neither a measure nor a number.
    """
    for one in operands:
        if not callable(one) and not isinstance(one, Real | Tensor):
            raise TypeError(f"a measure is composed with measures and numbers, got {type(one).__name__}")
    operands = tuple(float(one) if isinstance(one, Real) else one for one in operands)
    measures: list[Any] = [one for one in operands if callable(one)]
    read = reductions_of(measures) if all(reductions_of([one]) for one in measures) else frozenset()
    closing = any(map(needs_closing, measures))
    return Measure(_Composed(function, operands), closing, read, _linear(function, operands))


def _linear(function: Callable[..., Any], operands: tuple[Any, ...]) -> _Composed | None:
    """The same of integrands, where that is the integrand: of sums, and products with numbers that do not train."""
    parts = [_integrand(one) if callable(one) else one for one in operands]
    numbers = [one for one in operands if not callable(one)]
    if any(part is None for part in parts) or any(isinstance(one, Tensor) and one.requires_grad for one in numbers):
        return None
    summed = function in (operator.add, operator.sub) and all(isinstance(one, float) and one == 0 for one in numbers)
    scaled = len(numbers) == 1 and (function is operator.mul or (function is operator.truediv and callable(parts[0])))
    return _Composed(function, tuple(parts)) if summed or scaled else None


def measure(
    function: Callable[..., Tensor] | None = None,
    /,
    *,
    closing: bool = True,
    reduction: str | None = None,
    integrand: Callable[..., Tensor] | None = None,
) -> Any:
    """Make a :class:`Measure` of a function ``Step -> (B,)``, as a decorator; a measure stays as it is.

    Args:
        function: the function; with options it is a decorator of it.
        closing: False says that it never reads the closing stage of an FSAL method, which is then not evaluated.
        reduction: what it reads of ``step.reductions``, "error", "action" or "residue", where that is not None.
        integrand: what the measure integrates over a step, see :class:`Measure`.

    Raises:
        TypeError: no function.
        ValueError: an unknown reduction.
    """
    if reduction not in (None, "error", "action", "residue"):
        raise ValueError(f"reduction must be 'error', 'action' or 'residue', got {reduction!r}")
    if function is None:
        read = frozenset([reduction] if reduction else ())
        return partial(Measure, closing=closing, reductions=read, integrand=integrand)
    if not callable(function):
        raise TypeError(f"a measure must be a function Step -> (B,), got {type(function).__name__}")
    return function if isinstance(function, Measure) else Measure(function)


def check_named(args: Iterable[Any], check: Any) -> None:
    """That measures come by name.

    Raises:
        TypeError: one is among the arguments of fields, or is the flag ``check``; another ``check`` that is no flag.
    """
    for one in (*args, check):
        if isinstance(one, Measure):
            raise TypeError(f"measures come by a name of their own, record(x, {one.name}=measure), got {one}")
    if not isinstance(check, bool):
        raise TypeError(f"check must be True or False, got {check!r:.80}: a measure has another name")


def needs_closing(measure: StepFunction) -> bool:
    """Whether a measure may read the closing stage: true unless it, or what it is a partial of, says otherwise."""
    while isinstance(measure, partial):
        measure = measure.func
    return getattr(measure, "closing", True)


def reductions_of(measures: Iterable[StepFunction]) -> frozenset[str]:
    """The reductions that these measures read, computed while a step's state is (``rk_step(..., reductions=...)``)."""
    return frozenset().union(*(getattr(measure, "reductions", ()) for measure in measures))


def integrand_of(name: str, measure: StepFunction) -> Callable[[Tensor], Tensor]:
    """What a measure integrates over a step: a function of a velocity ``(B, *S)``, ``(B,)``.

    Raises:
        ValueError: it is no integral over the step.
    """
    integrand = _integrand(measure)
    if integrand is None:
        raise ValueError(
            f"measure {name!r} is no integral over time, and gradient='checkpoint' and 'backsolve' keep no steps to "
            "measure: take gradient='direct', or a measure with an integrand, as the action"
        )
    return integrand


def _integrand(measure: Any) -> Callable[..., Tensor] | None:
    options: dict[str, Any] = {}
    while isinstance(measure, partial) and not measure.args:
        measure, options = measure.func, measure.keywords | options
    integrand, options = getattr(measure, "integrand", None), dict(getattr(measure, "options", ())) | options
    return Measure(integrand, options=tuple(sorted(options.items()))) if integrand and options else integrand


def _computed(step: Step, name: str) -> Tensor | None:
    return None if step.reductions is None else step.reductions.get(name)


def _residue(step: Step, name: str) -> Tensor:
    value = _computed(step, name)
    if value is None:
        value = finish_step(step.x0, step.stages, step.tableau, step.h, state=False, residue=True)[1][name]
    return value


def _mean_power(v: Tensor, p: float = 2.0) -> Tensor:
    return power_mean(v, p)


@measure(closing=False, reduction="action", integrand=_mean_power)
def action(step: Step, p: float = 2.0) -> Tensor:
    """Kinetic action ``h sum_i b_i <|p_i|^p>``, ``<.>`` the mean over features, ``(B,)``.

    With p = 2, the energy, it is the quadrature of ``int <v^2> dt`` over the step with the tableau's own weights; for
    Euler with h = 1 it is the transport cost as computed in [K24], ``<r^2>``: the cost ``|r|^2`` of its section 3
    over the dimension of the state (with another p, ``|r|_p^p`` over it). A weight ``1 / (2 tau)`` on it is thus a
    proximal step of size ``tau`` times the dimension; :func:`square_norm` is the cost without the mean. For another
    exponent record ``action.bind(p=...)``.
    """
    if p != 2:
        pairs = zip(step.tableau.b, step.stages, strict=False)
        powers: Tensor = sum(b * power_mean(stage, p) for b, stage in pairs if b)  # type: ignore[assignment]  # never 0
        return step_size(step) * powers
    value = _computed(step, "action")
    return weighted_action(step.stages, step.tableau.b, step.h) if value is None else value


@measure(closing=False, reduction="residue")
def residue(step: Step, p: float = 2.0) -> Tensor:
    """Mean over the features of ``|r|^p`` with the residue ``r = (x1 - x0) / h``, ``(B,)``.

    Its mean square with p = 2 [K24, eq. 34], the square of its norm over the dimension.
    """
    return _residue(step, "residue") if p == 2 else power_mean(wide_residue(step), p)


def step_size(step: Step) -> float | Tensor:
    """A number, or one per sample, ``(B,)``: what a measure multiplies numbers of samples by."""
    if not isinstance(step.h, Tensor):
        return step.h
    return step.h.to(step.x0.device, torch.promote_types(step.x0.dtype, torch.float32)).reshape(-1)


def wide_residue(step: Step) -> Tensor:
    """The residue in float32 or wider, in which the stages are added up, ``(B, *S)``."""
    dtype = torch.promote_types(step.x0.dtype, torch.float32)
    return step._replace(stages=tuple(p.to(dtype) for p in step.stages)).residue


@measure(closing=False, reduction="residue")
def square_norm(step: Step) -> Tensor:
    """Sum of the squares of the residue over the features, ``(B,)``."""
    return residue(step) * math.prod(step.x0.shape[1:])


@measure(closing=False, reduction="residue")
def cosine(step: Step) -> Tensor:
    """Cosine of the residue with the vector of ones, ``(B,)`` (last features of [K24, eq. 34]); 0 where r = 0."""
    return _residue(step, "cosine")


@measure(reduction="error")
def error(step: Step) -> Tensor:
    """Root mean square over the features of the embedded error, ``(B,)``.

    Raises:
        ValueError: the method has no embedded lower order, or the closing stage was not evaluated.
    """
    value = _computed(step, "error")
    if value is None:
        weights = step.error_weights()
        value = weighted_root_mean_square(step.stages, weights, step.h)
    return value


@measure(closing=False)
def displacement(step: Step) -> Tensor:
    """Root mean square over the features of the displacement ``x1 - x0 = h r``, ``(B,)``."""
    return weighted_root_mean_square(step.stages, step.tableau.b, step.h)
