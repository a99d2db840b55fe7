"""Solves under torch.compile, torch.func, torch.export and autocast."""

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev, vmap

import odenets
from solvers import Tolerance, get_tableau, integrate, odeint, rk_step

D = torch.float64
TOLERANCE = Tolerance(1e-6, 1e-8)


@pytest.fixture
def field():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return lambda t, x: net(x) + t


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=D)


def compiled(function):
    """Without graph breaks, and checked without a compiler for C++."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(("solver", "keep"), [("euler", "last"), ("rk4", "states"), ("bs23", "steps")])
def test_fixed_solves_compile_to_one_graph(solver, keep, field, x):
    def solve(x):
        return integrate(field, x, 0.0, 1.0, solver=solver, steps=3, keep=keep).x1

    torch.testing.assert_close(compiled(solve)(x), solve(x))


def test_odeint_over_its_output_times_compiles_to_one_graph(field, x):
    t = torch.linspace(0, 1, 4, dtype=D)

    def solve(x, t):
        return odeint(field, x, t, method="heun2")

    torch.testing.assert_close(compiled(solve)(x, t), solve(x, t))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_an_adaptive_step_compiles_to_one_graph(field, x):
    def attempt(t, h, x, first):
        step = rk_step(field, t, x, h, get_tableau("bs23"), first)
        size = TOLERANCE.size(TOLERANCE.scaled(step.error(), step.x0, step.x1))
        return step.x1, step.residue, step.stages[-1], size

    fast = compiled(attempt)
    for t, h in ((0.1, 0.2), (0.3, 0.05)):
        torch.testing.assert_close(fast(t, h, x, field(t, x)), attempt(t, h, x, field(t, x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_adaptive_odeint_falls_back_where_it_must(field, x):
    t = torch.tensor([0.0, 1.0], dtype=D)
    solve = torch.compile(lambda x: odeint(field, x, t, method="bosh3"), backend="eager")
    torch.testing.assert_close(solve(x), odeint(field, x, t, method="bosh3"))


def test_fixed_solves_map(field, x):
    def solve(x):
        return integrate(field, x, 0.0, 1.0, steps=4).x1

    torch.testing.assert_close(torch.vmap(solve)(x), solve(x))
    weights = torch.randn(4, 3, 3, dtype=D)
    result = torch.vmap(lambda w: integrate(lambda t, x: x @ w, x, 0.0, 1.0, steps=4, solver="rk4").x1)(weights)
    for w, many in zip(weights, result, strict=True):
        torch.testing.assert_close(many, integrate(lambda t, x, w=w: x @ w, x, 0.0, 1.0, steps=4, solver="rk4").x1)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians_of_single_samples_map(jacobian, field, x):
    def alone(sample):
        return integrate(field, sample[None], 0.0, 1.0, steps=3).x1[0]

    whole = torch.autograd.functional.jacobian(lambda x: integrate(field, x, 0.0, 1.0, steps=3).x1, x)
    torch.testing.assert_close(vmap(jacobian(alone))(x), torch.stack([whole[i, :, i] for i in range(len(x))]))
    flow = odenets.Flow(solver="bs23", depth=2).double()
    whole = torch.autograd.functional.jacobian(flow, x)
    torch.testing.assert_close(
        vmap(jacobian(lambda sample: flow(sample[None])[0]))(x), torch.stack([whole[i, :, i] for i in range(len(x))])
    )


@pytest.mark.parametrize("solve", [lambda f, x: integrate(f, x, 0.0, 1.0), None])
def test_an_adaptive_solve_says_that_it_cannot_be_mapped(solve, field, x):
    solve = solve or (lambda f, x: odeint(f, x, torch.tensor([0.0, 1.0], dtype=D), method="bosh3"))
    with pytest.raises(RuntimeError, match=r"cannot be mapped by torch.vmap.*control='sample'"):
        torch.vmap(lambda x: solve(field, x))(x)


WAYS = [{"steps": 6, "solver": "rk4"}, {"tolerance": TOLERANCE}, {"tolerance": TOLERANCE, "control": "sample"}]


@pytest.mark.parametrize("options", WAYS)
def test_function_transforms(options, field, x):
    def solve(x):
        return integrate(field, x, 0.0, 1.0, **options).x1.square().sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(solve(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(solve)(x), grad)
    direction = torch.randn_like(x)
    value, slope = torch.func.jvp(solve, (x,), (direction,))
    torch.testing.assert_close(value, solve(x))
    torch.testing.assert_close(slope, (grad * direction).sum())


def test_hessian_of_a_fixed_solve(field, x):
    def solve(x):
        return integrate(field, x, 0.0, 1.0, steps=3).x1.square().sum()

    leaf = x[0].clone().requires_grad_()
    hessian = torch.func.hessian(solve)(leaf)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(solve, leaf))


def test_a_fixed_step_flow_is_exported_for_any_batch():
    flow = odenets.Flow(solver="bs23", depth=3)
    flow(torch.randn(4, 3))
    program = torch.export.export(flow, (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("B")},))
    x = torch.randn(7, 3)
    torch.testing.assert_close(program.module()(x), flow(x))


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_an_adaptive_solve_says_that_it_cannot_be_exported(control):
    ode = odenets.NeuralODE(odenets.MLPField(3), control=control)
    with pytest.raises(RuntimeError, match="cannot be exported: graph=True, or fixed steps, steps=n"):
        torch.export.export(ode, (torch.randn(4, 3),))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
@pytest.mark.parametrize("options", WAYS)
def test_autocast(options, gradient):
    if (gradient, options.get("control")) == ("backsolve", "sample"):
        pytest.skip("needs one time for the batch")
    if "tolerance" in options:
        options = {**options, "tolerance": Tolerance(1e-2, 1e-2)}
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    field = lambda t, x: net(x)  # noqa: E731
    x = torch.randn(5, 3, requires_grad=True)
    exact = integrate(field, x, 0.0, 1.0, **options).x1
    with torch.autocast("cpu", torch.bfloat16):
        x1 = integrate(field, x, 0.0, 1.0, gradient=gradient, parameters=net.parameters(), **options).x1
    assert x1.dtype == torch.float32
    torch.testing.assert_close(x1, exact, rtol=0.05, atol=0.05)
    grads = [torch.autograd.grad(end.square().sum(), (x, net[0].weight)) for end in (x1, exact)]
    torch.testing.assert_close(*grads, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("keep", ["states", "steps"])
def test_autocast_stages_have_the_precision_of_the_state(keep):
    net = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        solution = integrate(lambda t, x: net(x), torch.randn(5, 3), 0.0, 1.0, steps=2, keep=keep)
    assert all(p.dtype == torch.float32 for step in solution.steps for p in step.stages)
