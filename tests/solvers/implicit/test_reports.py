"""What others' trackers report of stiff solvers."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from solvers import RootFinder, Tolerance, get_tableau, integrate
from tests.solvers.problems import D

SOLVERS = ["kvaerno5", "rodas4"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_sample_near_its_steady_state_does_not_stall_one_that_moves(solver, control):
    rates = torch.tensor([[1e-3], [1e6], [1e2]], dtype=D)
    field = lambda t, x: -rates * (x**3 - torch.cos(torch.as_tensor(t, dtype=D)))  # noqa: E731
    x0, tolerance = torch.tensor([[1.0], [2.0], [-1.0]], dtype=D), Tolerance(1e-5, 1e-8)
    together = integrate(field, x0, 0.0, 1.0, solver=solver, control=control, tolerance=tolerance).x1
    for i in range(3):
        alone = lambda t, x, k=rates[i : i + 1]: -k * (x**3 - math.cos(t))  # noqa: E731
        x1 = integrate(alone, x0[i : i + 1], 0.0, 1.0, solver=solver, tolerance=tolerance).x1
        torch.testing.assert_close(together[i : i + 1], x1, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_of_a_stiff_linear_system_grow_as_the_tolerance_does(solver):
    size = 16
    lower = torch.diag(torch.arange(1, size, dtype=D).sqrt(), 1)
    jump = torch.linalg.matrix_power(lower, 4) - 16 * torch.eye(size, dtype=D)
    rate = jump.T @ jump
    start = torch.zeros(1, size, size, dtype=D)
    start[0, 0, 0] = 1
    whole = get_tableau(solver).solved_by(RootFinder("newton"))
    field = lambda t, x: jump @ x @ jump.T - 0.5 * (rate @ x + x @ rate)  # noqa: E731
    counts = [
        integrate(field, start, 0.0, 1.0, solver=whole, tolerance=Tolerance(tol, tol)).stats.accepted
        for tol in (1e-4, 1e-6)
    ]
    assert counts[0] < counts[1] < 50


@pytest.mark.parametrize("solver", SOLVERS)
def test_exponents_of_trial_states_may_be_large(solver):
    def field(t, x):
        u, v = x.unbind(1)
        return torch.stack([torch.expm1(30 - u - v) * 1e-3, torch.expm1(-3.26 - v) * 10.0], 1)

    x1 = integrate(field, torch.zeros(1, 2, dtype=D), 0.0, 100.0, solver=solver, tolerance=Tolerance(1e-6, 1e-8)).x1
    exact = solve_ivp(
        lambda t, y: field(t, torch.tensor(y)[None])[0].numpy(), (0, 100), [0.0, 0.0], "BDF", rtol=1e-9, atol=1e-11
    ).y[:, -1]
    np.testing.assert_allclose(x1[0].numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("power", [0, 5])
def test_fields_that_read_the_time_alone_or_through_numbers(solver, power):
    """A table that is looked up by ``float(t)`` has no derivative but by differences."""
    nodes = np.linspace(0, 3, 301)
    field = lambda t, x: (0.0 if power == 0 else -x) + float(np.interp(float(t), nodes, nodes**power)) + 0 * x  # noqa: E731
    tolerance = Tolerance(1e-6, 1e-8, max_step=0.05)
    x1 = integrate(field, torch.ones(1, 1, dtype=D), 0.0, 3.0, solver=solver, tolerance=tolerance).x1.item()
    exact = solve_ivp(lambda t, y: (0 if power == 0 else -y) + t**power, (0, 3), [1.0], rtol=1e-10, atol=1e-12).y[0, -1]
    assert x1 == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_doses_that_switch_on_and_off(solver):
    field = lambda t, x: -50 * x + (100.0 if t % 2 < 0.05 else 0.0)  # noqa: E731
    tolerance = Tolerance(1e-6, 1e-8, max_step=0.05)
    x1 = integrate(field, torch.zeros(1, 1, dtype=D), 0.0, 2.04, solver=solver, tolerance=tolerance).x1.item()
    assert x1 == pytest.approx(2 * (1 - math.exp(-50 * 0.04)), rel=1e-4)
