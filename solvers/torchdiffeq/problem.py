"""An initial value problem as torchdiffeq's callers state it: arguments checked, and its steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.batch_loop import adaptive_steps
from solvers.controllers import ControllerState
from solvers.errors import MaxStepsError
from solvers.interpolation import interpolant
from solvers.methods import get_tableau
from solvers.packing import Packing
from solvers.step import Field, Step, rk_step
from solvers.tableaus import ButcherTableau
from solvers.tolerance import Tolerance
from solvers.validation import real_dtype

__all__ = [
    "ADAPTIVE",
    "METHODS",
    "Problem",
    "check_options",
    "error_controlled",
    "inside",
    "largest_rms",
    "linear",
    "make_problem",
    "over_grid",
]

ADAPTIVE = {"bosh3": "bs23", "dopri5": "dopri5", "tsit5": "tsit5", "fehlberg2": "fehlberg2", "adaptive_heun": "heun"}
FIXED = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "heun3": "heun3", "rk4": "rk4", "rk4_38": "rk4_38"}
METHODS = (*ADAPTIVE, *FIXED)
MAX_NUM_STEPS = 100_000

_ADAPTIVE_OPTIONS = {"norm", "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor"}
_ADAPTIVE_OPTIONS |= {"max_num_steps", "jump_t", "step_t", "dtype"}
_FIXED_OPTIONS = {"step_size", "grid_constructor", "perturb", "interp"}


@dataclass(frozen=True)
class _Rule:
    """The step-size rule of torchdiffeq: elementary, never shrinking after an accepted step."""

    safety: float
    ifactor: float
    dfactor: float

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        if not math.isfinite(error):
            return state._replace(h=state.h * self.dfactor, accepted=False)
        if error == 0:
            return ControllerState(state.h * self.ifactor, True)
        factor = max(self.safety * error ** (-1 / (order + 1)), 1.0 if error < 1 else self.dfactor)
        return ControllerState(state.h * min(self.ifactor, factor), error <= 1)


class Problem(NamedTuple):
    """A checked initial value problem on one tensor.

    Attributes:
        field: velocity ``v(t, x)``, for times as numbers.
        x0: the first state.
        times: the output times as numbers; in a graph of torch.compile as tensors.
        t: the output times as given, on the state's device.
        packing: how states are laid out.
        tableau: the method.
        adaptive: whether it chooses its steps.
        options: checked.
        tolerance: of an adaptive method.
        observe: calls the callbacks of the field, or None.
        time_dtype: of tensors that hold a time; numbers are float64.
    """

    field: Field
    x0: Tensor
    times: list[Any]
    t: Tensor
    packing: Packing
    tableau: ButcherTableau
    adaptive: bool
    options: dict[str, Any]
    tolerance: Tolerance
    observe: Callable[[str, float, Tensor, float], None] | None
    time_dtype: torch.dtype

    @property
    def direction(self) -> int:
        """1 forward in time, -1 backward."""
        return -1 if len(self.times) > 1 and self.times[1] < self.times[0] else 1


def make_problem(
    func: Any,
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    watched: Any = None,
) -> Problem:
    """Check the arguments of :func:`odeint`; ``watched``: what has the callbacks, if not ``func``."""
    method = method or "dopri5"
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not supported; supported are {', '.join(METHODS)}")
    adaptive = method in ADAPTIVE
    options = dict(options or {})
    check_options(method, options)
    packing = Packing(y0)
    x0 = packing.pack(y0)
    times = _check_times(t, numbers=adaptive or not output_times_are_the_grid(options))
    t = t.to(x0.device)
    real = torch.promote_types(real_dtype(x0), torch.float32)
    if not adaptive and not torch.compiler.is_compiling() and abs(times[-1] - times[0]) > torch.finfo(real).max:
        raise ValueError(f"t must span a time that is finite in {real}, got {times[0]:g} to {times[-1]:g}")
    wide = options.get("dtype", torch.float64 if adaptive and x0.device.type != "mps" else t.dtype)
    wide = torch.promote_types(wide, real)
    origin = t[0].to(wide) if t.requires_grad else None

    def field(s: float | Tensor, x: Tensor) -> Tensor:
        if not isinstance(s, Tensor):
            s = torch.tensor(s, dtype=real, device=x.device) if origin is None else (origin + (s - times[0])).to(real)
        v = packing.pack(func(s.to(real), packing.unpack(x)), "func")  # type: ignore[union-attr]
        return v if type(v) is Tensor and v.dtype == x.dtype and v.shape == x.shape else _returned(v, x)

    norm = options.get("norm")
    if norm is None and not packing.single:
        norm = largest_rms
    limits = {"max_num_steps": MAX_NUM_STEPS, "min_step": 0.0, "max_step": math.inf, "first_step": None} | options
    tolerance = Tolerance(
        rtol=_tolerance("rtol", rtol, packing, x0, real),
        atol=_tolerance("atol", atol, packing, x0, real),
        norm=norm if norm is None or packing.single else lambda scaled: norm(packing.unpack(scaled)),
        first_step=None if limits["first_step"] is None else float(limits["first_step"]),
        min_step=float(limits["min_step"]),
        max_step=float(limits["max_step"]),
        max_steps=int(limits["max_num_steps"]),
    )
    tableau = get_tableau((ADAPTIVE if adaptive else FIXED)[method])
    observe = _observer(func if watched is None else watched, packing, method, wide)
    return Problem(field, x0, times, t, packing, tableau, adaptive, options, tolerance, observe, wide)


def _returned(v: Any, x: Tensor) -> Tensor:
    """The velocity, in the dtype of x: autocast computes it in a narrower one."""
    if not isinstance(v, Tensor):
        raise TypeError(f"func must return a tensor like y0, got {type(v).__name__}")
    if v.shape != x.shape:
        raise ValueError(f"func must keep the shape of y: it returned {tuple(v.shape)}, y has {tuple(x.shape)}")
    if v.device != x.device:
        raise ValueError(f"func must keep the device of y: it returned {v.device}, y is on {x.device}")
    if v.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"func must keep the dtype of y: it returned {v.dtype}, y is {x.dtype}")
    return v.to(x.dtype)


def check_options(method: str, options: dict[str, Any], name: str = "options", norms: tuple[str, ...] = ()) -> None:
    """Reject options that a method does not take, and values out of range; ``norms``: names that norm may be.

    Raises:
        ValueError, TypeError: the message names the option.
    """
    known = _ADAPTIVE_OPTIONS if method in ADAPTIVE else _FIXED_OPTIONS
    if unknown := set(options) - known:
        raise ValueError(f"{name} {sorted(unknown)} are not supported by {method}; supported are {sorted(known)}")
    for option, value in options.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: {option} must not require a gradient, which would be lost: detach it")
    if options.get("dtype", torch.float64) not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: dtype must be torch.float64 or torch.float32, got {options['dtype']}")
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(f"{name}: interp must be 'linear' or 'cubic', got {options['interp']!r}")
    norm = options.get("norm")
    if norm is not None and not callable(norm) and norm not in norms:
        raise ValueError(f"{name}: norm must be a function{''.join(f' or {n!r}' for n in norms)}, got {norm!r}")
    constructor = options.get("grid_constructor")
    if constructor is not None and not callable(constructor):
        raise TypeError(f"{name}: grid_constructor must be a function (func, y0, t), got {type(constructor).__name__}")
    step_size = options.get("step_size")
    if step_size is not None and constructor is not None:
        raise ValueError(f"{name}: step_size and grid_constructor exclude each other")
    if step_size is not None and not 0 < float(step_size) < math.inf:
        raise ValueError(f"{name}: step_size must be positive and finite, got {step_size}")
    steps = options.get("max_num_steps", MAX_NUM_STEPS)
    if not (int(steps) == steps and steps >= 1):
        raise ValueError(f"{name}: max_num_steps must be a whole number, at least 1, got {steps}")
    for option, right in {
        "safety": lambda x: 0 < x < math.inf,
        "ifactor": lambda x: 1 <= x < math.inf,
        "dfactor": lambda x: 0 < x < 1,
    }.items():
        if option in options and not right(float(options[option])):
            bounds = {"safety": "positive and finite", "ifactor": "at least 1 and finite", "dfactor": "between 0 and 1"}
            raise ValueError(f"{name}: {option} must be {bounds[option]}, got {options[option]}")
    for option in ("step_t", "jump_t"):
        if not all(math.isfinite(s) for s in _stops(options.get(option))):
            raise ValueError(f"{name}: {option} must be finite, got {options[option]}")


def _stops(times: Any) -> list[float]:
    """Times as numbers, of a tensor, a sequence or one number."""
    if times is None:
        return []
    if isinstance(times, Tensor):
        return times.detach().reshape(-1).tolist()
    return [float(s) for s in times] if hasattr(times, "__iter__") else [float(times)]


def output_times_are_the_grid(options: dict[str, Any]) -> bool:
    """Whether a fixed method steps from each output time to the next."""
    return options.get("step_size") is None and options.get("grid_constructor") is None


def _check_times(t: Any, numbers: bool) -> list[Any]:
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times, got {type(t).__name__}; make it one with torch.tensor(t)")
    if not t.is_floating_point():
        raise TypeError(f"t must be floating, got {t.dtype}; convert it with t.float()")
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(f"t must have one dimension and at least one time, got shape {tuple(t.shape)}")
    if torch.compiler.is_compiling() and not numbers:
        return list(t.detach().unbind())  # a graph knows no values
    times = t.detach().tolist()
    if not all(math.isfinite(time) for time in times):
        raise ValueError(f"t must be finite, got {times}")
    signs = {(b > a) - (b < a) for a, b in pairwise(times)}
    if len(signs) > 1 or 0 in signs:
        raise ValueError("t must be strictly increasing or strictly decreasing")
    return times


def _tolerance(name: str, tolerance: Any, packing: Packing, x: Tensor, dtype: torch.dtype) -> Any:
    if packing.single and not isinstance(tolerance, int | float | Tensor):
        raise TypeError(
            f"{name} must be a number or a tensor that broadcasts against y0, got {type(tolerance).__name__}"
        )
    each = packing.expand(tolerance, dtype)
    if not isinstance(each, Tensor):
        return each
    sizes = zip(reversed(each.shape), reversed(x.shape), strict=False)
    if each.ndim > x.ndim or not all(size in (1, whole) for size, whole in sizes):
        raise ValueError(f"{name} must broadcast against the state {tuple(x.shape)}, got {tuple(each.shape)}")
    return each if each.requires_grad else each.to(x.device, dtype)


def largest_rms(parts: Any) -> Tensor:
    """torchdiffeq's norm of a tuple: the largest root mean square of its parts."""
    values = parts.values() if isinstance(parts, dict) else parts
    norms = [torch.linalg.vector_norm(part) / math.sqrt(part.numel()) for part in values if part.numel()]
    return torch.stack(norms).max()


