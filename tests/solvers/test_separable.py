import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import odenets
from odenets.measures import action
from solvers import Separable, Tolerance, get_tableau, integrate, rk_step
from solvers.methods.symplectic import SplitTableau, composition
from tests.counting import Counted
from tests.solvers.problems import D, rounding

METHODS = [("leapfrog", 2), ("yoshida4", 4)]
CALLS = {"leapfrog": (1, 1), "yoshida4": (3, 3)}
X0 = torch.tensor([[0.3, -0.5, 0.2, 0.9], [1.1, 0.4, -0.6, 0.1]], dtype=D)
each = pytest.mark.parametrize("method", CALLS)


def driven(velocity=lambda t, p: p * (1 + 0.3 * math.cos(t)) + 0.1 * p**3):
    """Neither half is autonomous or linear."""
    return Separable(velocity, lambda t, q: -q.sin() * (1 + 0.5 * math.sin(2 * t)))


def pendulum():
    return Separable(lambda t, p: p, lambda t, q: -q.sin())


def kepler():
    return Separable(lambda t, p: p, lambda t, q: -q / torch.linalg.vector_norm(q, dim=1, keepdim=True) ** 3)


class Halves(nn.Module):
    """A network for each half."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)

    def forward(self, t, x):
        return self.net(x) * torch.cos(torch.as_tensor(t))


def of_scipy(field, x0, t0, t1):
    flat = lambda t, y: field(t, torch.from_numpy(y).view_as(x0)).flatten().numpy()  # noqa: E731
    y = solve_ivp(flat, (t0, t1), x0.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.from_numpy(y).view_as(x0)


@pytest.mark.parametrize(("method", "order"), METHODS)
def test_errors_fall_with_the_order_on_a_problem_that_depends_on_time(method, order):
    exact = of_scipy(driven(), X0, 0.2, 2.2)
    errors = [
        (integrate(driven(), X0, 0.2, 2.2, solver=method, steps=n).x1 - exact).abs().max().item() for n in (40, 80, 160)
    ]
    assert np.log2(errors[:-1]) - np.log2(errors[1:]) == pytest.approx([order] * 2, abs=0.06)
    assert errors[-1] < {2: 1e-4, 4: 1e-7}[order]


@pytest.mark.parametrize(("method", "order"), METHODS)
def test_states_inside_steps_are_of_the_order_too(method, order):
    times = [0.513, 1.117, 1.931]
    exact = torch.stack([of_scipy(driven(), X0, 0.2, t) for t in times])
    errors = [
        (integrate(driven(), X0, 0.2, 2.2, solver=method, steps=n, at=times).states - exact).abs().max().item()
        for n in (40, 160)
    ]
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "energy", "x0", "h", "method"),
    [
        (pendulum, lambda q, p: p**2 / 2 - q.cos(), [[2.0, 0.0]], 0.05, "leapfrog"),
        (pendulum, lambda q, p: p**2 / 2 - q.cos(), [[2.0, 0.0]], 0.25, "yoshida4"),
        (kepler, lambda q, p: (p**2).sum(1) / 2 - 1 / q.norm(dim=1), [[0.8, 0.0, 0.0, 1.2247]], 0.02, "leapfrog"),
        (kepler, lambda q, p: (p**2).sum(1) / 2 - 1 / q.norm(dim=1), [[0.8, 0.0, 0.0, 1.2247]], 0.1, "yoshida4"),
    ],
)
def test_energy_stays_bounded_over_ten_thousand_steps_where_that_of_a_runge_kutta_method_drifts(
    field, energy, x0, h, method
):
    def drifts(solver, steps):
        x = torch.tensor(x0, dtype=D)
        with torch.no_grad():
            states = torch.cat(integrate(field(), x, 0.0, 10_000 * h, solver=solver, steps=steps).states)
        error = (energy(*states.chunk(2, 1)) - energy(*x.chunk(2, 1))).abs()
        return [half.max().item() for half in error[1:].chunk(2)]

    first, second = drifts(method, 10_000)
    assert second <= first * 1.001
    # Each call of a Runge-Kutta method is one of both halves.
    other, steps = ("heun", 5_000) if method == "leapfrog" else ("rk4", 7_500)
    before, after = drifts(other, steps)
    assert not after <= before * 1.2
    assert not after <= 3 * second


@each
def test_solved_backwards_it_returns(method):
    there = integrate(driven(), X0, 0.2, 5.2, solver=method, steps=100).x1
    back = integrate(driven(), there, 5.2, 0.2, solver=method, steps=100).x1
    torch.testing.assert_close(back, X0, rtol=1e-12, atol=1e-13)


@each
def test_a_step_is_symplectic(method):
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=D)
    gradient = Separable(lambda t, p: p @ a * (1 + t), lambda t, q: -(q.sum(1, keepdim=True).sin() + q**3))
    step = lambda x: rk_step(gradient, 0.3, x[None], 0.37, get_tableau(method)).x1[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(step, X0[0])
    omega = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D).kron(torch.eye(2, dtype=D))
    torch.testing.assert_close(jacobian.mT @ omega @ jacobian, omega, rtol=0, atol=1e-12)


@each
def test_halves_are_called_once_a_substep_and_the_last_force_is_the_next_first(method):
    velocity, force = Counted(lambda t, p: p), Counted(lambda t, q: -q)
    field, (velocities, forces) = Separable(velocity, force), CALLS[method]

    def calls(**options):
        velocity.calls = force.calls = 0
        stats = integrate(field, X0, 0.0, 1.0, solver=method, steps=10, **options).stats
        assert stats.evaluations == velocity.calls + force.calls
        assert stats.accepted == 10
        return velocity.calls, force.calls

    assert calls() == calls(keep="last") == calls(keep="steps") == (10 * velocities, 10 * forces + 1)
    assert calls(at=[0.1, 0.4, 1.0]) == (10 * velocities, 10 * forces + 1)
    assert calls(at=[0.13, 0.17, 0.4, 0.88]) == (10 * velocities + 2 * 2, 10 * forces + 1)
    first = velocities + forces + 1  # where each step begins anew
    checkpoint = {"gradient": "checkpoint", "keep": "last"}
    assert sum(calls(**checkpoint)) == 10 * first
    assert sum(calls(**checkpoint, at=[0.13, 0.4])) == 10 * first + 2
    with torch.no_grad():  # what looks for an event takes the interpolant of each step
        never = {"event": lambda t, x: x.new_ones(())}
        assert calls(**never) == (10 * (velocities + 2), 10 * forces + 1)


@each
def test_the_step_is_the_object_of_the_measures(method):
    tableau = get_tableau(method)
    step = rk_step(driven(), 0.2, X0, 0.3, tableau, reductions=("action", "residue"))
    p = torch.stack(step.stages)
    b = torch.tensor(tableau.b, dtype=D).view(-1, 1, 1)
    rounding(step.residue, (b * p).sum(0))
    rounding(step.x1, X0 + 0.3 * step.residue)
    rounding(action(step), 0.3 * (b * p**2).sum(0).mean(1))
    rounding(step.reductions["action"], action(step))
    one = step.select(torch.tensor([1]))
    rounding(one.residue, step.residue[1:])
    q0, p0 = X0.chunk(2, 1)
    if method == "leapfrog":
        half = p0 + 0.15 * driven().force(0.2, q0)
        rounding(p[0], torch.cat([driven().velocity(0.35, half), driven().force(0.2, q0)], 1))
        rounding(p[1], torch.cat([driven().velocity(0.35, half), driven().force(0.5, step.x1[:, :2])], 1))


@each
@pytest.mark.parametrize("options", [{}, {"gradient": "checkpoint", "keep": "last"}, {"at": [0.23, 0.5]}])
def test_tuples_and_tensors_agree(method, options):
    options = {"solver": method, "steps": 7, **options}
    whole = integrate(driven(), X0, 0.0, 1.0, **options)
    q, p = integrate(driven(), tuple(X0.chunk(2, 1)), 0.0, 1.0, **options).x1
    torch.testing.assert_close(torch.cat([q, p], 1), whole.x1, rtol=0, atol=0)
    shaped = X0.view(2, 2, 2, 1)  # (B, 2 d, *S)
    rows = integrate(driven(), shaped.reshape(2, 2, 2), 0.0, 1.0, **options).x1
    torch.testing.assert_close(rows.reshape(2, 4), whole.x1, rtol=0, atol=0)
    images = tuple(half.reshape(2, 1, 2, 1) for half in X0.chunk(2, 1))
    q, p = integrate(driven(), images, 0.0, 1.0, **options).x1
    assert q.shape == (2, 1, 2, 1)
    torch.testing.assert_close(torch.cat([q, p], 1).reshape(2, 4), whole.x1, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "leapfrog"])
def test_every_method_takes_a_separable_field_as_any(solver):
    steps = {} if solver == "dopri5" else {"steps": 400}
    tolerance = {"tolerance": Tolerance(rtol=1e-9, atol=1e-9)} if solver == "dopri5" else {}
    x1 = integrate(driven(), tuple(X0.chunk(2, 1)), 0.0, 1.0, solver=solver, **steps, **tolerance).x1
    torch.testing.assert_close(torch.cat(x1, 1), of_scipy(driven(), X0, 0.0, 1.0), rtol=1e-5, atol=1e-5)


def test_two_steps_of_velocity_verlet():
    """As its textbook writes it (Hairer, Lubich, Wanner, I.1.4)."""
    q, p = X0.chunk(2, 1)
    for _ in range(2):
        p = p - 0.1 * q.sin()
        q = q + 0.2 * p
        p = p - 0.1 * q.sin()
    rounding(integrate(pendulum(), X0, 0.0, 0.4, solver="leapfrog", steps=2).x1, torch.cat([q, p], 1))


@each
def test_gradients_are_those_of_the_steps(method):
    field, x = Separable(Halves(), Halves()), X0.clone().requires_grad_()
    weights = dict(field.named_parameters())
    assert len(weights) == 8

    def x1(x, *values, **options):
        def solve(field):
            return integrate(field, x, 0.0, 1.0, solver=method, steps=3, **options).x1

        whole = Solve(field, solve)
        return torch.func.functional_call(whole, dict(zip([f"field.{k}" for k in weights], values, strict=True)), ())

    assert torch.autograd.gradcheck(x1, (x, *weights.values()), fast_mode=True)
    direct = torch.autograd.grad(integrate(field, x, 0.0, 1.0, solver=method, steps=3).x1.sum(), [x, *weights.values()])
    options = {"solver": method, "steps": 3, "gradient": "checkpoint", "keep": "last"}
    again = torch.autograd.grad(integrate(field, x, 0.0, 1.0, **options).x1.sum(), [x, *weights.values()])
    torch.testing.assert_close(again, direct, rtol=1e-12, atol=1e-14)


class Solve(nn.Module):
    def __init__(self, field, solve):
        super().__init__()
        self.field, self.solve = field, solve

    def forward(self):
        return self.solve(self.field)


@each
def test_gradients_flow_to_output_times_and_through_an_event(method):
    at = torch.tensor([0.23, 0.77], dtype=D, requires_grad=True)
    solve = lambda at: integrate(driven(), X0, 0.0, 1.0, solver=method, steps=5, at=at).states  # noqa: E731
    assert torch.autograd.gradcheck(solve, (at,))
    x = X0[:1].clone().requires_grad_()

    def meets(x):
        event = lambda t, x: x[:, 0] - 0.1  # noqa: E731
        falling = integrate(pendulum(), x, 0.0, 20.0, solver=method, steps=200, event=event)
        assert falling.status == "event"
        return falling.event_time, falling.x1

    time, x1 = meets(x)
    assert x1[0, 0].item() == pytest.approx(0.1)
    assert torch.autograd.grad(time.sum(), x, retain_graph=True)[0].abs().max() > 0.1
    assert torch.autograd.grad(x1[0, 0], x)[0].abs().max() < 1e-3  # it stays on the event


@each
def test_an_event_inside_one_step_is_found(method):
    """A position that comes and goes within a step, of which both ends lie on one side."""
    field = Separable(lambda t, p: p, lambda t, q: torch.ones_like(q))
    x0 = torch.tensor([[0.4, -1.0]], dtype=D)  # q = 0.4 - t + t^2 / 2 meets 0 at 1 - sqrt(0.2)
    met = integrate(field, x0, 0.0, 2.0, solver=method, steps=1, event=lambda t, x: x[:, 0])
    assert met.event_time.item() == pytest.approx(1 - 0.2**0.5, abs=1e-9)


@each
def test_solutions_are_read_at_any_time_and_further_arguments_go_to_both_halves(method):
    field = Separable(lambda t, p, a: a * p, lambda t, q, a: -a * q)
    solution = integrate(field, X0, 0.0, 1.0, solver=method, steps=200, keep="steps", args=(2.0,))
    exact = X0[:, :2] * math.cos(0.743 * 2) + X0[:, 2:] * math.sin(0.743 * 2)
    torch.testing.assert_close(solution(0.743)[:, :2], exact, rtol=1e-4, atol=1e-4)
    images = integrate(field, tuple(X0.chunk(2, 1)), 0.0, 1.0, solver=method, steps=200, args=(2.0,)).x1
    torch.testing.assert_close(torch.cat(images, 1), solution.x1, rtol=0, atol=0)


@each
def test_float32_no_grad_inference_mode_and_torch_func_give_the_same(method):
    wide = integrate(pendulum(), X0, 0.0, 1.0, solver=method, steps=8).x1
    narrow = integrate(pendulum(), X0.float(), 0.0, 1.0, solver=method, steps=8).x1
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.to(D), wide, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        rounding(integrate(pendulum(), X0, 0.0, 1.0, solver=method, steps=8).x1, wide.clone())
    solve = lambda x: integrate(pendulum(), x, 0.0, 1.0, solver=method, steps=8).x1  # noqa: E731
    rounding(torch.vmap(solve)(X0[:, None])[:, 0], wide)


@each
def test_a_solve_in_a_graph_is_the_same(method):
    solve = lambda x: integrate(driven(), x, 0.0, 1.0, solver=method, steps=3, keep="last").x1  # noqa: E731
    rounding(torch.compile(solve, fullgraph=True, backend="eager")(X0), solve(X0))


@each
def test_gradients_of_recomputed_steps_up_to_an_event(method):
    x, field = X0[:1].clone().requires_grad_(), Separable(Halves(), Halves())
    options = {"solver": method, "steps": 30, "event": lambda t, x: 1 - t + 0.1 * x[:, 0], "keep": "last"}
    weights = [x, *field.parameters()]
    direct, again = (integrate(field, x, 0.0, 9.0, gradient=way, **options) for way in ("direct", "checkpoint"))
    assert direct.status == again.status == "event"
    rounding(again.event_time, direct.event_time)
    slopes = [torch.autograd.grad(one.x1.sum() + one.event_time.sum(), weights) for one in (direct, again)]
    torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-4)  # whose last steps are others, of the same order


@each
def test_a_neural_ode_trains_both_halves(method):
    torch.manual_seed(0)
    field = Separable(Halves(), Halves())
    ode = odenets.NeuralODE(field, solver=method, steps=4)
    assert len([*ode.parameters()]) == 8
    ode(X0).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ode.parameters())
    x1, records = ode.record(X0, action=action)
    assert records["action"].shape == (4, 2)
    rounding(x1, integrate(field, X0, 0.0, 1.0, solver=method, steps=4).x1)
    copy = pickle.loads(pickle.dumps(ode))
    rounding(copy(X0), x1)
    checkpointed = odenets.NeuralODE(field, solver=method, steps=4, gradient="checkpoint")
    rounding(checkpointed(X0), x1)
    with pytest.raises(ValueError, match=f"{method} takes no measures beside the state"):
        checkpointed.record(X0, action=action)


def energies():
    """The network of an energy for each half."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(D) for _ in range(2)]


