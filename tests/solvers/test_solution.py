import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from solvers import I, Tolerance, integrate
from tests.counting import Counted
from tests.solvers.problems import D, lotka

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
    "solver", ["euler", "midpoint", "heun", "rk4", "rk4_38", "fehlberg2", "tsit5", "bs23", "dopri5", "dopri8"]
)
def test_dense_solution_of_fixed_steps(solver):
    field = Counted(lambda t, x: torch.cos(t) * x if isinstance(t, torch.Tensor) else math.cos(t) * x)
    solution = integrate(field, X0, 0.0, 2.0, solver=solver, steps=64, keep="steps")
    calls = field.calls
    assert solution.stats.evaluations == calls  # nothing was spent on the interpolant
    result = solution(1.234)
    assert field.calls == calls + (solver not in ("bs23", "dopri5", "tsit5", "dopri8"))
    torch.testing.assert_close(result, X0 * math.exp(math.sin(1.234)), rtol=0.05 if solver == "euler" else 1e-3, atol=0)


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
    options = {"tolerance": Tolerance(1e-6, 1e-6), "control": control, "gradient": gradient, "args": (scale,)}
    result = integrate(parts, x0, 0.0, 2.0, **options)
    assert set(result.x1) == {"xy", "length"}
    plain = integrate(lotka, X0, 0.0, 1.0, tolerance=Tolerance(1e-9, 1e-9))
    torch.testing.assert_close(result.x1["xy"], plain.x1, rtol=1e-4, atol=1e-4)
    assert result.x1["length"].shape == (2,)
    assert torch.autograd.grad(result.x1["length"].sum(), scale)[0] > 0
    pair = integrate(
        lambda t, s, scale: tuple(parts(t, {"xy": s[0], "length": s[1]}, scale).values()),
        (X0, x0["length"]), 0.0, 2.0, **options,
    )  # fmt: skip
    torch.testing.assert_close(pair.x1[0], result.x1["xy"])


def test_a_dictionary_has_a_dense_solution():
    x0 = {"xy": X0, "length": torch.zeros(2, dtype=D)}
    result = integrate(parts, x0, 0.0, 1.0, keep="steps", args=(1.0,))(torch.tensor([0.2, 0.5]))
    assert result["xy"].shape == (2, 2, 2)
    assert result["length"].shape == (2, 2)


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


def test_a_time_at_the_end_may_be_rounded():
    solution = integrate(lotka, X0.float(), 0.0, 0.3, keep="steps")
    torch.testing.assert_close(solution(torch.linspace(0, 0.3, 4))[-1], solution.x1)
    each = integrate(lotka, X0.float(), 0.0, 0.3, keep="steps", control="sample")
    torch.testing.assert_close(each(torch.linspace(0, 0.3, 4))[-1], each.x1)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_solve_of_no_time_is_its_first_state(steps):
    none = integrate(lotka, X0, 1.0, 1.0, steps=steps, keep="steps")
    assert torch.equal(none(1.0), X0)
    assert (none.times, none.stats.accepted) == ((1.0,), 0)
    at_once = integrate(lotka, X0, 0.0, 1.0, steps=steps, keep="steps", event=lambda t, x: x[0, 0] - 1)
    assert at_once.status == "event"
    assert torch.equal(at_once(0.0), X0)


def test_times_that_require_gradients_are_refused():
    with pytest.raises(ValueError, match="t1 must not require a gradient"):
        integrate(lotka, X0, 0.0, torch.tensor(1.0, requires_grad=True))
