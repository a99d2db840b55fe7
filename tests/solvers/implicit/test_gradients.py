"""Gradients through roots."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from torch.autograd import forward_ad

from odenets import Flow, MLPField, NeuralODE
from solvers import RootFinder, Tolerance, get_tableau, integrate
from tests.counting import Counted
from tests.solvers.implicit.stiff import PROBLEMS, sensitivities
from tests.solvers.problems import X0, D, decay

NAMES = ["implicit_euler", "implicit_midpoint", "trapezoid", "kvaerno5", "rodas4"]


def field(t, x, a, b):
    return -torch.sinh(x) @ (a @ a.T) + b * math.cos(3 * t) * x.flip(1)


def inputs():
    a = torch.randn(3, 1, dtype=D, requires_grad=True)
    return torch.randn(2, 3, dtype=D, requires_grad=True), a, torch.tensor(1.3, dtype=D, requires_grad=True)


@pytest.mark.parametrize("finder", [RootFinder("newton"), RootFinder("newton_krylov"), RootFinder(band=2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_implicit_function(name, finder):
    if name == "rodas4" and finder.method == "newton_krylov":
        pytest.skip("solves with its Jacobian")
    tableau = get_tableau(name).solved_by(finder)
    assert torch.autograd.gradcheck(
        lambda x, a, b: integrate(field, x, 0.0, 1.0, args=(a, b), solver=tableau, steps=2).x1, inputs()
    )


@pytest.mark.parametrize(
    ("problem", "component", "solver", "rtol"),
    [
        ("robertson", 0, "rodas4", 1e-8), ("robertson", 1, "kvaerno5", 1e-8), ("robertson", 2, "kvaerno5", 1e-8),
        ("van der pol", 0, "kvaerno5", 1e-10), ("reaction and diffusion", 49, "kvaerno5", 1e-8),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_gradients_of_stiff_problems_are_forward_sensitivities(problem, component, solver, rtol):
    """To t = 1e5 (Robertson), and over a jump (van der Pol), before which errors of a solve grow in its gradient."""
    f, x0, t1, k = PROBLEMS[problem]
    size = x0.shape[1]
    z0 = np.concatenate([x0[0].numpy(), np.zeros(len(k) * size)])
    how = (
        {"method": "BDF", "rtol": 1e-8, "atol": 1e-12}
        if size > 50
        else {"method": "Radau", "rtol": 1e-9, "atol": 1e-15}
    )
    exact = solve_ivp(sensitivities(f, k), (0, t1), z0, **how).y[size:, -1].reshape(len(k), size)[:, component]
    parameters = torch.tensor([k], dtype=D, requires_grad=True)
    tolerance = Tolerance(rtol, rtol * 1e-4, max_steps=100_000)
    integrate(f, x0, 0.0, t1, args=(parameters,), solver=solver, tolerance=tolerance).x1[0, component].backward()
    np.testing.assert_allclose(parameters.grad[0].numpy(), exact, rtol=1e-4)


def _gradient(solver, mode, how):
    torch.manual_seed(0)
    ode = NeuralODE(MLPField(3).double(), solver=solver, gradient=mode, **how)
    for p in ode.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.linspace(-1, 1, 12, dtype=D).view(4, 3).requires_grad_()
    calls = []
    ode.field.register_forward_hook(lambda *_: calls.append(1))
    ode(x).square().sum().backward()
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in ode.parameters())]), len(calls)


@pytest.mark.parametrize("how", [{"steps": 8}, {"tolerance": Tolerance(1e-7, 1e-9)}], ids=["steps", "tolerance"])
def test_backsolve_agrees(how):
    grads = [_gradient("kvaerno5", mode, how)[0] for mode in ("direct", "backsolve")]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


ADAPTIVE = {"tolerance": Tolerance(1e-7, 1e-9)}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, {"steps": 8}) for name in NAMES if name != "rodas4"),
        ("kvaerno5", ADAPTIVE),
        ("kvaerno5", ADAPTIVE | {"control": "sample"}),
    ],
)
def test_checkpoint_agrees_and_calls_the_field_at_most_four_times_as_often(name, how):
    (direct, few), (again, many) = (_gradient(name, mode, how) for mode in ("direct", "checkpoint"))
    torch.testing.assert_close(direct, again, rtol=1e-6, atol=1e-7)
    assert many <= 4.5 * few


def test_checkpoint_counts_the_calls_of_its_iterations():
    counted = Counted(decay)
    solution = integrate(counted, X0, 0.0, 1.0, solver="kvaerno5", steps=5, gradient="checkpoint", at=[0.3])
    assert solution.stats.evaluations == counted.calls > 5 * 6


def test_checkpoint_takes_steps_that_only_the_tolerance_of_the_solve_finds():
    field, x0, _, k = PROBLEMS["robertson"]
    rates = torch.tensor([k, k], dtype=D) * torch.tensor([[1.0], [1.3]], dtype=D)
    grads = []
    for mode in ("direct", "checkpoint"):
        parameters = rates.clone().requires_grad_()
        x1 = integrate(
            field, x0.expand(2, -1).clone(), 0.0, 100.0, args=(parameters,), solver="kvaerno5", control="sample",
            tolerance=Tolerance(1e-6, 1e-10), gradient=mode,
        ).x1  # fmt: skip
        grads.append(torch.autograd.grad(x1[:, 0].sum(), parameters)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=0)


def test_no_sample_loses_its_gradient_beside_one_at_rest():
    """A finished sample takes steps of size 0, whose iteration has no rate."""
    rates = torch.tensor([[1.0], [1e3], [30.0]], dtype=D, requires_grad=True)
    ends = [0.1, 1.0, 1.0]

    def solve(rates):
        return integrate(
            lambda t, x: -rates * (x - torch.cos(t)), torch.ones(3, 1, dtype=D), 0.0, ends, solver="kvaerno5",
            control="sample", tolerance=Tolerance(1e-10, 1e-12),
        ).x1  # fmt: skip

    (grad,) = torch.autograd.grad(solve(rates).sum(), rates)
    e, k = 1e-5, rates.detach()
    torch.testing.assert_close(grad, (solve(k * (1 + e)) - solve(k * (1 - e))) / (2 * e * k), rtol=1e-4, atol=1e-9)


def test_forward_mode_is_refused():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.tensor([[0.5]], dtype=D), torch.ones(1, 1, dtype=D))
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative: take torch.autograd.grad, or an explicit"):
            integrate(lambda t, x: -(x**3), x, 0.0, 1.0, solver="implicit_midpoint", steps=2)


def test_gradients_to_output_times_and_to_an_event():
    rate = torch.tensor(2.0, dtype=D, requires_grad=True)
    at = torch.tensor([0.5, 1.0], dtype=D, requires_grad=True)
    options = {"solver": "kvaerno5", "tolerance": Tolerance(1e-9, 1e-11, max_step=0.05), "args": (rate,)}
    fall = lambda t, x, rate: -rate * x  # noqa: E731
    states = integrate(fall, torch.ones(1, 1, dtype=D), 0.0, at=at, **options).states
    (slope,) = torch.autograd.grad(states.sum(), at)
    torch.testing.assert_close(slope, -2 * torch.exp(-2 * at), rtol=1e-5, atol=0)
    time = integrate(fall, torch.ones(1, 1, dtype=D), 0.0, 2.0, event=lambda t, x: x - 0.5, **options).event_time
    (slope,) = torch.autograd.grad(time, rate)
    assert slope.item() == pytest.approx(-math.log(2) / 4, rel=1e-6)


def test_samples_with_steps_of_their_own():
    rates = torch.tensor([[1.0], [1e3], [30.0]], dtype=D, requires_grad=True)
    x1 = integrate(
        lambda t, x: -rates * (x - torch.cos(t)), torch.ones(3, 1, dtype=D), 0.0, 1.0, solver="kvaerno5",
        control="sample", tolerance=Tolerance(1e-10, 1e-12),
    ).x1  # fmt: skip
    (grad,) = torch.autograd.grad(x1.sum(), rates)

    def exact(k):  # of x' = -k (x - cos t), x(0) = 1
        slow = (k * k * math.cos(1.0) + k * math.sin(1.0)) / (1 + k * k)
        return slow + torch.exp(-k) * (1 - k * k / (1 + k * k))

    (expected,) = torch.autograd.grad(exact(rates).sum(), rates)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-12)


def test_fast_modes_have_no_gradient():
    """What a stable method damps, no gradient comes back from."""
    x0 = torch.tensor([[2.0]], dtype=D, requires_grad=True)
    x1 = integrate(lambda t, x: -1e6 * (x - 1), x0, 0.0, 1.0, solver="implicit_euler", steps=10).x1
    assert torch.autograd.grad(x1.sum(), x0)[0].abs().item() < 1e-40


def test_an_implicit_flow_learns():
    torch.manual_seed(0)
    flow = Flow(MLPField(2), solver="implicit_euler", depth=3)
    x, y = torch.randn(64, 2), torch.randn(64, 1).expand(64, 2)
    optimizer, losses = torch.optim.Adam(flow.parameters(), lr=0.02), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (flow(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_samples_that_depend_on_each_other_have_the_right_gradient():
    x0 = torch.randn(3, 2, dtype=D, requires_grad=True)

    def coupled(t, x):
        return -x + 0.3 * torch.tanh(x.mean(0, keepdim=True))

    assert torch.autograd.gradcheck(lambda x: integrate(coupled, x, 0.0, 1.0, solver="trapezoid", steps=2).x1, (x0,))


def test_a_second_derivative_is_refused():
    x, a, b = inputs()
    x1 = integrate(field, x, 0.0, 1.0, args=(a, b), solver="implicit_euler", steps=2).x1
    with pytest.raises(RuntimeError, match=r"no second derivatives \(create_graph=True\): take an explicit method"):
        torch.autograd.grad(x1.sum(), x, create_graph=True)