@each
def test_energies_make_a_field_that_keeps_them(method):
    kinetic, potential = energies()
    field = Separable.of_energies(lambda p: p.square().sum(1) / 2 + kinetic(p)[:, 0], potential)
    options = {"solver": method, "steps": 1000}
    with torch.no_grad():
        states = torch.cat(integrate(field, X0[:1], 0.0, 100.0, **options).states)
        q, p = states.chunk(2, 1)
        total = p.square().sum(1) / 2 + kinetic(p)[:, 0] + potential(q)[:, 0]
        assert (total - total[0]).abs().max() < 2e-4
        assert states.std() > 1  # it moves
        exact = Separable.of_energies(lambda p: p.square().sum(1) / 2, lambda q: -q.cos().sum(1))
        few = {"solver": method, "steps": 100}
        rounding(integrate(exact, X0, 0.0, 1.0, **few).x1, integrate(pendulum(), X0, 0.0, 1.0, **few).x1)
    with torch.inference_mode():
        again = torch.cat(integrate(field, X0[:1], 0.0, 10.0, **few).states).clone()
    rounding(again, states[:101])


@each
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_energies_train(method, gradient):
    ode = odenets.NeuralODE(Separable.of_energies(*energies()), solver=method, steps=3, gradient=gradient)
    weights = dict(ode.named_parameters())
    assert len(weights) == 8
    ode(X0).sin().sum().backward()
    for name, p in weights.items():
        if name.endswith("energy.2.bias"):  # which no slope reads
            continue
        turn, sides = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-6 * turn)
                sides.append(ode(X0).sin().sum().item())
                p.sub_(sign * 1e-6 * turn)
        assert (p.grad * turn).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_energies_go_through_graphs_and_transforms():
    field = Separable.of_energies(*energies())
    solve = lambda x: integrate(field, x, 0.0, 1.0, solver="leapfrog", steps=3, keep="last").x1  # noqa: E731
    rounding(torch.compile(solve, fullgraph=True, backend="eager")(X0), solve(X0))
    rounding(torch.vmap(solve)(X0[:, None])[:, 0], solve(X0))
    x = X0.clone().requires_grad_()
    rounding(torch.func.grad(lambda x: solve(x).sum())(X0), torch.autograd.grad(solve(x).sum(), x)[0])


