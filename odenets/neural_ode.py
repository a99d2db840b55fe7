"""NeuralODE: one velocity field, integrated by the solvers of :mod:`solvers`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets.blocks import check_arguments
from odenets.measures import StepFunction, integrand_of, needs_closing
from odenets.recording import Records, check_values, measure_steps
from solvers import (
    ButcherTableau,
    Controller,
    I,
    SampleSolution,
    Solution,
    Statistics,
    Step,
    Tolerance,
    get_tableau,
    integrate,
)
from solvers.batch_loop import adaptive_steps, fixed_steps
from solvers.solve import even_grid
from solvers.validation import check_state

__all__ = ["NeuralODE"]

Event = Callable[..., Tensor]
Time = float | Tensor


class NeuralODE(nn.Module):
    """The flow of one velocity field over ``[t0, t1]`` (Chen et al. 2018), a :class:`~odenets.Recorder`.

    Args:
        field: the velocity ``v(t, x, *args)``: a module, a method of one, or a function without parameters. Its t is a
            number, or with ``control="sample"`` a tensor ``(B, 1, ..., 1)``.
        solver: name of a method or a tableau.
        tolerance: error control, ``Tolerance()`` if neither this nor ``steps`` is given.
        steps: that many equal steps instead.
        t0, t1: start and end, t1 may lie before t0; with ``control="sample"`` also ``(B,)``.
        gradient: "direct", through the steps; "checkpoint", the same by computing the steps again; "backsolve", the
            adjoint ODE with constant memory: see :func:`solvers.integrate`.
        control: "batch", one step size for the batch, or "sample", one for each sample, as if it were alone.
        controller: step-size rule of error control.
        event: ``(t, x)`` to a tensor: the solve ends where an entry changes sign for the first time.

    Attributes:
        statistics: counts of the last pass.

    Raises:
        ValueError, TypeError: arguments that are out of range or exclude each other; a function that reads modules or
            parameters, which would not train.

    >>> import torch, odenets
    >>> ode = NeuralODE(odenets.MLPField(2), tolerance=Tolerance(rtol=1e-4))
    >>> x = torch.randn(5, 2)
    >>> ode(x).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        field: nn.Module | Callable[..., Tensor],
        *,
        solver: str | ButcherTableau = "dopri5",
        tolerance: Tolerance | None = None,
        steps: int | None = None,
        t0: Time = 0.0,
        t1: Time = 1.0,
        gradient: Literal["direct", "checkpoint", "backsolve"] = "direct",
        control: Literal["batch", "sample"] = "batch",
        controller: Controller | None = None,
        event: Event | None = None,
    ) -> None:
        super().__init__()
        _check_field(field)
        self.field = field
        self.owner = field.__self__ if isinstance(field, MethodType) else None  # whose parameters train
        self.tableau = get_tableau(solver)
        self.tolerance, self.fixed_steps, self.controller = tolerance, steps, controller
        self.t0, self.t1, self.gradient, self.control, self.event = t0, t1, gradient, control, event
        self.statistics = Statistics()
        self._check_settings()

    def _check_settings(self) -> None:
        """Raise here what a solve would raise: one of a state that stands still, in no time."""
        if self.fixed_steps is None:
            _ = self.tableau.error_order  # raises where the method has no embedded error
        elif not (isinstance(self.fixed_steps, Integral) and self.fixed_steps >= 1) or self.fixed_steps is True:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.fixed_steps!r}")
        each = next((t.shape for t in (self.t0, self.t1) if isinstance(t, Tensor) and t.ndim), torch.Size([1]))
        options: dict[str, Any] = self._options("last") | {"event": _never if callable(self.event) else self.event}
        if isinstance(self.tolerance, Tolerance):
            options["tolerance"] = Tolerance()  # its tensors are of the shape of a state
        with torch.no_grad():
            integrate(lambda t, x: torch.zeros_like(x), torch.ones(*each, 1), self.t0, self.t1, **options)

    def _options(self, keep: str) -> dict[str, Any]:
        return {
            "solver": self.tableau, "steps": self.fixed_steps, "tolerance": self.tolerance,
            "controller": self.controller, "control": self.control, "gradient": self.gradient, "event": self.event,
            "keep": keep,
        }  # fmt: skip

    @property
    def depth(self) -> int:
        """Number of steps if they are fixed; 1, the field, where their error chooses them."""
        return self.fixed_steps or 1

    @property
    def h(self) -> tuple[float, ...]:
        """Their size; the longest time that is solved where their error chooses them."""
        total = torch.as_tensor(self.t1, dtype=torch.float64) - torch.as_tensor(self.t0, dtype=torch.float64)
        return (total.abs().max().item() / self.depth,) * self.depth

    @property
    def evaluations(self) -> int:
        """Field evaluations of the last forward pass."""
        return self.statistics.evaluations

    def evaluations_per_pass(self, *, closing: bool = False, readout: str = "solution") -> int:
        """The same, whatever is read."""
        return self.evaluations

    def forward(self, x: Any, /, *args: Any, at: Any = None) -> Any:
        """The state at t1, or at the event, as ``x``; or those at chosen times.

        Args:
            x: state at t0, ``(B, *S)``, or a tuple or dictionary of such.
            args: what the field takes besides.
            at: times from t0 on, ``(n,)``, to states ``(n, B, *S)``; with ``control="sample"`` also ``(B, n)``, those
                of each sample, to ``(B, n, *S)``. The last one takes the place of t1.

        Raises:
            SolverError, ValueError, TypeError: as :func:`solvers.integrate` raises; a field that takes no such args.
        """
        solution = self._solve(x, args, at, "last")
        return solution.x1 if at is None else solution.states

    def solution(self, x: Any, /, *args: Any, at: Any = None) -> Solution:
        """The whole result of :func:`solvers.integrate`: status, event time, counts; arguments as :meth:`forward`'s.

        With ``gradient="direct"`` and no ``at`` it keeps the steps, and ``solution(t)`` is the state at any time.
        """
        return self._solve(x, args, at, "steps" if at is None and self.gradient == "direct" else "last")

    def _solve(self, x: Any, args: Sequence[Any], at: Any, keep: str) -> Solution:
        check_arguments(self.field, args)
        options = self._options(keep)
        t1 = self.t1
        if at is not None:
            t1 = _last(at)
            options["at"] = at
        solution = integrate(self.field, x, self.t0, t1, args=args, **options)
        self.statistics = solution.stats
        return solution

    def record(
        self, x: Tensor, /, *args: Any, readout: str = "solution", check: bool = True, **measures: StepFunction
    ) -> tuple[Tensor, Records]:
        """The state at t1 and, per measure, ``(steps, B)`` of the steps as they are taken.

        With ``control="sample"`` row k holds the k-th round of steps, and 0 for samples that take none in it. Where no
        steps are kept, with another gradient than "direct" or with an event, a measure that is an integral over time,
        such as the action, is integrated beside the state, whose steps it does not change: ``(1, B)``.

        Args:
            x, args: as in :meth:`forward`, ``(B, *S)``.
            readout: "solution".
            check: False does not look at x, so that a network that diverges can be measured.
            measures: functions ``Step -> (B,)`` by name.

        Raises:
            TypeError, ValueError: x is no batch of states, a measure that does not return ``(B,)``, or one that is no
                integral where no steps are kept.
        """
        if readout != "solution":
            raise ValueError(f"readout must be 'solution' in a neural ODE, which has one output, got {readout!r}")
        if check:
            check_state(x)
        if not measures:
            return self._solve(x, args, None, "last").x1, Records({})
        if self.gradient != "direct" or self.event is not None:
            return self._integrate_beside(x, args, measures)
        if self.control == "sample":
            return _by_sample(self._solve(x, args, None, "steps"), x, measures)
        if self.t0 == self.t1:
            return x, Records({name: x.new_zeros(0, len(x)) for name in measures})
        last, records = measure_steps(self._steps(x, args, any(map(needs_closing, measures.values()))), x, measures)
        return last.x1, records

    def steps(self, x: Tensor, *args: Any, closing: bool = True, check: bool = True) -> Iterator[Step]:
        """Every step from ``x`` at t0 on.

        Args:
            x, args: as in :meth:`forward`, ``(B, *S)``.
            closing: False leaves the closing stage of fixed steps away.
            check: as in :meth:`record`.

        Raises:
            ValueError: no steps are kept, or each sample has steps of its own.
        """
        if self.gradient != "direct" or self.event is not None or self.control == "sample":
            raise ValueError(
                "steps are those of the batch: a neural ODE has them with gradient='direct', control='batch' and no "
                "event; solution(x).steps are those with control='sample'"
            )
        if check:
            check_state(x)
        return self._steps(x, args, closing)

    def _steps(self, x: Tensor, args: Sequence[Any], closing: bool) -> Iterator[Step]:
        check_arguments(self.field, args)
        field = (lambda t, x: self.field(t, x, *args)) if args else self.field
        t0, t1, self.statistics = float(self.t0), float(self.t1), Statistics()
        if self.fixed_steps is not None:
            times = even_grid(t0, t1, self.fixed_steps).times
            return fixed_steps(field, x, times, self.tableau, closing=closing, stats=self.statistics)
        return adaptive_steps(
            field, x, t0=t0, t1=t1, tableau=self.tableau, tolerance=self.tolerance or Tolerance(),
            controller=self.controller or I(), stats=self.statistics,
        )  # fmt: skip

    def _integrate_beside(
        self, x: Tensor, args: Sequence[Any], measures: dict[str, StepFunction]
    ) -> tuple[Tensor, Records]:
        """Measures as further parts of the state, whose error no step is chosen by."""
        check_arguments(self.field, args)
        integrands = [integrand_of(name, measure) for name, measure in measures.items()]
        options = self._options("last")
        if self.fixed_steps is None:
            options["tolerance"] = _of_the_state(self.tolerance or Tolerance(), x, len(measures))
        if (event := self.event) is not None:
            options["event"] = lambda t, state: event(t, state[0])
        start = (x, *(x.new_zeros(len(x)) for _ in measures))
        solution = integrate(_Beside(self.field, integrands), start, self.t0, self.t1, args=args, **options)
        self.statistics = solution.stats
        end, *values = solution.x1
        rows = {name: check_values(name, q, x)[None] for name, q in zip(measures, values, strict=True)}
        return end, Records(rows, blocks=["all steps"])

    def part(self, first: int, last: int) -> NeuralODE:
        """Itself: one field has no parts.

        Raises:
            ValueError: others than all steps.
        """
        if (first, last) != (0, self.depth):
            raise ValueError(f"a neural ODE has no parts, which would share its field, got {first} to {last}")
        return self

    def extra_repr(self) -> str:
        steps = f"steps={self.fixed_steps}" if self.fixed_steps else f"{self.tolerance or Tolerance()}"
        controller = "" if self.controller is None else f", controller={self.controller}"
        return (
            f"solver={self.tableau.name}, {steps}{controller}, t0={self.t0}, t1={self.t1}, gradient={self.gradient}, "
            f"control={self.control}"
        )


