"""An initial value problem as torchdiffeq's callers state it, as a :class:`~solvers.solve.Task` for the engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.controllers import ControllerState, SampleController, SampleStates, namespace
from solvers.methods import get_tableau
from solvers.packing import Packing
from solvers.solve import Grid, Task
from solvers.tolerance import Tolerance, to_host
from solvers.validation import check_call, real_dtype

__all__ = [
    "ADAPTIVE", "METHODS", "check_options", "ending_at", "largest_rms", "make_rule", "make_task", "make_tolerance",
]  # fmt: skip

ADAPTIVE = {
    "bosh3": "bs23", "dopri5": "dopri5", "tsit5": "tsit5", "dopri8": "dopri8", "fehlberg2": "fehlberg2",
    "adaptive_heun": "heun", "kvaerno5": "kvaerno5",
}  # fmt: skip
FIXED = {
    "euler": "euler", "midpoint": "midpoint", "heun2": "heun", "heun3": "heun3", "rk4": "rk4", "rk4_38": "rk4_38",
    "implicit_euler": "implicit_euler", "implicit_midpoint": "implicit_midpoint", "trapezoid": "trapezoid",
}  # fmt: skip
METHODS = (*ADAPTIVE, *FIXED)
MAX_NUM_STEPS, MAX_STEPS_TO_EVENT, MAX_GRID_STEPS = 100_000, 20_000, 10_000_000

_ADAPTIVE_OPTIONS = {"norm", "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor"}
_ADAPTIVE_OPTIONS |= {"max_num_steps", "jump_t", "step_t", "dtype", "graph"}
_RULE = {"safety": 0.9, "ifactor": 10.0, "dfactor": 0.2}
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

    def each(self, states: SampleStates, error: Any, order: int) -> SampleStates:
        """The same for arrays or tensors."""
        of = namespace(error)
        factor = of.where(error == 0, self.ifactor, self.safety * error ** (-1 / (order + 1)))
        least = of.where(error < 1, of.ones_like(error), self.dfactor)
        factor = of.where(of.isfinite(error), of.clip(of.maximum(factor, least), None, self.ifactor), self.dfactor)
        return SampleStates(states.h * factor, error <= 1, states.errors)


def make_task(
    func: Any, packing: Packing, y0: Any, t: Tensor, rtol: Any, atol: Any, method: str | None,
    options: dict[str, Any] | None, event_fn: Callable[[Tensor, Any], Tensor] | None = None, watched: Any = None
) -> Task:  # fmt: skip
    """Check the arguments of :func:`~solvers.odeint`; ``watched``: what has the callbacks, if not ``func``.

    States are packed; the outputs are those at the times ``t``, or the event is looked for.
    """
    method = method or "dopri5"
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not supported; supported are {', '.join(METHODS)}")
    adaptive = method in ADAPTIVE
    options = dict(options or {})
    check_options(method, options)
    check_call(func if watched is None else watched, None, name="func", remedy="; odeint calls func(t, y)")
    x0 = packing.pack(y0)
    times = _check_times(t, numbers=adaptive or not _steps_to_outputs(options))
    t = t.to(x0.device)
    real = torch.promote_types(real_dtype(x0), torch.float32)
    if not adaptive and not torch.compiler.is_compiling() and abs(times[-1] - times[0]) > torch.finfo(real).max:
        raise ValueError(f"t must span a time that is finite in {real}, got {times[0]:g} to {times[-1]:g}")
    wide = options.get("dtype", torch.float64 if adaptive and x0.device.type != "mps" else t.dtype)
    wide = torch.promote_types(wide, real)
    origin, single = t[0].to(wide) if t.requires_grad else None, packing.single

    def field(s: float | Tensor, x: Tensor) -> Tensor:
        if isinstance(s, Tensor):
            s = s.to(real)
        else:
            s = torch.full((), s, dtype=real, device=x.device) if origin is None else (origin + (s - times[0])).to(real)
        v = func(s, x) if single else packing.pack(func(s, packing.unpack(x)), "func")
        return v if type(v) is Tensor and v.dtype == x.dtype and v.shape == x.shape else _returned(v, x)

    tolerance = make_tolerance(packing, x0, rtol, atol, options)
    tableau = get_tableau((ADAPTIVE if adaptive else FIXED)[method])
    rule, (stops, jumps) = None, (_numbers(options.get(name)) for name in ("step_t", "jump_t"))
    if adaptive:
        rule = make_rule(options)
        if tableau.dense is None and event_fn is None:  # then a step ends at each output time
            stops += times[1:]
    outputs = adaptive or not _steps_to_outputs(options)  # else the states of the steps are those at the times
    task = Task(
        field=field, x0=x0, t0=times[0], t1=times[-1], tableau=tableau, tolerance=tolerance,
        grid=None if adaptive or event_fn is not None else _grid(field, x0, t, times, t.to(wide), options),
        controller=rule, stops=stops, jumps=jumps,
        observe=_observer(func if watched is None else watched, packing, method, wide),
        at=times, t=t.to(wide), origin=t[0].to(wide),
        outputs=outputs, keep="last" if outputs else "states",
    )  # fmt: skip
    return task if event_fn is None else _to_event(task, event_fn, packing, adaptive, options)


def make_tolerance(packing: Packing, x0: Tensor, rtol: Any, atol: Any, options: dict[str, Any]) -> Tolerance:
    """What an adaptive solve from ``x0``, packed, accepts."""
    real = torch.promote_types(real_dtype(x0), torch.float32)
    norm, first_step = options.get("norm"), options.get("first_step")
    if norm is None and not packing.single:
        norm = largest_rms
    return Tolerance(
        rtol=_tolerance("rtol", rtol, packing, x0, real), atol=_tolerance("atol", atol, packing, x0, real),
        norm=norm if norm is None or packing.single else lambda scaled: norm(packing.unpack(scaled)),
        first_step=None if first_step is None else float(first_step), min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)), max_steps=int(options.get("max_num_steps", MAX_NUM_STEPS)),
    )  # fmt: skip


def make_rule(options: dict[str, Any]) -> SampleController:
    """The step-size rule that ``options`` say."""
    return _Rule(**{name: float(options.get(name, value)) for name, value in _RULE.items()})


def _to_event(task: Task, event_fn: Any, packing: Packing, adaptive: bool, options: dict[str, Any]) -> Task:
    """The task of finding an event, from the first time on, in the direction of the second."""
    if len(task.at) != 2:
        raise ValueError(f"t must hold two times with event_fn, a start and a direction, got {len(task.at)}")
    wide, direction = task.t.dtype, _direction(task.at)

    def event(s: Any, x: Tensor) -> Tensor:
        s = s if isinstance(s, Tensor) else torch.full((), s, dtype=wide, device=x.device)
        return event_fn(s.to(wide), packing.unpack(x))

    width = float(torch.as_tensor(task.tolerance.atol).min())
    task = replace(task, keep="last", outputs=False, event=event, width=width)
    if adaptive:
        latest = 1e-3 * torch.finfo(torch.promote_types(real_dtype(task.x0), torch.float32)).max
        limit = int(options.get("max_num_steps", MAX_STEPS_TO_EVENT))
        return replace(task, t1=direction * latest, tolerance=replace(task.tolerance, max_steps=limit))
    if options.get("step_size") is None:
        raise ValueError("options: event_fn with a fixed method needs step_size")
    h = direction * float(options["step_size"])
    return replace(task, grid=_as_grid((task.t0 + k * h for k in range(MAX_STEPS_TO_EVENT + 1)), options))


def ending_at(task: Task, time: float, options: dict[str, Any] | None) -> Task:
    """The task of finding an event at ``time`` as one whose outputs are the states at its start and there."""
    at, t, options = [task.t0, time], torch.stack([task.t[0], task.t.new_tensor(time)]), options or {}
    grid = None if task.grid is None else _grid(task.field, task.x0, t, at, t, options)
    stops = [*task.stops, time] if task.tableau.dense is None else task.stops
    limit = int(options.get("max_num_steps", MAX_NUM_STEPS))
    tolerance = replace(task.tolerance, max_steps=limit)
    return replace(task, t1=time, at=at, t=t, outputs=True, event=None, grid=grid, stops=stops, tolerance=tolerance)


def _grid(field: Any, x0: Tensor, t: Tensor, times: list[Any], wide: Tensor, options: dict[str, Any]) -> Grid:
    """The steps of a fixed method: from each output time to the next, or what the options say."""
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if constructor is not None and len(times) > 1:
        return _constructed(field, x0, t, times, wide, options)
    if step_size is None:
        return _as_grid(list(wide) if wide.requires_grad else times, options, times)
    count = abs(times[-1] - times[0]) / float(step_size)
    if count > MAX_GRID_STEPS:
        raise ValueError(
            f"options: step_size {step_size} makes {count:.3g} steps, more than {MAX_GRID_STEPS}: raise it"
        )
    grid = [times[0] + _direction(times) * k * float(step_size) for k in range(math.ceil(count - 1e-9))]
    if not wide.requires_grad:
        return _as_grid([*grid, times[-1]], options)
    return _as_grid([*(wide[0] + (s - times[0]) for s in grid), wide[-1]], options, [*grid, times[-1]])


def _constructed(field: Any, x0: Tensor, t: Tensor, times: list[Any], wide: Tensor, options: dict[str, Any]) -> Grid:
    """The grid of the caller, whose ends may differ from the times in the rounding of a narrower dtype."""
    grid = options["grid_constructor"](field, x0, t)
    if not isinstance(grid, Tensor) or grid.ndim != 1 or len(grid) < 2 or not grid.is_floating_point():
        what = f"{grid.dtype} {tuple(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__
        raise TypeError(f"options: grid_constructor must return at least two times, floating (n,), got {what}")
    numbers = to_host(grid.detach())
    slack = 2 * max(torch.finfo(x.dtype).eps for x in (grid, t, x0))
    for number, time, name in ((numbers[0], times[0], "begin at t[0]"), (numbers[-1], times[-1], "end at t[-1]")):
        if not abs(number - time) <= slack * max(abs(number), abs(time)):
            raise ValueError(f"options: the grid must {name} = {time:.9g}, got {number:.9g}")
    numbers = [times[0], *numbers[1:-1], times[-1]]
    if not all(_direction(times) * (b - a) >= 0 for a, b in pairwise(numbers)):
        raise ValueError("options: the grid must go from t[0] to t[-1] without turning back")
    keep = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1])]
    numbers = [numbers[i] for i in keep]
    if not grid.requires_grad:
        return _as_grid(numbers, options)
    return _as_grid(list(grid.to(x0.device, wide.dtype)[keep]), options, numbers)


def _as_grid(times: Iterable[Any], options: dict[str, Any], numbers: Any = None) -> Grid:
    linear = options.get("interp", "linear") == "linear"
    return Grid(times=times, numbers=numbers, inward=options.get("perturb", False), linear=linear)


def _direction(times: Any) -> int:
    """1 forward in time, -1 backward."""
    return -1 if len(times) > 1 and times[1] < times[0] else 1


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
    for option, right, bounds in (
        ("safety", lambda x: 0 < x < math.inf, "positive and finite"),
        ("ifactor", lambda x: 1 <= x < math.inf, "at least 1 and finite"),
        ("dfactor", lambda x: 0 < x < 1, "between 0 and 1"),
    ):
        if option in options and not right(float(options[option])):
            raise ValueError(f"{name}: {option} must be {bounds}, got {options[option]}")
    for option in ("step_t", "jump_t"):
        if not all(math.isfinite(s) for s in _numbers(options.get(option))):
            raise ValueError(f"{name}: {option} must be finite, got {options[option]}")


def _numbers(times: Any) -> list[float]:
    """Times as numbers, of a tensor, a sequence or one number."""
    if times is None:
        return []
    if isinstance(times, Tensor):
        return to_host(times.detach().reshape(-1))
    return [float(s) for s in times] if hasattr(times, "__iter__") else [float(times)]


def _steps_to_outputs(options: dict[str, Any]) -> bool:
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
    times = to_host(t.detach())
    if not all(math.isfinite(time) for time in times):
        raise ValueError(f"t must be finite, got {times}")
    signs = {(b > a) - (b < a) for a, b in pairwise(times)}
    if len(signs) > 1 or 0 in signs:
        raise ValueError("t must be strictly increasing or strictly decreasing")
    return times


def _tolerance(name: str, tolerance: Any, packing: Packing, x: Tensor, dtype: torch.dtype) -> Any:
    if packing.single and not isinstance(tolerance, (int, float, Tensor)):
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
            time, size = (torch.full((), float(v), dtype=dtype, device=x.device) for v in (s, abs(h)))
            callbacks[what](time, packing.unpack(x), size)

    return observe
