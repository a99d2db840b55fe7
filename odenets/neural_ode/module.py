"""NeuralODE: one velocity field, integrated by the solvers of :mod:`solvers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets.blocks import check_arguments
from odenets.errors import refuse
from odenets.measures import StepFunction, needs_closing
from odenets.measures.marking import check_named
from odenets.neural_ode.inputs import (
    SETTINGS,
    check_event,
    check_field,
    check_measured,
    check_mixing,
    is_times,
    owner_of,
    time_of,
)
from odenets.neural_ode.records import measure_beside, records_of
from odenets.normalization.mixing import warn_of_mixed_statistics
from odenets.observing import observed, observed_steps
from odenets.recording import Records, measure_steps
from odenets.schemes.names import method_of
from solvers import (
    ButcherTableau,
    Controller,
    I,
    LearnedTableau,
    Reversible,
    SemiLinear,
    Separable,
    Solution,
    Statistics,
    Step,
    Tolerance,
    integrate,
)  # fmt: skip
from solvers.batch_loop import adaptive_steps, fixed_steps
from solvers.coefficients import as_numbers_or_tensors
from solvers.learned import check_gradient
from solvers.packing import Packing
from solvers.solve import even_grid
from solvers.structured import BoundField, check_structure, part_of

__all__ = ["NeuralODE"]

Event = Callable[..., Tensor]
Time = float | Tensor


class NeuralODE(nn.Module):
    """The flow of one velocity field over ``[t0, t1]`` (Chen et al. 2018), a :class:`~odenets.Recorder`.

    Args:
        field: the velocity ``v(t, x, *args)``: a module, a method of one, or a function without parameters. Its t is a
            number, or with ``control="sample"`` a tensor ``(B, 1, ..., 1)``, which ``torch.where(t < 0.5, a, b)`` and
            ``t.expand_as(x[:, :1])`` take, and ``if t < 0.5`` and ``torch.full_like`` do not. It may use autograd
            inside, on a state that requires a gradient. One that draws random numbers is another field at each call:
            what it draws is better drawn once and handed over after x. Dropout in training mode is refused where the
            field is called again, by "backsolve", and by "checkpoint" where the error chooses the steps; with fixed
            steps "checkpoint" draws the same again. So is by both one whose buffers change its velocity: spectral norm
            in training mode.
        solver: name of a method, a tableau, or a :class:`~solvers.LearnedTableau`, which trains with the field.
        tolerance: error control, ``Tolerance()`` if neither this nor ``steps`` is given.
        steps: that many equal steps instead.
        t0, t1: start and end, t1 may lie before t0; with ``control="sample"`` also ``(B,)``. They are numbers of the
            host, whatever the device, and no part of the state_dict.
        gradient: "direct", through the steps; "checkpoint", the same by computing the steps again; "backsolve", the
            adjoint ODE with constant memory; "reversible" or :class:`solvers.Reversible`, through the steps of a
            reversible pair, with constant memory, of fields that do not contract for long: another solution than the
            others have, also without gradients, and told as such where weights are loaded. See
            :func:`solvers.integrate`.
        control: "batch", one step size for the batch, or "sample", one for each sample, as if it were alone: batch
            norm in training mode, which reads the others, is refused.
        controller: step-size rule of error control.
        event: ``(t, x)`` to a tensor: the solve ends where an entry changes sign for the first time, or at t0 where one
            is 0 there: a ball that is thrown from the ground has landed. A module or a method of one where it has
            parameters.
        graph: whether a pass is one graph of torch, loop and all, in the caller's ``torch.compile`` or compiled at the
            first pass, which takes some seconds: see :func:`solvers.integrate`. Where steps are measured or kept they
            are those of the loop outside of it.

    Attributes:
        statistics: counts of the last pass; tensors in a caller's graph.

    Raises:
        ValueError, TypeError: arguments that are out of range or exclude each other; a function that reads modules or
            parameters, which would not train.

    >>> import torch, odenets
    >>> ode = NeuralODE(odenets.MLPField(2), tolerance=Tolerance(rtol=1e-4), control="sample")
    >>> x = torch.randn(5, 2)
    >>> ode(x).shape
    torch.Size([5, 2])
    >>> at = torch.tensor([[0.2, 0.5, 0.9], [0.1, 0.4, 0.4], [0.0, 2.0, 3.0]])
    >>> ode(x[:3], at=at).shape  # three times of each sample, or fewer and the last again
    torch.Size([3, 3, 2])
    """

    def __init__(
        self,
        field: nn.Module | Callable[..., Any],
        *,
        solver: str | ButcherTableau | LearnedTableau = "dopri5",
        tolerance: Tolerance | None = None,
        steps: int | None = None,
        t0: Time = 0.0,
        t1: Time = 1.0,
        gradient: Literal["direct", "checkpoint", "backsolve", "reversible"] | Reversible = "direct",
        control: Literal["batch", "sample"] = "batch",
        controller: Controller | None = None,
        event: Event | None = None,
        graph: bool | Literal["auto"] = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse("NeuralODE", unknown, SETTINGS)
        check_field(field)
        if event is not None:
            check_event(event)
        self.field, self.event = field, event
        self.owner, owner = owner_of(field), owner_of(event)  # whose parameters train
        self.event_owner = None if owner in {*self.modules()} else owner
        self.tableau = method_of(solver)
        self.tolerance, self.fixed_steps, self.controller = tolerance, steps, controller
        self.t0, self.t1, self.gradient, self.control = time_of("t0", t0), time_of("t1", t1), gradient, control
        self.graph = graph
        self.statistics = Statistics()
        self._warned = False  # of statistics that all evaluations share
        self._args: int | None = None  # how many the field is known to take
        self._check_settings()

    def _check_settings(self) -> None:
        """Raise here what a solve would raise: one of a state that stands still, in no time."""
        each = next((t.shape for t in (self.t0, self.t1) if isinstance(t, Tensor)), torch.Size([1]))
        undone = self.gradient == "reversible" or isinstance(self.gradient, Reversible)  # which finds no event
        options: dict[str, Any] = self._options("last") | {"event": self.event if undone else None}
        if isinstance(self.tolerance, Tolerance):
            options["tolerance"] = Tolerance()  # its tensors are of the shape of a state
        if self.graph is not False:
            from solvers.graph.compilation import check_graph  # the compiler takes seconds to load

            check_graph(
                self.graph, None, steps=self.fixed_steps, event=self.event, keep="last", gradient=self.gradient,
                controller=self.controller or I(), tableau=self.tableau, at=None,
            )  # fmt: skip
        options |= {"graph": False}
        rest: Any = lambda t, x: torch.zeros_like(x)  # noqa: E731
        if self.tableau.structure:
            check_structure(self.tableau, self.field)
            rest = Separable(rest, rest) if self.tableau.structure == "separable" else SemiLinear(torch.zeros(2), rest)
        with torch.no_grad():
            integrate(rest, torch.ones(*each, 2), self.t0, self.t1, **options)
        check_gradient(self.tableau, self.gradient if isinstance(self.gradient, str) else "reversible")

    def _options(self, keep: str) -> dict[str, Any]:
        plain = self.owner is None and not isinstance(self.field, nn.Module)
        return {
            "solver": self.tableau, "steps": self.fixed_steps, "tolerance": self.tolerance,
            "controller": self.controller, "control": self.control, "gradient": self.gradient, "event": self.event,
            "keep": keep, "parameters": () if plain else None, "graph": False if keep == "steps" else self.graph,
        }  # fmt: skip

    @property
    def depth(self) -> int:
        """Number of steps if they are fixed; 1, the field, where their error chooses them."""
        return self.fixed_steps or 1

    @property
    def h(self) -> tuple[float, ...]:
        """Size of each fixed step; the longest time that is solved where their error chooses them."""
        t0, t1 = (torch.as_tensor(t, dtype=torch.float64) for t in (self.t0, self.t1))
        return ((t1 - t0).abs().max().item() / self.depth,) * self.depth

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each fixed step, as records have it; "all steps", one, where their error chooses them."""
        return ("all steps",) if self.fixed_steps is None else tuple(f"step {m}" for m in range(self.fixed_steps))

    @property
    def evaluations(self) -> int:
        """Field evaluations of the last forward pass."""
        return self.statistics.evaluations

    def forward(self, x: Any, /, *args: Any, at: Any = None, **unknown: Any) -> Any:
        """The state at t1, or at the event, as ``x``; or those at chosen times.

        Args:
            x: state at t0, ``(B, *S)``, or a tuple or dictionary of such.
            args: what the field takes besides.
            at: times from t0 on, ``(n,)``, to states ``(n, B, *S)``; with ``control="sample"`` also ``(B, n)``, those
                of each sample, to ``(B, n, *S)``, where a sample with fewer times repeats its last one. The last time
                takes the place of t1; behind an event states are NaN. With ``gradient="direct"`` gradients flow to the
                times. In a graph of ``torch.compile`` a list of floats.

        Returns:
            The state as ``x``, or with ``at`` the states.

        Raises:
            SolverError, ValueError, TypeError: as :func:`solvers.integrate` raises; a field that takes no such args.
        """
        refuse("a call of a NeuralODE", unknown, dict.fromkeys(("t", "ts", "times", "t_eval"), "at"))
        return self.record(x, *args, at=at)[0]

    def solution(self, x: Any, /, *args: Any, at: Any = None) -> Solution:
        """The whole result of :func:`solvers.integrate`: status, event time, counts.

        With ``gradient="direct"`` it keeps the steps, and ``solution(t)`` is the state at any time. The arguments
        ``x``, ``args`` and ``at`` and what is raised are those of :meth:`forward`.
        """
        return self._solution(x, *args, at=at)[0]

    @observed
    def _solution(self, x: Any, /, *args: Any, at: Any, **measures: StepFunction) -> tuple[Solution, Records]:
        if measures:
            check_measured(x, finite=False)
            if not self._keeps_steps:
                raise ValueError(
                    "solution(x) of a neural ODE is measured with gradient='direct' and no event: call ode(x), beside "
                    "whose state measures are integrated"
                )
        keep = "last" if at is None else "states"
        solution = self._solve(x, args, at, "steps" if self.gradient == "direct" else keep)
        return solution, records_of(solution, x, measures) if measures else Records({})

    def _solve(self, x: Any, args: Sequence[Any], at: Any, keep: str) -> Solution:
        self._check_call(args)
        end = self.t1 if at is None else None
        solution = integrate(self.field, x, self.t0, end, at=at, args=args, **self._options(keep))
        self.statistics = solution.stats
        return solution

    def _check_call(self, args: Sequence[Any]) -> None:
        if self.control == "sample":
            check_mixing(self.field)
        if self.training and not self._warned and not torch.compiler.is_compiling():
            warn_of_mixed_statistics(
                self, "is evaluated many times", "Take nn.GroupNorm, or norm='group' or 'layer'", by_stage=False
            )
            self._warned = True
        if self._args == len(args) or torch.compiler.is_compiling():
            return
        try:
            check_arguments(self.field, args)
            self._args = len(args)
        except TypeError as error:
            hint = "; output times are named: ode(x, at=times)" if len(args) == 1 and is_times(args[0]) else ""
            raise TypeError(f"{error}{hint}") from None

    @observed
    def record(
        self, x: Any, /, *args: Any, at: Any = None, check: bool = True, **measures: StepFunction
    ) -> tuple[Any, Records]:
        """The state at t1 and, per measure, ``(steps, B)`` of the steps as they are taken.

        With ``control="sample"`` row k holds the k-th round of steps, and 0 for samples that take none in it. Where no
        steps are kept, with another gradient than "direct" or with an event, a measure that is an integral over time,
        such as the action, is integrated beside the state, whose steps it does not change: ``(1, B)``.

        Args:
            x, args, at: as in :meth:`forward`; ``(B, *S)`` where something is measured.
            check: False does not look at x, so that a network that diverges can be measured.
            measures: functions ``Step -> (B,)`` by name.

        Returns:
            The state at t1, or at the event, or those at the times ``at``, and the records.

        Raises:
            TypeError, ValueError: x is no batch of states, a measure that does not return ``(B,)``, or one that is no
                integral where no steps are kept.
        """
        check_named(args, check)
        if not measures:
            solution = self._solve(x, args, at, "last" if at is None else "states")
            return solution.x1 if at is None else solution.states, Records({})
        for name, measure in measures.items():
            if not callable(measure):
                raise TypeError(
                    f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}: what the field "
                    "takes besides follows x, record(x, c)"
                )
        check_measured(x, finite=check)
        if not self._keeps_steps:
            self._check_call(args)
            t1, options = self.t1 if at is None else None, self._options("last") | {"at": at, "args": args}
            output, records, self.statistics = measure_beside(self.field, x, self.t0, t1, measures, options)
            return output, records
        if self.control == "sample" or at is not None:
            solution = self._solve(x, args, at, "steps")
            return solution.x1 if at is None else solution.states, records_of(solution, x, measures)
        if self.t0 == self.t1:
            return x, Records({name: x.real.new_zeros(0, len(x)) for name in measures})
        last, records = measure_steps(self._steps(x, args, any(map(needs_closing, measures.values()))), x, measures)
        return last.x1, records

    @observed_steps
    def steps(self, x: Tensor, *args: Any, closing: bool = True, check: bool = True) -> Iterator[Step]:
        """Every step from ``x`` at t0 on.

        Args:
            x, args: as in :meth:`forward`, ``(B, *S)``.
            closing: False leaves the closing stage of fixed steps away.
            check: as in :meth:`record`.

        Returns:
            The steps, each taken when it is asked for.

        Raises:
            ValueError: no steps are kept, or each sample has steps of its own.
            TypeError: x is no tensor, or the field takes no such args.
        """
        if not self._keeps_steps or self.control == "sample":
            raise ValueError(
                "steps are those of the batch: a neural ODE has them with gradient='direct', control='batch' and no "
                "event; solution(x).steps are those with control='sample'"
            )
        check_measured(x, finite=check)
        return self._steps(x, args, closing)

    def _steps(self, x: Tensor, args: Sequence[Any], closing: bool) -> Iterator[Step]:
        self._check_call(args)
        field: Any = (lambda t, x: self.field(t, x, *args)) if args else self.field
        if self.tableau.structure:
            field = BoundField(self.tableau.structure, part_of(self.field), Packing(x), args)
        t0, t1, self.statistics = float(self.t0), float(self.t1), Statistics()
        if self.fixed_steps is not None:
            times = even_grid(t0, t1, self.fixed_steps).times
            tableau = as_numbers_or_tensors(self.tableau, x)
            return fixed_steps(field, x, times, tableau, closing=closing, stats=self.statistics)
        return adaptive_steps(
            field, x, t0=t0, t1=t1, tableau=self.tableau, tolerance=self.tolerance or Tolerance(),
            controller=self.controller or I(), stats=self.statistics,
        )  # fmt: skip

    @property
    def _keeps_steps(self) -> bool:
        """Whether a solve has steps that can be measured."""
        return self.gradient == "direct" and self.event is None

    def outputs(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """None beside the solution: embedded outputs are those of the last block of a :class:`~odenets.Flow`.

        Raises:
            ValueError: always.
        """
        raise ValueError("a neural ODE has one output, forward's: outputs and their ensemble are those of a Flow")

    def part(self, first: int, last: int) -> NeuralODE:
        """Itself, from ``first`` to ``last`` of all its steps, for one field has no parts.

        Raises:
            ValueError: others than all steps.
        """
        if (first, last) != (0, self.depth):
            raise ValueError(f"a neural ODE has no parts, which would share its field, got {first} to {last}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What it computes with beside the modules in it, by name, from which its fingerprint is taken."""
        field, event = (
            getattr(f, "__qualname__", None) if isinstance(f, nn.Module) or owner_of(f) is not None else f
            for f in (self.field, self.event)
        )
        tolerance = (self.tolerance or Tolerance()) if self.fixed_steps is None else None
        method: Any = self.tableau
        tableau = method.settings if isinstance(method, LearnedTableau) else method  # whose coefficients are weights
        return {
            "field": field, "event": event, "tableau": tableau, "tolerance": tolerance, "steps": self.fixed_steps,
            "controller": self.controller or I(), "t0": self.t0, "t1": self.t1, "gradient": self.gradient,
            "control": self.control,
        }  # fmt: skip

    def extra_repr(self) -> str:
        """The method and the settings of the solve, as ``print`` shows them."""
        steps = f"steps={self.fixed_steps}" if self.fixed_steps else f"{self.tolerance or Tolerance()}"
        controller = "" if self.controller is None else f", controller={self.controller}"
        t0, t1 = (f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else t for t in (self.t0, self.t1))
        return (
            f"solver={self.tableau.name}, {steps}{controller}, t0={t0}, t1={t1}, gradient={self.gradient}, "
            f"control={self.control}"
        )
