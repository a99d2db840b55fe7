import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import RK23, solve_ivp

from solvers import PI, PID, HalveDouble, I, SolverError, Tolerance, integrate
from tests.counting import Counted
from tests.solvers.problems import CONTROLS, D, decay, lotka, van_der_pol

PROBLEMS = [(decay, [1.0], 5.0), (lotka, [1.0, 1.0], 8.0), (van_der_pol, [2.0, 0.0], 12.0)]


@pytest.mark.parametrize(("field", "start", "end"), PROBLEMS)
@pytest.mark.parametrize("first_step", [None, 0.01])
def test_i_controller_takes_the_steps_of_scipy(field, start, end, first_step):
    x0 = torch.tensor([start], dtype=D)
    numpy_field = lambda t, y: field(t, torch.from_numpy(y)[None])[0].numpy()  # noqa: E731
    scipy = RK23(numpy_field, 0.0, np.array(start), end, rtol=1e-4, atol=1e-7, first_step=first_step)
    times = [0.0]
    while scipy.status == "running":
        scipy.step()
        times.append(scipy.t)
    tolerance = Tolerance(rtol=1e-4, atol=1e-7, first_step=first_step)
    ours = integrate(field, x0, 0.0, end, tolerance=tolerance, controller=I(facmax=10.0))
    assert len(times) == len(ours.times)
    assert np.abs(np.array(times) - np.array(ours.times)).max() < 1e-10
    np.testing.assert_allclose(ours.x1[0].numpy(), scipy.y, rtol=1e-9)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize(("field", "start", "end"), PROBLEMS)
def test_fixed_steps_equal_torchdiffeq(method, field, start, end):
    x0 = torch.tensor([start], dtype=D)
    theirs = torchdiffeq.odeint(
        lambda t, x: field(t.item(), x), x0, torch.tensor([0.0, 1.0], dtype=D), method=method,
        options={"step_size": 1 / 64},
    )  # fmt: skip
    ours = integrate(field, x0, 0.0, 1.0, solver=method, steps=64)
    torch.testing.assert_close(ours.x1, theirs[-1], rtol=1e-13, atol=1e-13)


