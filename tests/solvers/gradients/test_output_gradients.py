"""Gradients of states at chosen times, to what they depend on and to the times."""

import pytest
import torch

from solvers import Tolerance, integrate
from tests.solvers.problems import CONTROLS, EACH, TIMES, X0, D, Net, close, growth, lotka, rounding

FINE = {"tolerance": Tolerance(1e-9, 1e-10)}


@pytest.mark.parametrize("options", [{"steps": 60, "solver": "dopri5"}, {"solver": "dopri5", **FINE}])
@pytest.mark.parametrize("at", [TIMES, [0.0, 0.0], [0.7, 2.9, 2.9]])
def test_gradients_are_equal_however_they_flow(options, at):
    net, x0, shift = Net(), X0.clone().requires_grad_(), torch.ones(2, dtype=D, requires_grad=True)
    weights = torch.randn(len(at), 3, 2, dtype=D)

    def gradients(gradient):
        solution = integrate(net, x0, 0.0, 2.9, gradient=gradient, at=at, args=(shift,), **options)
        loss = (solution.states * weights).sum() + solution.x1.square().sum()
        return torch.autograd.grad(loss, (x0, shift, *net.parameters()))

    for gradient in ("checkpoint", "backsolve"):
        close(gradients(gradient), gradients("direct"), atol=1e-7)


@pytest.mark.parametrize("options", [{"steps": 20}, FINE])
def test_gradients_reach_buffers_and_arguments_of_any_shape(options):
    net, scale = Net(), torch.tensor(0.7, dtype=D, requires_grad=True)
    table = torch.randn(5, dtype=D, requires_grad=True)
    field = lambda t, x, scale, table: net(t, x) * scale + table.sum() * t  # noqa: E731

    def gradients(gradient):
        more = {"parameters": net.parameters()} if gradient == "backsolve" else {}
        solution = integrate(
            field,
            X0,
            0.0,
            1.0,
            solver="dopri5",
            gradient=gradient,
            at=[0.3, 0.9],
            args=(scale, table),
            **options,
            **more,
        )
        return torch.autograd.grad(solution.states.square().sum(), (scale, table, *net.parameters()))

    for gradient in ("checkpoint", "backsolve"):
        close(gradients(gradient), gradients("direct"), atol=1e-7)


@pytest.mark.parametrize("gradient", ["checkpoint", "backsolve"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_gradients_of_trees_backward_in_time(gradient, dtype):
    w = torch.tensor([0.5, -0.3]).to(dtype).requires_grad_()
    tree = {"a": X0.to(dtype).requires_grad_(), "b": X0[:, 0].to(dtype).requires_grad_()}
    field = lambda t, x: {"a": x["a"] * w + t, "b": -x["b"] * w[0]}  # noqa: E731

    def gradients(gradient):
        more = {"parameters": [w]} if gradient == "backsolve" else {}
        tolerance = Tolerance(1e-6, 1e-7)
        states = integrate(field, tree, 1.0, -1.0, at=[0.5, 0.0, -1.0], gradient=gradient, tolerance=tolerance, **more)
        loss = sum((part * part.conj()).real.sum() for part in states.states.values())
        return torch.autograd.grad(loss, (w, *tree.values()))

    torch.testing.assert_close(gradients(gradient), gradients("direct"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("control", CONTROLS)
def test_gradients_of_checkpoint_per_sample_are_those_through_the_steps(control):
    net, x0 = Net(), X0.clone().requires_grad_()
    at = EACH if control else EACH[0]

    def gradients(gradient):
        solution = integrate(net, x0, 0.0, 3.0, at=at, gradient=gradient, **control)
        return torch.autograd.grad(solution.states.sin().sum() + solution.x1.sum(), (x0, *net.parameters()))

    rounding(gradients("checkpoint"), gradients("direct"))


@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_checkpoint_keeps_few_tensors_for_few_outputs(solver):
    net, x0 = Net(), torch.ones(1, 2, dtype=D, requires_grad=True)

    def saved(gradient):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            solution = integrate(net, x0, 0.0, 1.0, solver=solver, steps=100, at=[0.513, 1.0], gradient=gradient)
        solution.states.sum().backward()
        return sum(sizes)

    assert saved("checkpoint") < saved("direct") / 10


def test_the_gradient_of_a_gradient_of_backsolve():
    net, x0 = Net(), X0.clone().requires_grad_()

    def second(gradient):
        states = integrate(net, x0, 0.0, 1.0, solver="dopri5", steps=60, at=[0.2, 0.7], gradient=gradient).states
        (slope,) = torch.autograd.grad(states.sin().sum(), x0, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x0, *net.parameters()))

    close(second("backsolve"), second("direct"))


@pytest.mark.parametrize("options", [{"steps": 4}, {"tolerance": Tolerance(1.0, 1.0, first_step=0.2, max_step=0.2)}])
@pytest.mark.parametrize("solver", ["heun", "bs23", "dopri5"])
def test_gradients_of_any_order_in_time_and_state(options, solver):
    at = torch.tensor([0.1, 0.25, 0.8], dtype=D, requires_grad=True)
    solve = lambda x, at: integrate(growth, x, 0.0, 0.8, solver=solver, at=at, **options).states  # noqa: E731
    x0 = X0.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: solve(x, torch.cat([s, at[2:].detach()])), (x0, at[:2]))
    assert torch.autograd.gradgradcheck(lambda x, s: solve(x, torch.cat([s, at[2:].detach()])), (x0, at[:2]))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("t0", [0.0, 0.1])
def test_the_gradient_of_a_time_is_the_velocity_there(control, t0):
    shape = (3, 3) if control else (3,)
    at = torch.tensor([0.1, 0.5, 1.0], dtype=D).expand(shape).clone().requires_grad_()
    solution = integrate(lotka, X0, t0, 1.0, solver="dopri5", at=at, **control, **FINE)
    expected = lotka(0, solution.states.detach()).sum(-1)
    (gradient,) = torch.autograd.grad(solution.states.sum(), at)
    torch.testing.assert_close(gradient, expected if control else expected.sum(1), rtol=1e-4, atol=1e-4)
    assert solution.times is at or torch.equal(solution.times, at)
