import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import I, MaxStepsError, NonFiniteError, Tolerance, integrate
from tests.counting import Counted

D = torch.float64


def lotka(t, x):
    """Prey and predator."""
    u, v = x.unbind(-1)
    return torch.stack([u * (1.5 - v), v * (u - 3)], -1)


X0 = torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=D)


@pytest.mark.parametrize(("solver", "scipy"), [("bs23", "RK23"), ("dopri5", "RK45")])
@pytest.mark.parametrize("t1", [3.0, -1.0])
def test_dense_solution_is_that_of_scipy(solver, scipy, t1):
    x0 = X0[:1]
    tolerance, controller = Tolerance(1e-5, 1e-7), I(facmax=10.0)  # SciPy's rule
    ours = integrate(lotka, x0, 0.0, t1, solver=solver, tolerance=tolerance, controller=controller, keep="steps")
    theirs = solve_ivp(
        lambda t, y: lotka(t, torch.from_numpy(y)[None])[0].numpy(),
        (0, t1), [1, 1], method=scipy, rtol=1e-5, atol=1e-7, dense_output=True,
    )  # fmt: skip
    times = np.linspace(0, t1, 17)
    np.testing.assert_allclose(ours.times, theirs.t, rtol=1e-9)
    np.testing.assert_allclose(ours(torch.from_numpy(times))[:, 0].numpy().T, theirs.sol(times), rtol=1e-8, atol=1e-9)
    assert torch.equal(ours(0.0), x0)


@pytest.mark.parametrize(
    "solver", ["euler", "midpoint", "heun", "rk4", "rk4_38", "fehlberg2", "tsit5", "bs23", "dopri5"]
)
def test_dense_solution_of_fixed_steps(solver):
    field = Counted(lambda t, x: torch.cos(t) * x if isinstance(t, torch.Tensor) else math.cos(t) * x)
    solution = integrate(field, X0, 0.0, 2.0, solver=solver, steps=64, keep="steps")
    calls = field.calls
    assert solution.stats.evaluations == calls  # nothing was spent on the interpolant
    found = solution(1.234)
    assert field.calls == calls + (solver not in ("bs23", "dopri5", "tsit5"))
    torch.testing.assert_close(found, X0 * math.exp(math.sin(1.234)), rtol=0.05 if solver == "euler" else 1e-3, atol=0)


def test_gradients_flow_to_the_time():
    solution = integrate(lotka, X0, 0.0, 1.0, solver="dopri5", tolerance=Tolerance(1e-9, 1e-9), keep="steps")
    t = torch.tensor(0.37, dtype=D, requires_grad=True)
    x = solution(t)
    (slope,) = torch.autograd.grad(x[0, 0], t)
    assert slope.item() == pytest.approx(lotka(t, x)[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (1.5, r"t must lie between 0 and 1, got 1\.5"),
        (-0.1, "t must lie between"),
        (torch.zeros(2, 2), "t must be a number or have one dimension"),
    ],
)
def test_times_outside(t, message):
    with pytest.raises(ValueError, match=message):
        integrate(lotka, X0, 0.0, 1.0, keep="steps")(t)


def test_a_solution_without_steps_says_what_it_needs():
    with pytest.raises(ValueError, match="integrate with keep='steps'"):
        integrate(lotka, X0, 0.0, 1.0)(0.5)


def parts(t, state, scale):
    """The same for a dictionary of states."""
    velocity = lotka(t, state["xy"])
    return {"xy": scale * velocity, "length": (scale * velocity).norm(dim=-1)}


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_dictionaries_tuples_and_arguments(control, gradient):
    x0 = {"xy": X0, "length": torch.zeros(2, dtype=D)}
    scale = torch.tensor(0.5, dtype=D, requires_grad=True)
    options = {"tolerance": Tolerance(1e-8, 1e-8), "control": control, "gradient": gradient, "args": (scale,)}
    found = integrate(parts, x0, 0.0, 2.0, **options)
    assert set(found.x1) == {"xy", "length"}
    plain = integrate(lotka, X0, 0.0, 1.0, tolerance=Tolerance(1e-9, 1e-9))
    torch.testing.assert_close(found.x1["xy"], plain.x1, rtol=1e-6, atol=1e-6)
    assert found.x1["length"].shape == (2,)
    assert torch.autograd.grad(found.x1["length"].sum(), scale)[0] > 0
    pair = integrate(
        lambda t, s, scale: tuple(parts(t, {"xy": s[0], "length": s[1]}, scale).values()),
        (X0, x0["length"]), 0.0, 2.0, **options,
    )  # fmt: skip
    torch.testing.assert_close(pair.x1[0], found.x1["xy"])