def _observer(
    func: Any, packing: Packing, method: str, dtype: torch.dtype
) -> Callable[[str, float, Tensor, float], None] | None:
    """Calls the callbacks that ``func`` has, and warns about those that the method does not call."""
    names = {"step": "callback_step", "accept": "callback_accept_step", "reject": "callback_reject_step"}
    callbacks = {what: getattr(func, name) for what, name in names.items() if getattr(func, name, None) is not None}
    idle = [] if method in ADAPTIVE else [names[what] for what in callbacks if what != "step"]
    if idle:
        warnings.warn(f"method {method!r} takes every step and does not call {', '.join(idle)}", stacklevel=4)
    if not callbacks:
        return None

    def observe(what: str, s: float, x: Tensor, h: float) -> None:
        if what in callbacks:
            time, size = (torch.tensor(float(v), dtype=dtype, device=x.device) for v in (s, abs(h)))
            callbacks[what](time, packing.unpack(x), size)

    return observe


def error_controlled(problem: Problem, end: float) -> Iterator[Step]:
    """Accepted steps to ``end``, and not beyond; a method without an interpolant ends one at each output time."""
    options = problem.options
    rule = _Rule(*(float(options.get(n, v)) for n, v in (("safety", 0.9), ("ifactor", 10.0), ("dfactor", 0.2))))
    stops, jumps = (_stops(options.get(name)) for name in ("step_t", "jump_t"))
    try:
        yield from adaptive_steps(
            problem.field,
            problem.x0,
            problem.times[0],
            end,
            problem.tableau,
            problem.tolerance,
            rule,
            stops=stops if problem.tableau.dense is not None else [*stops, *problem.times[1:]],
            jumps=jumps,
            observe=problem.observe,
        )
    except MaxStepsError as error:
        error.args = (str(error).replace("max_steps", "max_num_steps"),)
        raise


