import copy
import math
import pickle
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import nn

import odenets
from odenets.measures import action
from solvers import SemiLinear, get_tableau, integrate, rk_step
from solvers.semilinear import phi
from tests.counting import Counted
from tests.solvers.problems import D, rounding

METHODS = [("exponential_euler", 1), ("etd2rk", 2)]
CALLS = dict(METHODS)
X0 = torch.tensor([[0.3, -0.5, 0.9], [1.1, 0.4, -0.6]], dtype=D)
A = torch.tensor([[-3.0, 1.0, 0.0], [0.5, -2.0, 0.3], [0.0, -1.0, -0.5]], dtype=D)
each = pytest.mark.parametrize("method", CALLS)


def driven(t, x):
    return torch.sin(x) + math.cos(3 * t)


def zero(t, x):
    return torch.zeros_like(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)

    def forward(self, t, x):
        return self.net(x) * math.cos(t)


def of_scipy(field, x0, t0, t1, method="DOP853"):
    flat = lambda t, y: field(t, torch.from_numpy(y).view_as(x0)).flatten().numpy()  # noqa: E731
    y = solve_ivp(flat, (t0, t1), x0.flatten().numpy(), method=method, rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.from_numpy(y).view_as(x0)


@pytest.mark.parametrize("k", [1, 2])
def test_functions_are_those_of_their_definition(k):
    z = torch.tensor([-1e6, -30.0, -1.0, -0.51, -0.49, -1e-3, -1e-9, 0.0, 1e-9, 0.3, 0.7, 5.0], dtype=D)
    exact = []
    for value in z.tolist():  # an integral: phi_k(z) = int_0^1 e^((1 - s) z) s^(k - 1) ds
        nodes, weights = np.polynomial.legendre.leggauss(60)
        cuts = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 40)])
        parts = [
            (b - a) / 2 * np.sum(weights * np.exp(s * value) * (1 - s) ** (k - 1))
            for a, b in pairwise(cuts)
            for s in [(a + b) / 2 + (b - a) / 2 * nodes]
        ]
        exact.append(sum(parts))
    exact = torch.tensor(exact, dtype=D)
    torch.testing.assert_close(phi(k, 1.0, z), exact, rtol=2e-13, atol=0)
    torch.testing.assert_close(phi(k, 0.5, 2 * z[1:].diag()).diagonal(), exact[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(phi(k, 1.0, z.float()).to(D), exact, rtol=2e-6, atol=0)
    sizes = torch.tensor([0.5, 1.0], dtype=D).view(2, 1, 1)
    rounding(phi(k, sizes, A), torch.stack([phi(k, 0.5, A), phi(k, 1.0, A)]))
    rounding(phi(k, sizes, z[1:]), torch.stack([phi(k, 0.5, z[1:]), phi(k, 1.0, z[1:])])[:, None])


@each
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_linear_problems_are_solved_exactly_whatever_their_stiffness(method, steps):
    rates = torch.tensor([-1e6, -1.0, 0.0], dtype=D)
    x1 = integrate(SemiLinear(rates, zero), X0, 0.0, 0.7, solver=method, steps=steps).x1
    torch.testing.assert_close(x1, X0 * (0.7 * rates).exp(), rtol=1e-12, atol=1e-13)
    forced = integrate(SemiLinear(rates, lambda t, x: torch.ones_like(x)), X0, 0.0, 0.7, solver=method, steps=steps).x1
    exact = X0 * (0.7 * rates).exp() + 0.7 * torch.tensor([1 / 0.7e6, math.expm1(-0.7) / -0.7, 1.0], dtype=D)
    torch.testing.assert_close(forced, exact, rtol=1e-12, atol=1e-13)
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=D))[0]
    matrix = turn @ rates.diag() @ turn.mT
    x1 = integrate(SemiLinear(matrix, zero), X0, 0.0, 0.7, solver=method, steps=steps).x1
    exact = X0 @ turn @ (0.7 * rates).exp().diag() @ turn.mT
    torch.testing.assert_close(x1, exact, rtol=0, atol=1e-9)  # the rounding of a matrix of such a norm
    x1 = integrate(SemiLinear(A, zero), X0, 0.0, 0.7, solver=method, steps=steps).x1
    rounding(x1, X0 @ torch.from_numpy(expm(0.7 * A.numpy())).mT)