class _Beside(nn.Module):
    """The velocity of ``(x, q_1, ...)``, where ``dq_i/dt`` is an integrand of that of x."""

    def __init__(self, field: Any, integrands: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.field, self.integrands = field, integrands

    def forward(self, t: Any, state: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
        v = self.field(t, state[0], *args)
        return (v, *(integrand(v).to(v.dtype) for integrand in self.integrands))


def _of_the_state(tolerance: Tolerance, x: Tensor, further: int) -> Tolerance:
    """A tolerance of ``(x, q_1, ...)`` packed into ``(B, N)`` that looks at the error of x alone."""

    def norm(scaled: Tensor) -> Tensor:
        return tolerance.size(scaled[..., :-further].reshape(*scaled.shape[:-1], *x.shape[1:]))

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wide = value.expand(x.shape if value.ndim == x.ndim else (1, *x.shape[1:])).flatten(1)
        return torch.cat([wide, wide.new_ones(len(wide), further)], 1)

    return replace(tolerance, rtol=widened(tolerance.rtol), atol=widened(tolerance.atol), norm=norm)


def _by_sample(solution: Solution, x: Tensor, measures: dict[str, StepFunction]) -> tuple[Tensor, Records]:
    """Records of steps that each sample has of its own."""
    assert isinstance(solution, SampleSolution)
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step, samples in zip(solution.steps, solution.samples, strict=True):
        samples = samples.to(x.device)
        for name, measure in measures.items():
            values = check_values(name, measure(step), step.x0)
            rows[name].append(values.new_zeros(len(x)).index_copy(0, samples, values))
    return solution.x1, Records({name: torch.stack(values) for name, values in rows.items()})


def _last(at: Any) -> Any:
    """The last of the times, or of each sample's."""
    times = at.detach() if isinstance(at, Tensor) else torch.as_tensor(at, dtype=torch.float64)
    if not times.numel():
        raise ValueError("at must hold at least one time, got none")
    return times[..., -1] if times.ndim else times


def _never(t: Any, x: Tensor) -> Tensor:
    return x.real.flatten(1).sum(1) + 1 if x.ndim > 1 else x.real + 1


def _check_field(field: Any) -> None:
    """That a field is a velocity whose parameters are seen.

    Raises:
        TypeError: no function of t and x, or a function that reads modules or parameters.
    """
    if isinstance(field, nn.Module) or (isinstance(field, MethodType) and isinstance(field.__self__, nn.Module)):
        check_arguments(field, None)
        return
    if not callable(field) or isinstance(field, type):
        raise TypeError(f"field must be a velocity v(t, x), a module or a function, got {field!r:.80}")
    check_arguments(field, None)
    if inspect.isfunction(field):
        read = inspect.getclosurevars(field)
        for name, value in {**read.globals, **read.nonlocals}.items():
            if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad):
                raise TypeError(
                    f"field must be a module where it reads one: a function hides {name!r}, whose parameters no "
                    "optimizer would see; put the function into the forward of a module that holds it"
                )