def solved(field=None, x0=X0, **options):
    return integrate(field or pendulum(), x0, 0.0, 1.0, **{"solver": "leapfrog", "steps": 4} | options)


SQUARE, NET = lambda q: q.square().sum(1), Halves()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(solved, lambda t, x: x), TypeError, r"field must be a Separable\(velocity, force\).*got function"),
        (partial(solved, x0=X0[:, :3]), ValueError, r"x0 must have shape \(B, 2 d, \*S\).*got \(2, 3\)"),
        (partial(solved, x0=X0[0]), ValueError, r"x0 must have shape \(B, 2 d, \*S\).*got \(4,\)"),
        (partial(solved, x0=(X0, X0[:, :2])), ValueError, r"one shape.*q \(2, 4\) and p \(2, 2\)"),
        (partial(solved, x0=(X0, X0, X0)), TypeError, r"tuple \(q, p\).*got 3 entries"),
        (partial(solved, x0={"q": X0, "p": X0}), TypeError, r"tuple \(q, p\).*got dict"),
        (partial(solved, steps=None), ValueError, "leapfrog carries no embedded error.*take steps=n"),
        (partial(solved, steps=None, control="sample"), ValueError, "leapfrog carries no embedded error"),
        (partial(solved, control="sample"), ValueError, "control='sample' chooses its steps"),
        (partial(solved, graph=True), ValueError, "graph=True holds the loop that chooses steps"),
        (partial(solved, gradient="backsolve"), ValueError, "'backsolve'.*leapfrog.*use 'checkpoint', 'direct'"),
        (partial(solved, Separable(lambda t, p: p[:, :1], lambda t, q: q)), ValueError, "must keep the shape of x"),
        (partial(solved, Separable(lambda t, p: p.mul_(2), lambda t, q: q)), ValueError, "not write into its input"),
        (lambda: Separable(lambda t, p: p, 3.0), TypeError, r"force must be a function \(t, x\), got float"),
        (lambda: Separable(lambda p: p, lambda t, q: q), TypeError, r"velocity must take t and x"),
        (lambda: rk_step([pendulum()] * 2, 0, X0, 0.1, get_tableau("leapfrog")), TypeError, "Separable.*got 2 fields"),
        (lambda: rk_step(pendulum(), 0, X0, 0.1 * X0, get_tableau("leapfrog")), ValueError, r"h must be one.*\(2, 4\)"),
        (lambda: odenets.Flow(lambda: pendulum(), solver="leapfrog"), ValueError, "must take any field, leapfrog"),
        (lambda: odenets.NeuralODE(Halves(), solver="leapfrog", steps=2), TypeError, "Separable.*got Halves"),
        (lambda: odenets.NeuralODE(pendulum(), solver="leapfrog"), ValueError, "leapfrog carries no embedded error"),
        (lambda: get_tableau("velocity_verlet"), ValueError, "take 'leapfrog'"),
        (partial(solved, Separable(Halves(), Halves()), x0=X0.float()), ValueError, "force must have the dtype"),
        (lambda: Separable.of_energies(lambda: 0, Halves()), TypeError, "kinetic must take a state alone"),
        (lambda: Separable.of_energies(3.0, Halves()), TypeError, "kinetic must be a function of a state, got float"),
        (partial(solved, Separable.of_energies(lambda p: p.mean(), SQUARE)), ValueError, r"kinetic must .*got \(\)"),
        (partial(solved, Separable.of_energies(lambda p: p[:, 0] * 1, lambda q: q.detach()[:, 0])), ValueError, "dep"),
        (lambda: odenets.NeuralODE(Separable.of_energies(lambda p: NET(p), SQUARE)), TypeError, "hides 'NET'"),
        (lambda: odenets.NeuralODE(Separable(NET.forward, lambda t, q: q)), TypeError, "velocity must be a module"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("buffer", ["velocity", "force", "both"])
def test_halves_that_write_into_what_they_returned_are_refused(buffer):
    kept = torch.zeros(2, 2, dtype=D)
    writes = lambda t, x: kept.copy_(x)  # noqa: E731
    same = writes if buffer != "velocity" else lambda t, q: -q
    field = Separable(writes if buffer != "force" else lambda t, p: p, same)
    with pytest.raises(ValueError, match="must not write into what it has returned"):
        integrate(field, X0, 0.0, 1.0, solver="yoshida4", steps=2)


def test_compositions_check_themselves():
    suzuki = 1 / (4 - 4 ** (1 / 3))
    tableau = composition("suzuki4", 4, (suzuki, suzuki, 1 - 4 * suzuki, suzuki, suzuki))
    exact = of_scipy(driven(), X0, 0.0, 1.0)
    errors = [(integrate(driven(), X0, 0.0, 1.0, solver=tableau, steps=n).x1 - exact).abs().max() for n in (10, 20)]
    assert 3.8 < math.log2(errors[0] / errors[1]) < 4.2
    with pytest.raises(ValueError, match=r"order must be 2: the cubes of the substeps sum to 0\.25"):
        composition("double", 4, (0.5, 0.5))
    with pytest.raises(ValueError, match="the same from either end"):
        composition("lame", 2, (0.25, 0.75))
    with pytest.raises(ValueError, match=r"order must be 2 or 4.*got 3"):
        composition("odd", 3, (1.0,))
    with pytest.raises(ValueError, match="b must sum to 1"):
        composition("half", 2, (0.5,))
    with pytest.raises(ValueError, match="take composition"):
        SplitTableau("other", order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), substeps=(0.5, 0.5))
