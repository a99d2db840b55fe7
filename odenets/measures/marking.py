"""What a measure reads of a step: plain functions, and those that :func:`measure` marks, which can be composed."""

from __future__ import annotations

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

from solvers import Step

__all__ = [
    "Measure", "StepFunction", "check_named", "integrand_of", "measure", "needs_closing", "needs_gradient",
    "reductions_of",
]  # fmt: skip

StepFunction = Callable[[Step], Tensor]
"""A measure, be it a :class:`Measure` or a plain function, from a step to one number per sample, ``(B,)``."""


def _operators(function: Callable[..., Any]) -> tuple[Callable[[Any, Any], Measure], Callable[[Any, Any], Measure]]:
    return lambda one, other: _composed(function, one, other), lambda one, other: _composed(function, other, one)


@dataclass(frozen=True)
class Measure:
    """A measure and what it reads of a step; :func:`measure` makes one of a function.

    Measures are added, subtracted, multiplied and divided, with each other and with numbers, and mapped. They are
    frozen, equal where they compute the same, and pickled by the name under which a module holds them.

    >>> import torch, odenets
    >>> from odenets.measures import action, error
    >>> flow = odenets.Flow(depth=2)
    >>> cost, speed = action + 0.1 * error, action.map(torch.sqrt)
    >>> _, records = flow.record(torch.randn(4, 3), cost=cost, speed=speed)
    >>> records["cost"].shape
    torch.Size([2, 4])

    Attributes:
        function: a step, and options by name, to ``(B,)``.
        closing: whether it may read the closing stage of an FSAL method; it is called with steps without one if not.
        reductions: what it reads of ``step.reductions``, if that is there: "error", "action", "residue".
        integrand: a velocity ``(B, *S)``, and the same options, to ``(B,)``, where the measure of a step is the
            integral of that over the step, so that a solve that keeps no steps can integrate it beside the state. Sums
            of such measures and their products with numbers have one.
        gradient: whether it differentiates the step in its state x0, which :func:`odenets.recording.record` sees to.
        options: bound by :meth:`bind`, name and value.
    """

    function: Callable[..., Tensor]
    closing: bool = True
    reductions: frozenset[str] = frozenset()
    integrand: Callable[..., Tensor] | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())
    gradient: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.function, _Composed):  # help() and IPython's ? show what the measure is
            object.__setattr__(self, "__doc__", self.function.__doc__)

    __array_ufunc__ = None  # numbers of NumPy leave operators to it

    def __call__(self, step: Step, **options: Any) -> Tensor:
        """The measure of a ``step``, one number per sample, ``(B,)``; ``options`` take the place of those bound.

        Raises:
            TypeError: no step, nor a velocity, which an integrand takes.
        """
        if not hasattr(step, "stages") and not isinstance(step, Tensor):
            raise TypeError(
                f"a measure is called with a Step, got {type(step).__name__}: record(x, {self.name}={self.name}) "
                f"measures all steps, and {self.name}.bind(p=3) sets an option"
            )
        if not self.closing and len(step.stages) > step.tableau.interior:  # evaluated for others: it is not to be read
            stages, tableau = step.stages[: step.tableau.interior], step.tableau
            step = Step(step.t, step.h, step.x0, step.x1, stages, tableau, step.reductions)
        return self.function(step, **(dict(self.options) | options))

    @property
    def name(self) -> str:
        """The name of its function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def bind(self, **options: Any) -> Self:
        """The same measure with other ``options``, such as ``action.bind(p=3)``; it is computed from the stages.

        Raises:
            TypeError: a composed measure, which has none.
        """
        if not options:
            return self
        if isinstance(self.function, _Composed):
            raise TypeError(f"a composed measure takes no {', '.join(options)}: bind options to its parts before")
        return replace(self, options=tuple(sorted((dict(self.options) | options).items())), reductions=frozenset())

    def map(self, function: Callable[[Tensor], Tensor]) -> Measure:
        """A ``function`` of the measure, ``(B,)`` to ``(B,)``, such as ``action.map(torch.sqrt)``."""
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
    gradient = any(map(needs_gradient, measures))
    return Measure(_Composed(function, operands), closing, read, _linear(function, operands), gradient=gradient)


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
    gradient: bool = False,
) -> Any:
    """Make a :class:`Measure` of a function ``Step -> (B,)``, as a decorator; a measure stays as it is.

    Args:
        function: the function; with options it is a decorator of it.
        closing: False says that it does not read the closing stage of an FSAL method: none is evaluated for it, and
            ``step.stages`` lacks one that is evaluated for another measure.
        reduction: what it reads of ``step.reductions``, "error", "action" or "residue", where that is not None.
        integrand: what the measure integrates over a step, see :class:`Measure`.
        gradient: whether it differentiates the step in its state x0.

    Returns:
        The measure, or the decorator where no function is given.

    Raises:
        TypeError: no function.
        ValueError: an unknown reduction.

    >>> @measure(closing=False)
    ... def farthest(step):
    ...     return (step.x1 - step.x0).abs().amax(1)
    >>> farthest.name, farthest.closing
    ('farthest', False)
    """
    if reduction not in (None, "error", "action", "residue"):
        raise ValueError(f"reduction must be 'error', 'action' or 'residue', got {reduction!r}")
    if function is None:
        read = frozenset([reduction] if reduction else ())
        return partial(Measure, closing=closing, reductions=read, integrand=integrand, gradient=gradient)
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
    """Whether a ``measure`` may read the closing stage of a step, which is evaluated for it then.

    True unless it, or what it is a ``functools.partial`` of, is a :class:`Measure` with ``closing=False``.

    >>> from odenets.measures import action, error
    >>> [needs_closing(one) for one in (action, error, lambda step: step.x1.mean(1))]
    [False, True, True]
    """
    while isinstance(measure, partial):
        measure = measure.func
    return not isinstance(measure, Measure) or measure.closing


def needs_gradient(measure: StepFunction) -> bool:
    """Whether a ``measure`` differentiates a step in its state, as :func:`odenets.measures.jacobian` does.

    >>> from odenets.measures import action, jacobian
    >>> [needs_gradient(one) for one in (action, jacobian, action + 0.1 * jacobian)]
    [False, True, True]
    """
    while isinstance(measure, partial):
        measure = measure.func
    return isinstance(measure, Measure) and measure.gradient


def reductions_of(measures: Iterable[StepFunction]) -> frozenset[str]:
    """The reductions that these ``measures`` read, computed in one pass with a step's state.

    They are the ``reductions`` of :func:`solvers.rk_step`.

    >>> from odenets.measures import action, error
    >>> sorted(reductions_of([action, error]))
    ['action', 'error']
    """
    read = [getattr(measure, "reductions", ()) for measure in measures]
    return frozenset([name for name in ("action", "error", "residue") if any(name in names for names in read)])


def integrand_of(name: str, measure: StepFunction) -> Callable[[Tensor], Tensor]:
    """What a measure integrates over a step, a function of a velocity ``(B, *S)`` to ``(B,)``.

    Args:
        name: of the measure, for the error.
        measure: the measure.

    Returns:
        The function, with the measure's options.

    Raises:
        ValueError: the measure is no integral over the step.

    >>> from odenets.measures import action
    >>> integrand_of("action", action)(torch.full((1, 4), 2.0))
    tensor([4.])
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