@pytest.fixture(scope="module")
def exact():
    return solve_ivp(
        lambda t, y: lotka(t, torch.from_numpy(y)[None])[0].numpy(), (0, 3), [1, 1], rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("controller", [I(), PI(), PID(), HalveDouble()])
@pytest.mark.parametrize("solver", ["heun", "midpoint", "bs23", "dopri5"])
def test_adaptive_solves_agree_with_scipy(solver, controller, exact):
    x0 = torch.tensor([[1.0, 1.0]], dtype=D)
    tolerance = Tolerance(rtol=1e-5, atol=1e-7) if solver in ("heun", "midpoint") else Tolerance(rtol=1e-6, atol=1e-8)
    ours = integrate(lotka, x0, 0.0, 3.0, solver=solver, tolerance=tolerance, controller=controller)
    np.testing.assert_allclose(ours.x1[0].numpy(), exact.y[:, -1], rtol=1e-3)
    assert ours.times[-1] == 3.0


@settings(max_examples=30, deadline=None)
@given(
    t0=st.floats(-2, 2),
    length=st.floats(0.01, 3),
    backwards=st.booleans(),
    rtol=st.floats(1e-8, 1e-2),
    batch=st.integers(1, 4),
    features=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_there_and_back(t0, length, backwards, rtol, batch, features):
    x0 = torch.linspace(-1, 1, batch * math.prod(features), dtype=D).reshape(batch, *features)
    t1 = t0 - length if backwards else t0 + length
    tolerance = Tolerance(rtol=rtol, atol=rtol)
    there = integrate(lambda t, x: torch.sin(x + t), x0, t0, t1, tolerance=tolerance)
    back = integrate(lambda t, x: torch.sin(x + t), there.x1, t1, t0, tolerance=tolerance)
    assert there.times[0] == t0
    assert there.times[-1] == t1
    assert all((b - a) * (t1 - t0) > 0 for a, b in zip(there.times, there.times[1:], strict=False))
    assert (back.x1 - x0).abs().max() < 500 * rtol


def test_gradients_flow_through_accepted_steps():
    x0 = torch.randn(2, 3, dtype=D, requires_grad=True)
    flow = lambda x, **options: integrate(lambda t, x: torch.sin(x), x, 0.0, 1.0, **options).x1  # noqa: E731
    torch.autograd.gradcheck(lambda x: flow(x, steps=4), x0)
    (exact,) = torch.autograd.grad(flow(x0, steps=100, solver="rk4").square().sum(), x0)
    (adaptive,) = torch.autograd.grad(flow(x0, tolerance=Tolerance(1e-7, 1e-7)).square().sum(), x0)
    torch.testing.assert_close(adaptive, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.ones(2, 2, dtype=torch.long)}, TypeError, "x0 must be floating or complex, got torch.int64"),
        ({"x0": torch.ones(0, 2)}, ValueError, "x0 must hold at least one number"),
        ({"x0": torch.ones(2), "control": "sample"}, ValueError, r"x0 must have shape \(B, \*S\)"),
        ({"x0": [1.0]}, TypeError, "x0 must be a tensor"),
        ({"x0": (torch.ones(2, 1), torch.ones(3))}, ValueError, "x0 must have one batch size"),
        ({"control": "each"}, ValueError, "control must be 'batch' or 'sample', got 'each'"),
        ({"gradient": "adjoint"}, ValueError, "gradient must be 'direct', 'checkpoint', 'backsolve' or 'reversible'"),
        ({"gradient": "backsolve"}, ValueError, "needs a torch module as field, or parameters"),
        ({"gradient": "checkpoint", "keep": "steps"}, ValueError, "leave out keep='steps'"),
        ({"gradient": "backsolve", "control": "sample"}, ValueError, "needs one time for the batch"),
        ({"on_limit": "warn"}, ValueError, "on_limit must be 'raise' or 'return'"),
        ({"control": "sample", "steps": 3}, ValueError, "leave out steps"),
        ({"control": "sample", "controller": lambda *_: None}, TypeError, r"controller must have a method each\(\)"),
        ({"control": "sample", "t1": torch.ones(3)}, ValueError, r"t1 must be a number or have shape \(2,\)"),
        ({"t1": torch.ones(2)}, ValueError, "t1 must be a number, got shape"),
        ({"x0": torch.tensor([[1.0], [math.nan]])}, ValueError, r"x0 must be finite.*sample\(s\) \[1\]"),
        ({"t1": math.inf}, ValueError, "t1 must be finite"),
        ({"solver": "rk5"}, ValueError, "unknown solver"),
        ({"solver": "euler"}, ValueError, "euler carries no embedded error, by which steps are chosen: take steps=n"),
        ({"steps": 0}, ValueError, "steps must be a whole number, at least 1"),
        ({"steps": 2.5}, ValueError, "steps must be a whole number"),
        ({"steps": True}, ValueError, "steps must be a whole number"),
        ({"tolerance": 1e-3}, TypeError, "tolerance must be a Tolerance"),
        ({"controller": I}, TypeError, r"controller must be a step-size rule, as I\(\)"),
        ({"controller": lambda *_: 0.1}, TypeError, "controller must return a ControllerState, got float"),
        ({"event": 0.5}, TypeError, "event must be a function"),
        ({"args": torch.zeros(1)}, TypeError, "args must be a tuple"),
        ({"t0": None}, TypeError, "t0 must be a number"),
        ({"t0": -1e308, "t1": 1e308}, ValueError, "t1 - t0 must be finite"),
        ({"t1": 1e300, "steps": 2}, ValueError, "t1 - t0 must be finite in the precision of x0"),
        ({"t0": 1e300, "t1": 1.000000000000001e300}, SolverError, "steps grow beyond"),
        ({"steps": 2, "controller": I()}, ValueError, "steps excludes tolerance and controller"),
        ({"keep": "all"}, ValueError, "keep must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"field": decay, "x0": torch.ones(2, 2), "t0": 0.0, "t1": 1.0} | change
    with pytest.raises(error, match=message):
        integrate(**arguments)


class Energy(torch.nn.Module):
    """A Hamiltonian field, by autograd inside; with ``alone`` it asks for what it needs itself."""

    def __init__(self, alone):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        self.alone = alone

    def forward(self, t, y):
        if not self.alone:
            (slope,) = torch.autograd.grad(self.net(y).sum(), y, create_graph=True)
        else:
            with torch.enable_grad():
                y = y if y.requires_grad else y.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.net(y).sum(), y, create_graph=torch.is_grad_enabled())
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)