@each
def test_states_inside_steps_of_linear_problems_are_exact(method):
    rates, times = torch.tensor([-1e4, -1.0, 0.0], dtype=D), [1e-4, 0.1, 0.13, 0.37, 0.7]
    for linear in (rates, rates.diag()):
        states = integrate(SemiLinear(linear, zero), X0, 0.0, 1.0, solver=method, steps=2, at=times).states
        exact = torch.stack([X0 * (t * rates).exp() for t in times])
        torch.testing.assert_close(states, exact, rtol=1e-10, atol=1e-11)
    solution = integrate(SemiLinear(rates, zero), X0, 0.0, 1.0, solver=method, steps=2, keep="steps")
    torch.testing.assert_close(solution(0.13), X0 * (0.13 * rates).exp(), rtol=1e-12, atol=1e-12)


def with_stiffness(stiff):
    return SemiLinear(torch.tensor([-1.0, -2.0, -stiff], dtype=D), driven)


@cache
def by_radau(stiff):
    return of_scipy(with_stiffness(stiff), X0, 0.1, 1.1, "Radau")


@pytest.mark.parametrize(("method", "order"), METHODS)
@pytest.mark.parametrize("stiff", [1.0, 1e3, 1e6])
def test_errors_fall_with_the_order_and_do_not_grow_with_the_stiffness(method, order, stiff):
    field, exact = with_stiffness(stiff), by_radau(stiff)
    errors = [
        (integrate(field, X0, 0.1, 1.1, solver=method, steps=n).x1 - exact).abs().max().item() for n in (40, 80, 160)
    ]
    assert np.log2(errors[:-1]) - np.log2(errors[1:]) == pytest.approx([order] * 2, abs=0.15)
    assert errors[0] < {1: 3e-2, 2: 1e-3}[order]


@pytest.mark.parametrize(("method", "order"), METHODS)
def test_states_inside_steps_are_of_the_order_too(method, order):
    field, times = SemiLinear(A, driven), [0.513, 0.9171]
    exact = torch.stack([of_scipy(field, X0, 0.1, t) for t in times])
    errors = [
        (integrate(field, X0, 0.1, 1.1, solver=method, steps=n, at=times).states - exact).abs().max().item()
        for n in (40, 160)
    ]
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.2


@each
def test_a_diagonal_is_the_matrix_of_it(method):
    rates = torch.tensor([-5.0, 0.0, 0.4], dtype=D)
    options = {"solver": method, "steps": 7, "at": [0.1, 0.33, 0.34, 0.35, 1.0]}
    diagonal, matrix = (integrate(SemiLinear(a, driven), X0, 0.0, 1.0, **options) for a in (rates, rates.diag()))
    rounding(diagonal.states, matrix.states)
    assert diagonal.stats == matrix.stats


@each
def test_without_a_linear_part_it_is_the_explicit_method(method):
    plain = integrate(driven, X0, 0.0, 1.0, solver={"exponential_euler": "euler", "etd2rk": "heun"}[method], steps=9)
    rounding(integrate(SemiLinear(torch.zeros(3, dtype=D), driven), X0, 0.0, 1.0, solver=method, steps=9).x1, plain.x1)


@pytest.mark.parametrize("solver", ["dopri5", "kvaerno5"])
def test_every_method_takes_a_semilinear_field_as_any(solver):
    x1 = integrate(SemiLinear(A, driven), X0, 0.0, 1.0, solver=solver).x1
    torch.testing.assert_close(x1, of_scipy(SemiLinear(A, driven), X0, 0.0, 1.0), rtol=1e-2, atol=1e-3)