def over_grid(problem: Problem, grid: list[Any]) -> Iterator[Step]:
    """Steps over a grid of numbers, or of scalar tensors if gradients flow to the times."""
    perturb, tableau, x = problem.options.get("perturb", False), problem.tableau, problem.x0
    fields: Any = problem.field
    for s, s_next in pairwise(grid):
        if perturb:
            fields = [_nudged(problem.field, c, s, s_next, x) for c in tableau.c]
        if problem.observe is not None:
            problem.observe("step", s, x, s_next - s)
        step = rk_step(fields, s, x, s_next - s, tableau, closing=False)
        x = step.x1
        yield step


def _nudged(field: Field, c: float, s: Any, s_next: Any, x: Tensor) -> Field:
    """A stage's field just inside the step, at its first and last instant."""
    if c not in (0.0, 1.0):
        return field
    dtype = torch.promote_types(real_dtype(x), torch.float32)
    ends = (s, s_next) if c == 0 else (s_next, s)
    at, towards = (torch.as_tensor(v, dtype=dtype, device=x.device) for v in ends)
    return lambda _, x: field(at + (torch.nextafter(at, towards) - at).detach(), x)


def inside(problem: Problem, step: Step) -> Callable[[Any], Tensor]:
    """The state at a fraction of a step, a number or a tensor.

    The interpolant of the method; where it has none, cubic Hermite, at a field evaluation; of a fixed method linear,
    unless its options say cubic.
    """
    if not linear(problem):
        return interpolant(step, problem.field)
    return lambda theta: step.x0 + theta * (step.x1 - step.x0)


def linear(problem: Problem) -> bool:
    """Whether the state is linear inside a step."""
    return not problem.adaptive and problem.options.get("interp", "linear") == "linear"