def test_a_dictionary_has_a_dense_solution():
    x0 = {"xy": X0, "length": torch.zeros(2, dtype=D)}
    found = integrate(parts, x0, 0.0, 1.0, keep="steps", args=(1.0,))(torch.tensor([0.2, 0.5]))
    assert found["xy"].shape == (2, 2, 2)
    assert found["length"].shape == (2, 2)


def test_a_field_that_returns_another_structure():
    with pytest.raises(ValueError, match="field must be a dictionary with keys"):
        integrate(lambda t, s: (s["x"],), {"x": X0}, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"field must keep the shapes \[\(2,\)\]"):
        integrate(lambda t, s: {"x": s["x"][:, :1]}, {"x": X0}, 0.0, 1.0)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_states(control, dtype):
    x0 = torch.tensor([[1.0 + 1j], [2.0]], dtype=dtype)
    solution = integrate(lambda t, x: 1j * x, x0, 0.0, 1.0, control=control, tolerance=Tolerance(1e-5, 1e-6))
    torch.testing.assert_close(solution.x1, x0 * np.exp(1j), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_times_are_wider_than_narrow_states(dtype):
    seen = []

    def field(t, x):
        seen.append(t)
        return -x

    solution = integrate(field, torch.ones(2, 1, dtype=dtype), 0.0, 1.0, steps=1000, solver="euler", keep="states")
    assert seen == pytest.approx([i / 1000 for i in range(1000)], abs=1e-12)
    assert solution.x1.dtype == dtype


@pytest.mark.parametrize("steps", [None, 50])
@pytest.mark.parametrize("keep", ["last", "states", "steps"])
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "heun"])
def test_an_event_ends_the_solve(solver, keep, steps):
    fall = lambda t, x: torch.stack([x[:, 1], torch.full_like(x[:, 1], -9.81)], -1)  # noqa: E731
    x0 = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=D)
    tolerance = None if steps else Tolerance(1e-8, 1e-8)
    solution = integrate(
        fall, x0, 0.0, 3.0, event=lambda t, x: x[:, 0], solver=solver, steps=steps, tolerance=tolerance, keep=keep
    )
    exact = math.sqrt(2 / 9.81)
    assert solution.status == "event"
    assert solution.event_time.item() == pytest.approx(exact, rel=1e-6)
    assert solution.t1 == solution.event_time.item()
    assert solution.x1[1, 0].item() == pytest.approx(0, abs=1e-9)
    if keep == "steps":
        torch.testing.assert_close(solution(solution.t1), solution.x1)


def test_no_event():
    solution = integrate(lotka, X0, 0.0, 1.0, event=lambda t, x: x + 1)
    assert solution.status == "finished"
    assert solution.event_time is None


def test_an_event_at_the_start():
    solution = integrate(lotka, X0, 0.0, 1.0, event=lambda t, x: x - 1)
    assert (solution.status, solution.t1, solution.stats.evaluations) == ("event", 0.0, 0)


def test_the_limit_may_return_what_was_solved():
    solution = integrate(lotka, X0, 0.0, 10.0, tolerance=Tolerance(max_steps=5), on_limit="return")
    assert solution.status == "max_steps"
    assert 0 < solution.t1 < 10
    assert solution.t1 == solution.times[-1]
    wall = lambda t, x: torch.where(x > 2, torch.nan, torch.ones_like(x))  # noqa: E731
    solution = integrate(wall, X0 / 2, 0.0, 10.0, tolerance=Tolerance(max_step=0.3), on_limit="return")
    assert solution.status == "not_finite"
    assert solution.x1.max() == pytest.approx(2.0, abs=1e-3)
    solution = integrate(lambda t, x: x**2, X0, 0.0, 10.0, on_limit="return")
    assert solution.status == "underflow"


def test_the_first_stage_and_sample_that_are_not_finite_are_named():
    wall = lambda t, x: torch.where(x > 2, torch.nan, torch.ones_like(x))  # noqa: E731
    x0 = torch.tensor([[-9.0], [1.0]], dtype=D)
    with pytest.raises(NonFiniteError, match=r"stage [123], sample 1\)") as caught:
        integrate(wall, x0, 0.0, 2.0, tolerance=Tolerance(max_step=0.3))
    assert caught.value.sample == 1
    with pytest.raises(NonFiniteError, match=r"first state.*stage 0, sample 1"):
        integrate(wall, 3 + x0, 0.0, 2.0)


def test_a_limit_keeps_its_solution_when_it_raises():
    with pytest.raises(MaxStepsError) as caught:
        integrate(lotka, X0, 0.0, 10.0, tolerance=Tolerance(max_steps=5))
    assert caught.value.solution.status == "max_steps"
    assert caught.value.solution.stats.accepted + caught.value.solution.stats.rejected == 5