@each
def test_the_network_is_called_once_a_stage(method):
    network, n = Counted(driven), CALLS[method]
    field = SemiLinear(A, network)

    def calls(**options):
        network.calls = 0
        stats = integrate(field, X0, 0.0, 1.0, solver=method, steps=10, **options).stats
        assert (stats.evaluations, stats.accepted) == (network.calls, 10)
        return network.calls

    assert calls() == calls(keep="last") == calls(keep="steps") == calls(at=[0.1, 0.4]) == 10 * n
    assert calls(at=[0.13, 0.17, 0.4, 0.88]) == 12 * n
    assert calls(at=[0.13, 0.4], gradient="checkpoint", keep="last") == 11 * n
    with torch.no_grad():
        assert calls(event=lambda t, x: x.new_ones(())) == 20 * n


@pytest.mark.parametrize("linear", [A, A.diagonal()])
def test_functions_are_computed_once_a_size_and_anew_where_the_linear_part_changes(linear, monkeypatch):
    computed = []
    monkeypatch.setattr("solvers.semilinear.phi", lambda *args: computed.append(args) or phi(*args))
    field = SemiLinear(nn.Parameter(linear.clone()), driven)
    solve = lambda steps=50: integrate(field, X0, 0.0, 1.0, solver="exponential_euler", steps=steps).x1  # noqa: E731
    with torch.no_grad():
        x1 = solve()
        few = len(computed)
        assert few <= 5  # of sizes that differ by more than the rounding of times
        rounding(solve(), x1)
        solve(49)
        assert len(computed) <= 2 * few + 5
        before = len(computed)
        field.A.mul_(2.0)
        assert len(computed) == before
        fresh = SemiLinear(field.A.detach().clone(), driven)
        rounding(solve(), integrate(fresh, X0, 0.0, 1.0, solver="exponential_euler", steps=50).x1)
        twin, loaded = copy.deepcopy(field), pickle.loads(pickle.dumps(SemiLinear(A, Net())))
        assert twin._kept == loaded._kept == {}
        field.A.data.mul_(2.0)  # which torch does not count
        fresh = SemiLinear(field.A.detach().clone(), driven)
        rounding(solve(), integrate(fresh, X0, 0.0, 1.0, solver="exponential_euler", steps=50).x1)
    before = len(computed)
    assert solve(4).requires_grad
    assert len(computed) == before + 1  # gradients of all steps add up in it


def test_functions_kept_in_inference_mode_serve_gradients():
    field = SemiLinear(A, Net())
    options = {"solver": "etd2rk", "steps": 4}
    with torch.inference_mode():
        x1 = integrate(field, X0, 0.0, 1.0, **options).x1.clone()
    again = integrate(field, X0, 0.0, 1.0, **options).x1
    rounding(again.detach(), x1)
    again.sum().backward()


class Solve(nn.Module):
    def __init__(self, field, solve):
        super().__init__()
        self.field, self.solve = field, solve

    def forward(self):
        return self.solve(self.field)


SINGULAR = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.5, -2.0]], dtype=D)


@each
@pytest.mark.parametrize("linear", [A, SINGULAR, torch.tensor([-7.0, 0.0, 0.6], dtype=D)], ids=["A", "0", "diagonal"])
def test_gradients_flow_to_the_linear_part_the_state_and_the_network(method, linear):
    field, x = SemiLinear(nn.Parameter(linear.clone()), Net()), X0.clone().requires_grad_()
    weights = dict(field.named_parameters())
    assert len(weights) == 5

    def x1(x, *values):
        solve = lambda field: integrate(field, x, 0.0, 1.0, solver=method, steps=3).x1  # noqa: E731
        named = dict(zip([f"field.{key}" for key in weights], values, strict=True))
        return torch.func.functional_call(Solve(field, solve), named, ())

    assert torch.autograd.gradcheck(x1, (x, *weights.values()), fast_mode=True)
    direct = torch.autograd.grad(x1(x, *weights.values()).sum(), [x, *weights.values()])
    options = {"solver": method, "steps": 3, "gradient": "checkpoint", "keep": "last"}
    again = torch.autograd.grad(integrate(field, x, 0.0, 1.0, **options).x1.sum(), [x, *weights.values()])
    torch.testing.assert_close(again, direct, rtol=1e-12, atol=1e-14)


