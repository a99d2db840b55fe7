"""Gradients through roots."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from odenets import Flow, MLPField, NeuralODE
from solvers import RootFinder, Tolerance, get_tableau, integrate
from tests.solvers.implicit.stiff import PROBLEMS, sensitivities
from tests.solvers.problems import D

NAMES = ["implicit_euler", "implicit_midpoint", "trapezoid", "kvaerno5"]


def field(t, x, a, b):
    return -torch.sinh(x) @ (a @ a.T) + b * math.cos(3 * t) * x.flip(1)


def inputs():
    a = torch.randn(3, 3, dtype=D, requires_grad=True)
    return torch.randn(2, 3, dtype=D, requires_grad=True), a, torch.tensor(1.3, dtype=D, requires_grad=True)


@pytest.mark.parametrize("finder", ["newton", "newton_krylov"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_implicit_function(name, finder):
    tableau = get_tableau(name).solved_by(RootFinder(finder))
    assert torch.autograd.gradcheck(
        lambda x, a, b: integrate(field, x, 0.0, 1.0, args=(a, b), solver=tableau, steps=3).x1, inputs()
    )


@pytest.mark.parametrize("problem", [pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS])
def test_gradients_of_stiff_problems_are_forward_sensitivities(problem):
    f, x0, t1, k = PROBLEMS[problem]
    t1 = min(t1, 100.0)
    z0 = np.concatenate([x0[0].numpy(), np.zeros(len(k) * x0.shape[1])])
    exact = solve_ivp(
        sensitivities(f, k), (0, t1), z0, method="BDF" if len(z0) > 50 else "Radau", rtol=1e-8, atol=1e-12
    )
    exact = exact.y[x0.shape[1] :, -1].reshape(len(k), -1).sum(1)
    parameters = torch.tensor([k], dtype=D, requires_grad=True)
    x1 = integrate(f, x0, 0.0, t1, args=(parameters,), solver="kvaerno5", tolerance=Tolerance(1e-8, 1e-12)).x1
    weights = torch.ones_like(x1) if problem != "robertson" else torch.tensor([[1.0, 0.0, 0.0]], dtype=D)
    if problem == "robertson":  # whose sum is conserved
        exact = np.array([_robertson_share(f, x0, t1, k, j) for j in range(3)])
    (x1 * weights).sum().backward()
    np.testing.assert_allclose(parameters.grad[0].numpy(), exact, rtol=1e-4)


def _robertson_share(f, x0, t1, k, j):
    z0 = np.concatenate([x0[0].numpy(), np.zeros(9)])
    return solve_ivp(sensitivities(f, k), (0, t1), z0, method="Radau", rtol=1e-9, atol=1e-14).y[3 + 3 * j, -1]


@pytest.mark.parametrize("gradient", ["checkpoint", "backsolve"])
@pytest.mark.parametrize("steps", [None, 8])
def test_other_gradient_modes_agree(gradient, steps):
    how = {"steps": 8} if steps else {"tolerance": Tolerance(1e-7, 1e-9)}
    grads = []
    for mode in ("direct", gradient):
        torch.manual_seed(0)
        ode = NeuralODE(MLPField(3).double(), solver="kvaerno5", gradient=mode, **how)
        for p in ode.parameters():
            nn.init.normal_(p, std=0.3)
        x = torch.linspace(-1, 1, 12, dtype=D).view(4, 3).requires_grad_()
        ode(x).square().sum().backward()
        grads.append(torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in ode.parameters())]))
    exact = gradient == "checkpoint"
    torch.testing.assert_close(*grads, rtol=1e-6 if exact else 1e-3, atol=1e-7 if exact else 1e-4)


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
    (grad,) = torch.autograd.grad(x1.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