def test_a_time_at_the_end_may_be_rounded():
    solution = integrate(lotka, X0.float(), 0.0, 0.3, keep="steps")
    torch.testing.assert_close(solution(torch.linspace(0, 0.3, 4))[-1], solution.x1)
    each = integrate(lotka, X0.float(), 0.0, 0.3, keep="steps", control="sample")
    torch.testing.assert_close(each(torch.linspace(0, 0.3, 4))[-1], each.x1)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_solve_of_no_time_is_its_first_state(steps):
    assert torch.equal(integrate(lotka, X0, 1.0, 1.0, steps=steps, keep="steps")(1.0), X0)
    at_once = integrate(lotka, X0, 0.0, 1.0, steps=steps, keep="steps", event=lambda t, x: x[0, 0] - 1)
    assert at_once.status == "event"
    assert torch.equal(at_once(0.0), X0)


@pytest.mark.parametrize("t1", [2.0, 1e2, 1e6])
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_far_end_costs_an_event_no_precision(t1, control):
    fall = lambda t, x: torch.stack([x[..., 1], torch.full_like(x[..., 1], -9.81)], -1)  # noqa: E731
    solution = integrate(fall, torch.tensor([[1.0, 0.0]]), 0.0, t1, event=lambda t, x: x[:, 0], control=control)
    assert solution.event_time.item() == pytest.approx(math.sqrt(2 / 9.81), rel=1e-6)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_the_first_step_is_looked_for_within_the_solve(control):
    """A slow start, from which the usual guess would go to where the field is not defined, or overflows."""
    asked = []

    def field(t, x):
        asked.append(float(torch.as_tensor(t).max()))
        return 1e-4 * torch.exp(torch.as_tensor(5 * t)) + 0 * x

    growth = integrate(field, torch.ones(2, 1), 0.0, 1.0, control=control)
    torch.testing.assert_close(growth.x1, torch.full((2, 1), 1 + 1e-4 * (math.exp(5) - 1) / 5), rtol=1e-3, atol=0)
    assert max(asked) <= 1
    circle = integrate(
        lambda t, x: 1e-4 * (1 - torch.as_tensor(t).double() ** 2).sqrt() + 0 * x, torch.ones(2, 1, dtype=D), 0.0, 1.0,
        control=control,
    )  # fmt: skip
    torch.testing.assert_close(circle.x1, torch.full((2, 1), 1 + 1e-4 * math.pi / 4, dtype=D), rtol=1e-6, atol=0)


def test_times_that_require_gradients_are_refused():
    with pytest.raises(ValueError, match="t1 must not require a gradient"):
        integrate(lotka, X0, 0.0, torch.tensor(1.0, requires_grad=True))


def test_the_gradient_of_an_event_to_its_own_parameters():
    """Nothing else asks for one: e^-t = c at t = -ln c."""
    c = torch.tensor(0.5, requires_grad=True, dtype=D)
    solution = integrate(lambda t, x: -x, torch.ones(1, 1, dtype=D), 0.0, 2.0, event=lambda t, x: x[0, 0] - c)
    (gradient,) = torch.autograd.grad(solution.event_time, c)
    assert gradient.item() == pytest.approx(-2.0, rel=1e-3)


WAYS = [{}, {"solver": "dopri5"}, {"solver": "heun"}, {"gradient": "checkpoint"}, {"steps": 3}, {"control": "sample"}]
WAYS += [{"control": "sample", "solver": "heun"}, {"steps": 2, "solver": "rk4"}, {"steps": 2, "solver": "euler"}]


def constant(t, x):
    """Whose steps grow without limit."""
    return torch.ones_like(x)


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize(
    ("event", "first"),
    [
        (lambda t, x: (x + 0.1).sin()[:, 0], math.pi - 0.1),
        (lambda t, x: ((x - 1) * (x - 2) * (x - 3))[:, 0], 1.0),
        (lambda t, x: ((x - 1) * (x - 3))[:, 0], 1.0),  # of one sign at both ends of a long step
        (lambda t, x: ((x - 9) * (x - 9.5))[:, 0], 9.0),
        (lambda t, x: torch.cat([x - 5, x - 2], 1), 2.0),
        (lambda t, x: (2 * math.pi * x).cos()[:, 0], 0.25),
    ],
)
def test_the_first_of_several_changes_in_a_step_is_the_event(event, first, options):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, first), rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.x1, torch.full((2, 1), first, dtype=D), rtol=1e-9, atol=0)


def test_the_first_change_backwards_in_time():
    solution = integrate(constant, torch.full((1, 1), 10.0), 10.0, 0.0, event=lambda t, x: (x - 4) * (x - 6))
    assert solution.event_time.item() == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"control": "sample"}])