@each
def test_second_derivatives_and_gradients_to_output_times(method):
    rates = torch.tensor([-7.0, 0.0, 1e-9], dtype=D, requires_grad=True)
    solve = lambda rates: integrate(SemiLinear(rates, driven), X0, 0.0, 1.0, solver=method, steps=2).x1  # noqa: E731
    assert torch.autograd.gradgradcheck(solve, (rates,))
    at = torch.tensor([0.13, 0.17, 0.31, 0.77], dtype=D, requires_grad=True)
    for linear in (A, A.diagonal()):
        field = SemiLinear(linear, driven)
        assert torch.autograd.gradcheck(
            lambda at, field=field: integrate(field, X0, 0.0, 1.0, solver=method, steps=5, at=at).states, (at,)
        )


@pytest.mark.parametrize("fused", [False, True])
def test_functions_are_anew_after_the_step_of_an_optimizer(fused):
    field = SemiLinear(nn.Parameter(torch.tensor([[-1.0, 0.5], [0.0, -2.0]])), zero)
    x0, options = torch.ones(1, 2), {"solver": "etd2rk", "steps": 2}
    optimizer = torch.optim.Adam([field.A], 0.5, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            x1 = integrate(field, x0, 0.0, 1.0, **options).x1
        torch.testing.assert_close(x1, x0 @ torch.linalg.matrix_exp(field.A.detach()).mT)
        field.A.grad = torch.ones(2, 2)
        optimizer.step()


class Diffusivity(nn.Module):
    """A linear part that learns one number."""

    def __init__(self, linear, nu=0.3):
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(nu, dtype=D))
        self.register_buffer("linear", linear)
        self.calls = 0

    def forward(self):
        self.calls += 1
        return self.nu.exp() * self.linear