EVENTS = [{}, {"event": lambda t, x: x[:, 0] - 1.02}]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("options", [{"steps": 30}, {"solver": "heun"}, *CONTROLS, {"keep": "steps", "solver": "heun"}])
def test_a_field_may_differentiate_inside(options, event):
    """Its own first-step probe, rejected steps, events and interpolants included."""
    plain, alone = Energy(alone=False), Energy(alone=True)
    alone.load_state_dict(plain.state_dict())
    tolerance = None if "steps" in options else Tolerance(1e-5, 1e-7, first_step=None)
    result = []
    for field in (plain, alone):
        x0 = torch.ones(3, 2, dtype=D, requires_grad=True)
        solution = integrate(field, x0, 0.0, 1.0, tolerance=tolerance, **options, **event)
        result.append((solution.x1, torch.autograd.grad(solution.x1.square().sum(), x0)[0]))
    torch.testing.assert_close(*result)
    with torch.no_grad():
        solution = integrate(alone, torch.ones(3, 2, dtype=D), 0.0, 1.0, tolerance=tolerance, **options)
    energies = [alone.net(x).sum().item() for x in (torch.ones(3, 2, dtype=D), solution.x1)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-4)


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 2, "solver": "rk4", "keep": "steps"}, *CONTROLS])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_field_that_overwrites_the_state_is_refused_in_every_mode(options, gradient):
    if options.get("keep") == "steps":
        gradient = "direct"
    x0 = torch.tensor([[-1.0, 2.0]])
    with pytest.raises(ValueError, match="stage 0 changed x in place"):
        integrate(lambda t, x: -x.relu_(), x0, 0.0, 1.0, gradient=gradient, **options)
    with pytest.raises(ValueError, match="stage 0 changed x in place"):  # a part of a tuple
        integrate(lambda t, s: (s[1].neg_(), s[0] + 0), (x0, x0 + 1), 0.0, 1.0, **options)


@pytest.mark.parametrize(
    "options", [*CONTROLS, {"tolerance": Tolerance(first_step=0.1)}, {"steps": 3}, {"steps": 3, "solver": "rk4"}]
)
def test_a_field_that_reuses_its_memory_is_refused(options):
    buffer = torch.empty(2, 1)

    def reusing(t, x):
        torch.mul(x, -1.0, out=buffer)
        return buffer

    with pytest.raises(ValueError, match="stage 0 was overwritten"):
        integrate(reusing, torch.ones(2, 1), 0.0, 1.0, **options)
    with pytest.raises(ValueError, match="stage 0 was overwritten"):  # by a later step
        integrate(reusing, torch.ones(2, 1), 0.0, 1.0, solver="euler", steps=3, keep="steps")


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda t, x: None, TypeError, "must return a tensor, got NoneType at stage 0"),
        (lambda t, x: (x,), TypeError, "must return a tensor, got tuple at stage 0"),
        (lambda t, x: x[:1], ValueError, r"keep the shape of x: stage 0 has shape \(1, 2\)"),
        (lambda t, x: x.double(), TypeError, "keep the dtype of x: stage 0"),
    ],
)
def test_the_first_call_of_an_adaptive_solve_is_checked_as_any_stage(control, wrong, error, message):
    with pytest.raises(error, match=message):
        integrate(wrong, torch.ones(2, 2), 0.0, 1.0, control=control)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
@pytest.mark.parametrize("options", [{"steps": 3}, *CONTROLS])
def test_no_time_is_the_first_state_and_no_field_call(gradient, options):
    """Not even where the velocity is infinite."""
    if gradient == "backsolve" and "control" in options:
        pytest.skip("needs one time for the batch")
    field = Counted(lambda t, x: x / t)
    x0 = torch.randn(3, 2, requires_grad=True)
    parameters = () if gradient == "backsolve" else None
    solution = integrate(field, x0, 0.0, 0.0, gradient=gradient, parameters=parameters, **options)
    (gradient_of_x0,) = torch.autograd.grad(solution.x1.sum(), x0)
    assert torch.equal(solution.x1, x0)
    assert torch.equal(gradient_of_x0, torch.ones(3, 2))
    assert field.calls == 0


def _gradient_of_energy(t, x):
    with torch.enable_grad():
        return -torch.autograd.grad(x.requires_grad_().pow(2).sum() / 2, x)[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 3, "solver": "euler"}, {"control": "sample"}, {"gradient": "backsolve"}, {"keep": "steps"}],
    ids=str,
)
def test_a_field_that_asks_gradients_of_its_input_leaves_no_mark_without_gradients(options):
    x0 = torch.ones(2, 3)
    with torch.no_grad():
        solution = integrate(_gradient_of_energy, x0, 0.0, 1.0, **options)
        reference = integrate(_gradient_of_energy, x0.clone().requires_grad_(), 0.0, 1.0, **options)
    assert not any(x.requires_grad for x in (x0, solution.x1, *solution.states))
    assert torch.equal(solution.x1, reference.x1.detach())
    tuples = torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1)
    with torch.no_grad():
        integrate(lambda t, x: (x[1], -x[0]), tuples, 0.0, 1.0, keep="states")
    assert tuples[0].requires_grad
