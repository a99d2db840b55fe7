"""Step-size controllers: pure rules from a state and an error to the next state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

__all__ = [
    "PI", "PID", "Controller", "ControllerState", "Fixed", "HalveDouble", "I", "SampleController", "SampleStates",
    "check_returned", "namespace",
]  # fmt: skip

Array = np.ndarray


class ControllerState(NamedTuple):
    """What a controller remembers between attempted steps.

    Attributes:
        h: size (a magnitude) of the next step to attempt.
        accepted: whether the last attempted step was accepted.
        errors: error ratios of the last two accepted steps, newest first.
    """

    h: float
    accepted: bool = True
    errors: tuple[float, float] = (1.0, 1.0)


class Controller(Protocol):
    """A step-size rule: a function from the state before a step and the step's error to the state behind it.

    Any function of this signature serves, without inheriting from this class:

    >>> import torch
    >>> from solvers import integrate
    >>> def keep_or_halve(state, error, order):
    ...     good = error <= 1
    ...     return state._replace(h=state.h if good else state.h / 2, accepted=good)
    >>> x0 = torch.ones(1, 1)
    >>> solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, controller=keep_or_halve)
    >>> round(solution.x1.item(), 3)
    0.368
    """

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        """The state after a step of size ``state.h``.

        Args:
            state: the state before.
            error: embedded error over its tolerance; the step is good if it is at most 1, NaN counts as too large.
            order: order q of the lower solution: where the field is smooth the error is ``O(h^(q+1))``.

        Returns:
            The size to attempt next, ``h >= 0``, and whether the step is accepted. A negative or NaN size raises, and
            so does a step that is accepted and not finite; ``Tolerance(max_steps=...)`` bounds the attempts.
        """
        ...


class SampleStates(NamedTuple):
    """:class:`ControllerState` of every sample, in arrays.

    Attributes:
        h: sizes (magnitudes) of the next steps to attempt, ``(B,)``.
        accepted: whether the last attempted step of each sample was accepted, ``(B,)``.
        errors: error ratios of the last two accepted steps of each sample, newest first, each ``(B,)``.
    """

    h: Array
    accepted: Array
    errors: tuple[Array, Array]


@runtime_checkable
class SampleController(Protocol):
    """A :class:`Controller` that also serves many samples at once, each as if it were alone.

    ``integrate(..., control="sample")`` needs one, and ``graph=True`` one that takes tensors in the place of arrays,
    of any shape; all controllers of this package are both.
    """

    def each(self, states: SampleStates, error: Array, order: int) -> SampleStates:
        """The states after a step of each sample, equal to what a call finds for them one by one.

        Args:
            states: the states before.
            error: embedded error over its tolerance, ``(B,)``.
            order: order q of the lower solution.

        Returns:
            The sizes to attempt next and which steps are accepted, as of :meth:`Controller.__call__`.
        """
        ...


def check_returned(state: Any, kind: type, controller: Any) -> None:
    """Whether a controller returned a state.

    Raises:
        TypeError: it did not.
    """
    if not isinstance(state, kind):
        name = "SampleStates" if kind is SampleStates else "a ControllerState"
        raise TypeError(f"controller must return {name}, got {type(state).__name__} from {controller!r:.80}")


@dataclass(frozen=True)
class Fixed:
    """Accept every step and keep its size; one that holds NaN or infinity ends the solve.

    The size is ``Tolerance(first_step=...)``. For steps of one size ``integrate(..., steps=n)`` is the faster way: it
    computes no error and does not wait for the device.

    >>> import torch
    >>> from solvers import Tolerance, integrate
    >>> x0, size = torch.ones(1, 1), Tolerance(first_step=0.25)
    >>> solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, controller=Fixed(), tolerance=size)
    >>> solution.stats.accepted
    4
    """

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        """The ``state`` with its step accepted, whatever ``error`` and ``order``."""
        return state._replace(accepted=True)

    def each(self, states: SampleStates, error: Array, order: int) -> SampleStates:
        """The ``states`` with every step accepted, whatever ``error`` and ``order``."""
        return states._replace(accepted=namespace(error).ones_like(states.accepted))


@dataclass(frozen=True)
class HalveDouble:
    """Halve h if the error exceeds 1, double it if it is below 1/K ([K24, appendix A.3]; Quarteroni et al. 2007).

    Attributes:
        K: 8 for BS23, since doubling h multiplies its error by 8 where the field is smooth: a smaller K oscillates. On
            fields with kinks it multiplies it by less, 5.5 to 5.8 on the ReLU fields of ``ConvField`` at their first
            weights, and K = 8 only keeps h a little longer.

    Raises:
        ValueError: K is not greater than 1.

    >>> rule = HalveDouble()
    >>> [rule(ControllerState(h=0.1), error, order=2).h for error in (0.1, 0.5, 2.0)]
    [0.2, 0.1, 0.05]
    """

    K: float = 8.0

    def __post_init__(self) -> None:
        if not self.K > 1:
            raise ValueError(f"K must be greater than 1, got {self.K}")

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        """The ``state`` behind a step with this ``error`` ratio, whatever the ``order``; see :class:`Controller`."""
        if not error <= 1:
            return state._replace(h=state.h / 2, accepted=False)
        h = 2 * state.h if error < 1 / self.K else state.h
        return ControllerState(h, True, (error, state.errors[0]))

    def each(self, states: SampleStates, error: Array, order: int) -> SampleStates:
        """The ``states`` behind a step of each sample with ``error`` ratios ``(B,)``, whatever the ``order``."""
        good = error <= 1
        where = namespace(error).where
        h = states.h * where(good, where(error < 1 / self.K, 2.0, 1.0), 0.5)
        return SampleStates(h, good, _remember(states, error, good))


def _remember(states: SampleStates, error: Array, good: Array) -> tuple[Array, Array]:
    where, (last, before) = namespace(error).where, states.errors
    return where(good, error, last), where(good, last, before)


def namespace(values: Any) -> Any:
    """The functions of NumPy for an array, those of torch for a tensor.

    >>> namespace(np.zeros(1)) is np
    True
    """
    return np if isinstance(values, np.ndarray) else torch


@dataclass(frozen=True)
class PID:
    """``h *= safety * e_n^(-b1/k) e_{n-1}^(-b2/k) e_{n-2}^(-b3/k)`` with ``k = q + 1``, within limits.

    Reference: Soderlind, Digital filters in adaptive time-stepping, ACM TOMS 29 (2003); the default coefficients are
    those of Kennedy and Carpenter (2003) as used in ARKODE.

    Attributes:
        beta: the coefficients (b1, b2, b3).
        safety: factor below 1.
        facmin: smallest factor.
        facmax: largest factor; 1 right after a rejection.

    Raises:
        ValueError: a safety outside (0, 1], or factors that are not ``0 < facmin < 1 <= facmax``.

    >>> import torch
    >>> from solvers import integrate
    >>> x0 = torch.ones(1, 1)
    >>> solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, controller=PID(safety=0.8))
    >>> solution.status
    'finished'
    """

    beta: tuple[float, float, float] = (0.58, -0.21, 0.10)
    safety: float = 0.9
    facmin: float = 0.2
    facmax: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety must be in (0, 1], got {self.safety}")
        if not 0 < self.facmin < 1 <= self.facmax:
            raise ValueError(f"need 0 < facmin < 1 <= facmax, got facmin {self.facmin}, facmax {self.facmax}")

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        """The ``state`` behind a step with this ``error`` ratio of lower ``order`` q; see :class:`Controller`."""
        if not math.isfinite(error):
            return state._replace(h=state.h * self.facmin, accepted=False)
        k = order + 1
        if error > 1:  # a rejected step is redone with the elementary rule
            factor = max(self.facmin, self.safety * error ** (-1 / k))
            return state._replace(h=state.h * min(factor, self.safety), accepted=False)
        facmax = self.facmax if state.accepted else 1.0
        if error == 0:
            factor = facmax
        else:
            factor = self.safety
            for beta, e in zip(self.beta, (error, *state.errors), strict=True):
                factor *= max(e, 1e-10) ** (-beta / k) if beta else 1.0
            factor = min(facmax, max(self.facmin, factor))
        return ControllerState(state.h * factor, True, (error, state.errors[0]))

    def each(self, states: SampleStates, error: Array, order: int) -> SampleStates:
        """The ``states`` behind a step of each sample with ``error`` ratios ``(B,)`` of lower ``order`` q."""
        of, good, k = namespace(error), error <= 1, order + 1
        smaller = of.clip(self.safety * of.clip(error, 1e-10, None) ** (-1 / k), self.facmin, self.safety)
        smaller = of.where(of.isfinite(error), smaller, self.facmin)
        factor = of.full_like(error, self.safety)
        for beta, e in zip(self.beta, (error, *states.errors), strict=True):
            if beta:
                factor = factor * of.clip(e, 1e-10, None) ** (-beta / k)
        largest = of.where(states.accepted, self.facmax, of.ones_like(error))
        factor = of.where(error == 0, largest, of.minimum(of.clip(factor, self.facmin, None), largest))
        return SampleStates(states.h * of.where(good, factor, smaller), good, _remember(states, error, good))


@dataclass(frozen=True)
class I(PID):  # noqa: E742 - the field's own name
    """The elementary controller ``h *= safety * e^(-1/(q+1))`` (Hairer, Norsett, Wanner, II.4; SciPy's rule).

    The default of :func:`~solvers.integrate`; limits and errors are those of :class:`PID`.

    >>> state = I()(ControllerState(h=0.1), error=1 / 8, order=2)
    >>> round(state.h, 3), state.accepted
    (0.18, True)
    """

    beta: tuple[float, float, float] = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class PI(PID):
    """PI.4.2 of Soderlind (2003): smoother step sizes than those of :class:`I` where stability limits them.

    Limits and errors are those of :class:`PID`.

    >>> import torch
    >>> from solvers import integrate
    >>> x0, rules = torch.ones(1, 1), (I(), PI())
    >>> elementary, smooth = (
    ...     integrate(lambda t, x: -50 * x, x0, 0.0, 1.0, controller=rule) for rule in rules
    ... )
    >>> smooth.stats.rejected < elementary.stats.rejected
    True
    """

    beta: tuple[float, float, float] = (3 / 5, -1 / 5, 0.0)