@each
@pytest.mark.parametrize("linear", [A, A.diagonal()], ids=["matrix", "diagonal"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_linear_part_that_is_computed_learns(method, linear, gradient):
    field = SemiLinear(Diffusivity(linear), Net())
    ode = odenets.NeuralODE(field, solver=method, steps=3, gradient=gradient)
    assert "field.A.nu" in dict(ode.named_parameters())
    for _ in range(2):  # a graph for each pass
        ode.zero_grad()
        ode(X0).sum().backward()
    assert gradient == "checkpoint" or field.A.calls == 2
    sides = []
    for s in (0.3 - 1e-5, 0.3 + 1e-5):
        field.A.nu.data.fill_(s)
        with torch.no_grad():
            sides.append(integrate(field, X0, 0.0, 1.0, solver=method, steps=3).x1.sum().item())
    assert field.A.nu.grad.item() == pytest.approx((sides[1] - sides[0]) / 2e-5, rel=1e-6)
    nu = torch.tensor(0.3, dtype=D, requires_grad=True)
    field = SemiLinear(lambda: nu.exp() * linear, Net())
    x1 = integrate(field, X0, 0.0, 1.0, solver=method, steps=3, gradient=gradient, keep="last").x1
    assert torch.autograd.grad(x1.sum(), nu)[0].item() == pytest.approx((sides[1] - sides[0]) / 2e-5, rel=1e-6)


@each
def test_the_step_is_the_object_of_the_measures(method):
    tableau = get_tableau(method)
    step = rk_step(SemiLinear(A, driven), 0.2, X0, 0.3, tableau, reductions=("action", "residue"))
    b = torch.tensor(tableau.b, dtype=D).view(-1, 1, 1)
    p = torch.stack(step.stages)
    rounding(step.x1, X0 + 0.3 * step.residue)
    rounding(action(step), 0.3 * (b * p**2).sum(0).mean(1))
    rounding(step.reductions["action"], action(step))
    rounding(step.select(torch.tensor([1])).residue, step.residue[1:])


@each
def test_events_further_arguments_and_narrow_states(method):
    field = SemiLinear(torch.tensor([-50.0, -1.0, 0.0], dtype=D), lambda t, x, a: a * torch.ones_like(x))
    options = {"solver": method, "steps": 3, "args": (2.0,)}
    met = integrate(field, X0[:1], 0.0, 1.0, event=lambda t, x: x[:, 2] - 1.5, **options)
    assert met.event_time.item() == pytest.approx(0.3, abs=1e-9)
    wide = integrate(field, X0, 0.0, 1.0, **options).x1
    torch.testing.assert_close(integrate(field.float(), X0.float(), 0.0, 1.0, **options).x1.to(D), wide)


@each
def test_a_solve_in_a_graph_is_the_same(method):
    field = SemiLinear(A, driven)
    solve = lambda x: integrate(field, x, 0.0, 1.0, solver=method, steps=3, keep="last").x1  # noqa: E731
    rounding(torch.compile(solve, fullgraph=True, backend="eager")(X0), solve(X0))


@each
def test_complex_states(method):
    rates = torch.tensor([1j, -1 + 2j], dtype=torch.complex128)
    x0 = torch.ones(1, 2, dtype=torch.complex128)
    for linear in (rates, rates.diag()):
        rounding(integrate(SemiLinear(linear, zero), x0, 0.0, 1.0, solver=method, steps=3).x1, rates.exp()[None])
    for linear in (A, A.diagonal()):  # a real one, as of a heat equation of Fourier coefficients
        x0 = torch.complex(X0, X0.flip(0))
        exact = x0 @ torch.linalg.matrix_exp(linear if linear.ndim == 2 else linear.diag()).mT.to(x0.dtype)
        field = SemiLinear(linear, zero)
        rounding(integrate(field, x0, 0.0, 1.0, solver=method, steps=3).x1, exact)
        states = integrate(field, x0, 0.0, 1.0, solver=method, steps=3, at=[0.5, 1.0]).states
        rounding(states[1], exact)


@each
def test_a_neural_ode_trains_both_parts(method):
    field = SemiLinear(nn.Parameter(A.clone()), Net())
    ode = odenets.NeuralODE(field, solver=method, steps=4)
    ode(X0).square().sum().backward()
    assert len([*ode.parameters()]) == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ode.parameters())
    x1, records = ode.record(X0, action=action)
    assert records["action"].shape == (4, 2)
    rounding(x1, integrate(field, X0, 0.0, 1.0, solver=method, steps=4).x1)
    assert set(SemiLinear(A, zero).state_dict()) == {"A"}


def solved(field=None, x0=X0, **options):
    return integrate(
        field or SemiLinear(A, driven), x0, 0.0, 1.0, **{"solver": "exponential_euler", "steps": 4} | options
    )


EULER, NET = get_tableau("exponential_euler"), Net()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(solved, driven), TypeError, r"field must be a SemiLinear\(A, network\).*got function"),
        (partial(solved, x0=X0[:, :2]), ValueError, r"x0 must have shape \(B, 3\), as A \(3, 3\), got \(2, 2\)"),
        (partial(solved, x0=X0[0]), ValueError, r"x0 must have shape \(B, 3\).*got \(3,\)"),
        (partial(solved, x0=(X0, X0)), TypeError, r"x0 must be a tensor \(B, D\).*got tuple"),
        (partial(solved, x0=X0.float()), ValueError, r"A must have the dtype.*take field.to\(x0\)"),
        (partial(solved, SemiLinear(A, Net()), x0=X0.float()), ValueError, "A must have the dtype"),
        (partial(solved, SemiLinear(A, Net().float())), ValueError, "network must have the dtype of the state"),
        (partial(solved, x0=X0.to(torch.complex64)), ValueError, r"got torch.float64.*take SemiLinear\(A.to\(x0\)"),
        (partial(solved, SemiLinear(A.cfloat(), zero)), ValueError, "got torch.complex64 .*take a complex x0"),
        (partial(solved, x0=X0.view(2, 1, 3, 1)), ValueError, r"got \(2, 1, 3, 1\): flatten it, x0.flatten\(1\), 3"),
        (lambda: SemiLinear(A.to_sparse(), driven), TypeError, r"A must be.*got a sparse one: take A.to_dense\(\)"),
        (lambda: SemiLinear(A * torch.ones(1, dtype=D, requires_grad=True), zero), ValueError, "hand over what comp"),
        (lambda: SemiLinear(lambda h: A, zero), TypeError, r"A must be.*without arguments, got one of \(h\)"),
        (partial(solved, SemiLinear(lambda: A[:2], zero)), ValueError, r"what A returns must have shape \(D, D\)"),
        (lambda: odenets.NeuralODE(SemiLinear(lambda: NET.net[0].weight, zero)), TypeError, "A must be a module"),
        (
            lambda: odenets.NeuralODE(SemiLinear(A.clone().requires_grad_(), zero)),
            TypeError,
            "A must be an nn.Parameter",
        ),
        (partial(solved, steps=None), ValueError, "exponential_euler carries no embedded error.*take steps=n"),
        (partial(solved, steps=None, solver="etd2rk"), ValueError, "etd2rk carries no embedded error.*take steps=n"),
        (partial(solved, control="sample"), ValueError, "control='sample' chooses its steps"),
        (partial(solved, graph=True), ValueError, "graph=True holds the loop that chooses steps"),
        (partial(solved, gradient="backsolve"), ValueError, "'backsolve'.*exponential_euler.*SemiLinear"),
        (partial(solved, SemiLinear(A, lambda t, x: x[:, :1])), ValueError, "must keep the shape of x"),
        (partial(solved, SemiLinear(A, lambda t, x: x.mul_(2))), ValueError, "must not write into its input"),
        (lambda: SemiLinear(A[:2], driven), ValueError, r"A must have shape \(D, D\).*got \(2, 3\)"),
        (lambda: SemiLinear(A.long(), driven), TypeError, "A must be a floating or complex tensor, got torch.int64"),
        (lambda: SemiLinear(3.0, driven), TypeError, "A must be a floating or complex tensor.*got float"),
        (lambda: SemiLinear(A, 3.0), TypeError, r"network must be a function \(t, x\), got float"),
        (lambda: SemiLinear(A, lambda x: x), TypeError, "network must take t and x"),
        (lambda: rk_step(SemiLinear(A, zero), 0, X0, X0[:, :1], EULER), ValueError, r"h must be one.*\(2, 1\)"),
        (lambda: rk_step(driven, 0, X0, 0.1, EULER), TypeError, "must be a SemiLinear"),
        (lambda: odenets.Flow(lambda: driven, solver=EULER), ValueError, "solver must take any field"),
        (lambda: odenets.NeuralODE(Net(), solver=EULER, steps=2), TypeError, "SemiLinear.*got Net"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_network_that_writes_into_what_it_returned_is_refused():
    kept = torch.zeros_like(X0)
    with pytest.raises(ValueError, match="must not write into what it has returned"):
        integrate(SemiLinear(A, lambda t, x: kept.copy_(x)), X0, 0.0, 1.0, solver="etd2rk", steps=2)
