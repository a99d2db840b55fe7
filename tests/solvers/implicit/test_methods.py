"""Implicit methods: orders, stability, invariants, and other solvers as referees."""

import math
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import fsolve

from odenets import NeuralODE, measures
from solvers import ButcherTableau, RootFinder, Tolerance, get_tableau, integrate, odeint, odeint_adjoint, rk_step
from solvers.implicit.banded import Banded, banded_jacobian
from solvers.implicit.linear import Dense, jacobian
from tests.counting import Counted
from tests.solvers.implicit.stiff import PROBLEMS, for_scipy, robertson
from tests.solvers.problems import X0, D, close, decay, lotka

ORDERS = {"implicit_euler": 1, "implicit_midpoint": 2, "trapezoid": 2, "rodas4": 4, "kvaerno5": 5}


def wave(t, x):
    """Non-autonomous and nonlinear; a table with shifted nodes has order one on it."""
    return x * math.cos(t) - 0.1 * x * x


def stiff(t, x):
    return -1e6 * (x - math.cos(t))


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_orders_on_a_problem_that_depends_on_time(name, order):
    start = torch.tensor([[1.0, 0.5]], dtype=D)
    exact = solve_ivp(lambda t, y: wave(t, y), (0, 2), [1.0, 0.5], method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
    errors = [
        np.abs(integrate(wave, start, 0.0, 2.0, solver=name, steps=n).x1.numpy()[0] - exact).max()
        for n in ((80, 160) if name == "rodas4" else (10, 20))
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("name", "order"), [("kvaerno5", 5), ("rodas4", 4)])
def test_orders_of_the_embedded_errors(name, order):
    x, tableau = torch.tensor([[1.0, 0.5]], dtype=D), get_tableau(name)
    errors = [rk_step(wave, 0.3, x, h, tableau).error().abs().max() for h in (0.1, 0.05)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize(("name", "local"), [("trapezoid", 1.8), ("rodas4", 3.4), ("kvaerno5", 4.6)])
def test_orders_of_states_inside_a_step(name, local):
    start = torch.tensor([[1.0, 0.5]], dtype=D)
    errors = []
    for n in (80, 160) if name == "rodas4" else (10, 20):
        solution = integrate(wave, start, 0.0, 2.0, solver=name, steps=n, keep="steps")
        inside = solution(solution.times[4] + 0.3 * 2 / n)
        there = integrate(wave, start, 0.0, solution.times[4] + 0.3 * 2 / n, solver="dopri5", steps=400).x1
        errors.append((inside - there).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > local


@pytest.mark.parametrize(("name", "bound"), [("kvaerno5", 1e-4), ("rodas4", 1e-3)])
def test_states_inside_steps_of_a_stiff_problem(name, bound):
    """Prothero and Robinson's, whose solution is cos t whatever the rate."""
    for rate in (1.0, 1e3, 1e6):
        solution = integrate(
            lambda t, x, rate=rate: -rate * (x - math.cos(t)) - math.sin(t), torch.ones(1, 1, dtype=D), 0.0, 2.0,
            solver=name, steps=20, keep="steps",
        )  # fmt: skip
        assert max(abs(solution(t).item() - math.cos(t)) for t in np.linspace(0, 2, 101)) < bound


@pytest.mark.parametrize(
    ("name", "damps"), [("implicit_euler", True), ("kvaerno5", True), ("rodas4", True), ("trapezoid", False)]
)
def test_l_stable_methods_damp_what_is_fast(name, damps):
    x1 = integrate(stiff, torch.tensor([[2.0]], dtype=D), 0.0, 3.0, solver=name, steps=30).x1.item()
    assert (abs(x1 - math.cos(3.0)) < 1e-5) is damps  # the trapezoidal rule turns the sign of a fast mode at each step


def test_adaptive_steps_grow_beyond_what_is_fast():
    solution = integrate(
        stiff, torch.tensor([[2.0]], dtype=D), 0.0, 3.0, solver="kvaerno5", tolerance=Tolerance(1e-6, 1e-8)
    )
    assert abs(solution.x1.item() - math.cos(3.0)) < 1e-6
    assert solution.stats.accepted < 60


@pytest.mark.parametrize("name", ["trapezoid", "implicit_midpoint"])
def test_quadratic_invariants_of_linear_problems_are_kept(name):
    turn = torch.tensor([[0.0, 3.0, -1.0], [-3.0, 0.0, 2.0], [1.0, -2.0, 0.0]], dtype=D)
    x0 = torch.randn(4, 3, dtype=D)
    x1 = integrate(lambda t, x: x @ turn.T, x0, 0.0, 100.0, solver=name, steps=500).x1
    torch.testing.assert_close(x1.norm(dim=1), x0.norm(dim=1), rtol=1e-9, atol=0)


@cache
def by_radau(problem):
    field, x0, t1, k = PROBLEMS[problem]
    velocity, jacobian = for_scipy(field, k)
    return solve_ivp(velocity, (0, t1), x0[0].numpy(), method="Radau", jac=jacobian, rtol=1e-10, atol=1e-14).y[:, -1]


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        pytest.param(problem, solver, marks=[pytest.mark.slow] * ((problem, solver) == ("van der pol", "rodas4")))
        for problem, solver in product(PROBLEMS, ["kvaerno5", "rodas4"])
    ],
)
def test_stiff_problems_agree_with_radau(problem, solver):
    field, x0, t1, k = PROBLEMS[problem]
    solution = integrate(
        field, x0, 0.0, t1, args=(torch.tensor([k], dtype=D),), solver=solver, tolerance=Tolerance(1e-8, 1e-13)
    )
    np.testing.assert_allclose(solution.x1[0].numpy(), by_radau(problem), rtol=1e-5)


@pytest.mark.parametrize(("name", "node", "old"), [("implicit_euler", 1.0, 0.0), ("implicit_midpoint", 0.5, 0.5)])
def test_steps_are_the_roots_that_scipy_finds(name, node, old):
    x, h = X0[0].numpy(), 0.2

    def equation(y):
        return y - x - h * lotka(0.0, torch.from_numpy(old * x + (1 - old) * y)).numpy()

    root = fsolve(equation, x, xtol=1e-12)
    np.testing.assert_allclose(rk_step(lotka, 0.0, X0, h, get_tableau(name)).x1[0].numpy(), root, rtol=1e-10)
    assert get_tableau(name).c == (node,)


def test_samples_are_solved_as_if_each_were_alone():
    rates = torch.tensor([[0.04, 1e4, 3e7], [0.01, 1e3, 1e6], [1.0, 10.0, 1e2]], dtype=D)
    x0, tolerance = torch.tensor([[1.0, 0.0, 0.0]], dtype=D), Tolerance(1e-7, 1e-11)
    together = integrate(
        robertson, x0.expand(3, -1).clone(), 0.0, 100.0, args=(rates,), solver="kvaerno5", control="sample",
        tolerance=tolerance,
    )  # fmt: skip
    for i in range(3):
        alone = integrate(robertson, x0, 0.0, 100.0, args=(rates[i : i + 1],), solver="kvaerno5", tolerance=tolerance)
        torch.testing.assert_close(together.x1[i], alone.x1[0], rtol=1e-5, atol=1e-9)
    assert len(set(together.sample_stats.accepted.tolist())) > 1


@pytest.mark.parametrize("finder", ["newton", "newton_krylov", "fixed_point"])
def test_all_root_finders_find_the_same_stages(finder):
    tableau = get_tableau("kvaerno5").solved_by(RootFinder(finder))
    close(
        integrate(lotka, X0, 0.0, 1.0, solver=tableau, steps=20).x1,
        integrate(lotka, X0, 0.0, 1.0, solver="dopri5", steps=200).x1,
    )


def test_images_take_no_matrix():
    class Diffusion(torch.nn.Module):
        def __init__(self):
            super().__init__()
            kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=D)
            self.rate = torch.nn.Parameter(torch.tensor(50.0, dtype=D))
            self.register_buffer("kernel", kernel[None, None])

        def forward(self, t, x):
            return self.rate * torch.nn.functional.conv2d(x, self.kernel, padding=1)

    field, x0 = Diffusion(), torch.rand(2, 1, 16, 16, dtype=D)
    solution = integrate(field, x0, 0.0, 0.1, solver="kvaerno5", tolerance=Tolerance(1e-7, 1e-9))
    steps = integrate(field, x0, 0.0, 0.1, solver="dopri5", tolerance=Tolerance(1e-10, 1e-12))
    torch.testing.assert_close(solution.x1, steps.x1, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(solution.x1.square().sum(), field.rate)
    (other,) = torch.autograd.grad(steps.x1.square().sum(), field.rate)
    torch.testing.assert_close(grad, other, rtol=1e-5, atol=0)


def test_events_output_times_and_measures_of_implicit_steps():
    start = torch.ones(2, 1, dtype=D)
    options = {"solver": "kvaerno5", "tolerance": Tolerance(1e-8, 1e-10, max_step=0.1)}
    solution = integrate(lambda t, x: -x, start, 0.0, 2.0, at=[0.3, 1.1], keep="steps", **options)
    torch.testing.assert_close(
        solution.states[:, 0, 0], torch.tensor([0.3, 1.1], dtype=D).neg().exp(), rtol=1e-6, atol=0
    )
    assert solution(0.7)[0].item() == pytest.approx(math.exp(-0.7), rel=1e-6)
    met = integrate(lambda t, x: -x, start, 0.0, 2.0, event=lambda t, x: x - 0.5, **options)
    assert met.event_time.item() == pytest.approx(math.log(2), rel=1e-6)
    step = solution.steps[0]
    torch.testing.assert_close(step.x0 + step.h * step.residue, step.x1, rtol=1e-14, atol=0)
    total = sum(measures.action(step) for step in solution.steps)
    torch.testing.assert_close(total, torch.full((2,), (1 - math.exp(-4.0)) / 2, dtype=D), rtol=1e-6, atol=0)


def test_field_calls_are_counted_and_jacobians_kept():
    counted = Counted(decay)
    solution = integrate(counted, X0, 0.0, 1.0, solver="kvaerno5", steps=5)
    assert solution.stats.evaluations == counted.calls
    # linear: one Jacobian of one call, the first velocity, and per implicit stage at most three calls
    assert counted.calls <= 2 + 5 * 6 * 3


def test_a_diagonally_implicit_table_of_ones_own():
    g = 1 - 1 / math.sqrt(2)
    sdirk2 = ButcherTableau("sdirk2", order=2, c=(g, 1.0), a=((g,), (1 - g, g)), b=(1 - g, g))
    errors = [
        (integrate(decay, X0, 0.0, 2.0, solver=sdirk2, steps=n).x1 - integrate(decay, X0, 0.0, 2.0, steps=400).x1).abs()
        for n in (20, 40)
    ]
    assert math.log2(errors[0].max() / errors[1].max()) == pytest.approx(2, abs=0.1)
    assert sdirk2.implicit
    assert not sdirk2.fsal
    with pytest.raises(ValueError, match=r"sdirk2 has no velocity at the start of its steps.*give the table dense="):
        integrate(decay, X0, 0.0, 2.0, solver=sdirk2, steps=4, keep="steps")(0.1)


def test_a_neural_ode_takes_an_implicit_method():
    class Stiff(torch.nn.Linear):
        def forward(self, t, x):
            return torch.tanh(super().forward(x)) - 30 * x

    field = Stiff(2, 2).double()
    ode = NeuralODE(field, solver="kvaerno5", tolerance=Tolerance(1e-8, 1e-10), control="sample")
    y, records = ode.record(X0, action=measures.action)
    other = NeuralODE(field, solver="dopri5", tolerance=Tolerance(1e-9, 1e-11))(X0)
    close(y, other)
    assert records["action"].shape[1] == len(X0)


@pytest.mark.parametrize("adjoint", [False, True])
def test_odeint_takes_them_with_gradients(adjoint):
    rate = torch.nn.Parameter(torch.tensor(30.0, dtype=D))
    solve = partial(odeint_adjoint, adjoint_params=(rate,)) if adjoint else odeint
    t = torch.tensor([0.0, 0.5, 1.0], dtype=D)

    def fall(t, y):
        return -rate * (y - torch.cos(t))

    y = solve(fall, torch.ones(3, 2, dtype=D), t, method="kvaerno5")
    exact = (rate**2 * torch.cos(t) + rate * torch.sin(t) + torch.exp(-rate * t)) / (1 + rate**2)
    torch.testing.assert_close(y[:, 0, 0], exact, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(value, rate)[0] for value in (y[-1, 0, 0], exact[-1])]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=0)
    fixed = odeint(fall, torch.ones(3, 2, dtype=D), t, method="trapezoid", options={"step_size": 0.005})
    torch.testing.assert_close(fixed[:, 0, 0], exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("big", [1e-3, 1.0, 1e4, 1e8])
def test_small_components_are_found_beside_large_ones(big):
    """Stages of fixed steps are found component by component, in float32 too."""

    def field(t, x):
        return torch.stack([0 * x[:, 0], -1e4 * torch.sinh(x[:, 1])], 1)

    x0 = torch.tensor([[big, 3.0]])
    x1 = integrate(field, x0, 0.0, 1e-3, solver="implicit_euler", steps=10).x1
    assert x1[0, 1].item() == pytest.approx(0.0024311, rel=1e-4)


@pytest.mark.parametrize("name", ["implicit_euler", "trapezoid", "kvaerno5"])
@pytest.mark.parametrize("slope", [30.0, 100.0, 300.0])
def test_saturating_fields_have_their_one_root_found(name, slope):
    for start in torch.linspace(-3, 3, 25, dtype=D):
        x = start.view(1, 1)
        x1 = rk_step(lambda t, x: -slope * torch.tanh(x), 0.0, x, 0.1, get_tableau(name)).x1
        if name == "implicit_euler":
            close(x1 + 0.1 * slope * torch.tanh(x1), x)


@pytest.mark.parametrize("transposed", [False, True])
def test_banded_systems_are_those_of_whole_matrices(transposed):
    x, scale = torch.randn(3, 7, dtype=D), torch.tensor([0.1, 0.7, 2.0], dtype=D).view(3, 1)
    weights = torch.randn(3, 7, 7, dtype=D).tril(2).triu(-2)
    field = lambda t, x: torch.tanh(torch.einsum("bij,bj->bi", weights, x))  # noqa: E731
    matrix, bands = jacobian(field, 0.0, x), banded_jacobian(field, 0.0, x, 2)
    r = torch.randn_like(x)
    solutions = [
        system.solve_transposed(r) if transposed else system.solve(r)
        for system in (Dense(matrix, scale), Banded(bands, scale))
    ]
    torch.testing.assert_close(*solutions, rtol=1e-10, atol=1e-12)


def test_a_band_gives_the_same_solution_with_few_products():
    field, x0, t1, k = PROBLEMS["reaction and diffusion"]
    rates = torch.tensor([k], dtype=D, requires_grad=True)
    solutions = [
        integrate(
            field, x0, 0.0, t1, args=(rates,), solver=get_tableau("kvaerno5").solved_by(RootFinder(band=band)),
            tolerance=Tolerance(1e-7, 1e-10),
        ).x1
        for band in (None, 1)
    ]  # fmt: skip
    torch.testing.assert_close(*solutions, rtol=1e-7, atol=1e-10)
    grads = [torch.autograd.grad(x1.sum(), rates)[0] for x1 in solutions]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


def test_a_band_solves_lines_of_thousands_of_points():
    points = 4000
    x0 = torch.sin(math.pi * torch.arange(1, points + 1, dtype=D) / (points + 1))[None]

    def heat(t, x):
        padded = torch.nn.functional.pad(x, (1, 1))
        return (padded[:, 2:] - 2 * x + padded[:, :-2]) * (points + 1) ** 2

    solver = get_tableau("kvaerno5").solved_by(RootFinder(band=1))
    x1 = integrate(heat, x0, 0.0, 0.1, solver=solver, tolerance=Tolerance(1e-6, 1e-10)).x1
    torch.testing.assert_close(x1, x0 * math.exp(-(math.pi**2) * 0.1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("solver", ["kvaerno5", "rodas4"])
def test_output_times_are_ends_of_steps_which_grow_beyond_what_is_inside(solver, control):
    """A step of a stiff method may be longer than the waves of what it follows."""
    at = torch.tensor([1.0, 5.0, 9.0], dtype=D)
    options = {"solver": solver, "control": control, "at": at, "keep": "steps"}
    field = lambda t, x: -1e4 * (x - torch.as_tensor(t, dtype=D).cos())  # noqa: E731
    solution = integrate(field, torch.ones(3, 1, dtype=D), 0.0, 10.0, **options)
    torch.testing.assert_close(solution.states[..., 0], at.cos()[:, None].expand(-1, 3), rtol=0, atol=2e-4)
    ends = torch.stack([torch.as_tensor(t, dtype=D).expand(3) for t in solution.step_times])
    assert all((ends == t).any(0).all() for t in at)
    assert len(ends) <= 20