@pytest.mark.parametrize(
    "event",
    [
        lambda t, x: x[:, 0] > 3,
        lambda t, x: x[:, 0] < 3,
        lambda t, x: (x < 3)[:, 0].int(),
        lambda t, x: (3 - x).half(),
        lambda t, x: torch.stack([x < 7, x < 3], 1),
        lambda t, x: x.detach().numpy() - 3,
    ],
)
def test_events_of_any_type(event, options):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "event",
    [
        lambda t, x: bool(x.mean() < 3),
        lambda t, x: 3 - float(x.mean()),
        lambda t, x: x.mean() - 3,
        lambda t, x: np.float64(x.mean() - 3),
        lambda t, x: t < 3,
    ],
)
def test_an_event_of_the_batch_may_be_a_number(event):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event)
    assert solution.event_time.item() == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        (lambda t, x: x + 1j, TypeError, "event must return real numbers or comparisons, got torch.complex128"),
        (lambda t, x: None, TypeError, "event must return a tensor or a number, got NoneType"),
        (lambda t, x: x[:0], ValueError, r"event must return .*got shape \(0, 1\)"),
        (lambda t, x: x * math.nan, ValueError, "event must return numbers, got NaN at t = 0"),
        (lambda t, x: 0.1 + (1 - x).sqrt(), ValueError, r"event must return numbers, got NaN at t = [1-9]"),
        (lambda t, x: x.sub_(1), ValueError, "event must not write into its input"),
    ],
)
def test_events_that_are_none(event, error, message, control):
    with pytest.raises(error, match=message):
        integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, control=control)


@pytest.mark.parametrize("options", [{}, {"control": "sample"}, {"gradient": "checkpoint"}, {"steps": 5}])
@pytest.mark.parametrize(
    "event", [lambda t, x: x[:, 0] > 2, lambda t, x: (x[:, 0] - 2).sign(), lambda t, x: x[:, 0].detach() - 2]
)
def test_an_event_without_slope_has_a_time_and_says_that_it_has_no_gradient(event, options):
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    x0 = torch.zeros(2, 1, dtype=D)
    solution = integrate(lambda t, x: rate * torch.ones_like(x), x0, 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, 2.0), rtol=1e-9, atol=0)
    for value in (solution.event_time, solution.x1):
        with pytest.raises(ValueError, match=r"event has no slope.*comparison"):
            value.sum().backward()


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(o, torch.Tensor) and o.dtype in (D, torch.complex128) for o in tree_leaves(out)):
            raise TypeError("this device has no float64")
        return out


@pytest.mark.parametrize(
    "options",
    [*WAYS, {"keep": "steps"}, {"gradient": "backsolve"}, {"keep": "steps", "control": "sample"}],
)  # fmt: skip
@pytest.mark.parametrize("watched", [False, True])
def test_solves_on_a_device_without_float64(options, watched):
    field = torch.nn.Linear(2, 2)
    x0 = torch.ones(3, 2)
    event = {"event": lambda t, x: (x - 1).abs().amax(1) - 0.05} if watched else {}
    with NoFloat64():
        solution = integrate(
            lambda t, x: field(x), x0, 0.0, 2.0, **options, **event,
            **({"parameters": field.parameters()} if options.get("gradient") == "backsolve" else {}),
        )  # fmt: skip
        solution.x1.sum().backward()
        if options.get("keep") == "steps":
            assert (
                solution(solution.t1.min() if isinstance(solution.t1, torch.Tensor) else solution.t1).isfinite().all()
            )
    assert field.weight.grad.abs().sum() > 0
    plain = integrate(lambda t, x: field(x), x0, 0.0, 2.0, **options | {"gradient": "direct"}, **event)
    torch.testing.assert_close(solution.x1, plain.x1)
    if watched:
        assert solution.event_time.dtype == torch.float32
        assert plain.event_time.dtype == D


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_far_from_time_0_states_in_float32_have_events_and_dense_states_as_near_it(control):
    t0 = 1e8 + 0.125 if control == "batch" else 1000.125
    event = {"event": lambda t, x: x[:, 0] - 0.3}
    solution = integrate(constant, torch.zeros(2, 1), t0, t0 + 1, control=control, **event)
    torch.testing.assert_close(solution.event_time - t0, torch.full_like(solution.event_time, 0.3), rtol=1e-3, atol=0)
    dense = integrate(constant, torch.zeros(2, 1), t0, t0 + 1, control=control, keep="steps")
    for t in (0.2, 0.71):
        torch.testing.assert_close(dense(t0 + t), torch.full((2, 1), t), rtol=1e-4, atol=0)
        wide = dense(torch.tensor(t0 + t, dtype=D, requires_grad=True))
        torch.testing.assert_close(wide, torch.full((2, 1), t), rtol=1e-4, atol=0)
