"""Fields of every kind in a NeuralODE: conditioned, with dropout and batch norm, differentiating, transformed."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from odenets import MLPField, Network, NeuralODE, measures
from odenets.least_action import LeastAction
from odenets.training.objectives import Task
from solvers import Tolerance
from tests.odenets.networks import Velocity
from tests.odenets.neural_ode.fields import Bound, Conditioned

TIGHT = Tolerance(1e-9, 1e-9)
GRADIENTS = ("direct", "checkpoint", "backsolve")
FIXED = {"steps": 4, "solver": "rk4"}


class Density(nn.Module):
    """Velocities of a state and of the logarithm of its density, by Hutchinson's estimate of the divergence."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t, state, noise):
        x = state[0]
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = self.net(x)
            (pull,) = torch.autograd.grad(v, x, noise, create_graph=True)
        return v, -(pull * noise).sum(1)


def mixing(layer):
    return Velocity(lambda m, t, x: m.layer(m.linear(x)), linear=nn.Linear(3, 3), layer=layer).double()


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_conditions_of_any_kind_reach_the_field(x, control):
    """A tensor for each sample, a number, a module that trains elsewhere."""
    field = Velocity(lambda m, t, x: -x)
    field.forward = lambda t, x, rate, scale: -rate * scale * x
    rate = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    end = NeuralODE(field, tolerance=TIGHT, control=control)(x, rate, 2.0)
    assert_close(end, x * torch.exp(-2 * rate), rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(end.sum(), rate)
    assert_close(gradient, -2 * end.sum(1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_conditioned_network_trains_what_makes_the_condition(x, gradient):
    torch.manual_seed(0)
    network = Network(nn.Linear(3, 3), NeuralODE(Conditioned(), gradient=gradient, **FIXED), nn.Linear(3, 2)).double()
    embed = nn.Linear(1, 3).double()
    loss = network(x, embed(x[:, :1])).square().sum()
    loss.backward()
    every = [p.grad for p in [*network.parameters(), *embed.parameters()]]
    network.flows[0].gradient = "direct"
    loss = network(x, embed(x[:, :1])).square().sum()
    expected = torch.autograd.grad(loss, [*network.parameters(), *embed.parameters()])
    for one, other in zip(every, expected, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("settings", [FIXED, {}], ids=["fixed", "adaptive"])
def test_dropout_is_drawn_again_or_refused(x, gradient, settings):
    field = mixing(nn.Dropout(0.5))
    ode = NeuralODE(field, gradient=gradient, **settings)
    again = gradient == "direct" or (gradient == "checkpoint" and settings is FIXED)
    if not again:
        with pytest.raises(ValueError, match=r"field draws random numbers at every call.*use gradient='direct'"):
            ode(x)
    elif settings is FIXED:
        torch.manual_seed(1)
        ode(x).sum().backward()
        torch.manual_seed(1)
        loss = NeuralODE(field, **settings)(x).sum()
        assert_close(field.linear.weight.grad, torch.autograd.grad(loss, field.linear.weight)[0])
    ode.eval()
    assert_close(ode(x), NeuralODE(field, **settings).eval()(x))


@pytest.mark.filterwarnings("ignore:field.layer is BatchNorm1d")
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_batch_norm_counts_a_batch_once_and_its_gradient_is_that_of_the_steps(x, gradient):
    field = mixing(nn.BatchNorm1d(3))
    other = copy.deepcopy(field)
    ode = NeuralODE(field, gradient=gradient, steps=50, solver="rk4")
    direct = NeuralODE(other, steps=50, solver="rk4")
    for one in (ode, direct):
        one(x).square().sum().backward()
    assert field.layer.num_batches_tracked == other.layer.num_batches_tracked == 200
    assert_close(field.layer.running_mean, other.layer.running_mean)
    assert_close(field.layer.weight.grad, other.layer.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("gradient", ["checkpoint", "backsolve"])
def test_spectral_norm_in_training_mode_is_refused_where_the_field_is_called_again(x, norm, gradient):
    field = Velocity(lambda m, t, x: torch.tanh(m.layer(x)), layer=norm(nn.Linear(3, 3).double()))
    ode = NeuralODE(field, gradient=gradient, tolerance=TIGHT)
    with pytest.raises(ValueError, match=r"field changes at every call.*spectral norm.*gradient='direct'"):
        ode(x)
    losses = [one.eval()(x).square().sum() for one in (ode, NeuralODE(field, tolerance=TIGHT))]
    first, second = (torch.autograd.grad(loss, field.layer.bias) for loss in losses)
    assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_batch_norm_in_training_mode_is_refused_with_control_of_each_sample(x):
    ode = NeuralODE(mixing(nn.BatchNorm1d(3)), control="sample")
    for call in (ode, ode.solution, lambda x: ode.record(x, action=measures.action)):
        with pytest.raises(ValueError, match=r"field must treat each sample as if it were alone.*batch norm"):
            call(x)
    with pytest.raises(ValueError, match="batch norm"):
        NeuralODE(MLPField(3, norm="batch").double(), control="sample")(x)
    ode.eval()
    assert_close(ode(x)[:1], ode(x[:1]))
    with pytest.raises(ValueError, match="batch norm"):
        NeuralODE(mixing(nn.BatchNorm1d(3, track_running_stats=False)), control="sample").eval()(x)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_field_may_differentiate(x, gradient, control):
    """The logarithm of a density by a trace, as in FFJORD: exact for a linear field, equal in every mode."""
    if (gradient, control) == ("backsolve", "sample"):
        pytest.skip("backsolve has one time for the batch")
    field, noise = Density().double(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        plain = NeuralODE(field, gradient=gradient, control=control, tolerance=TIGHT)((x, x.new_zeros(5)), noise)
    ends = NeuralODE(field, gradient=gradient, control=control, tolerance=TIGHT)((x, x.new_zeros(5)), noise)
    direct = NeuralODE(field, tolerance=TIGHT)((x, x.new_zeros(5)), noise)
    assert_close(ends[1], direct[1], rtol=1e-6, atol=1e-7)
    assert_close(plain[1], ends[1].detach())
    parameters = [*field.parameters()][:3]  # the last bias moves no density
    for one, other in zip(
        torch.autograd.grad(ends[0].square().sum() + ends[1].sum(), parameters),
        torch.autograd.grad(direct[0].square().sum() + direct[1].sum(), parameters),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_trace_of_a_linear_field_is_its_density(x):
    field = Density().double()
    field.net = nn.Linear(3, 3, bias=False).double()
    noise = torch.eye(3, dtype=torch.float64)
    rate = sum(NeuralODE(field, tolerance=TIGHT)((x, x.new_zeros(5)), noise[i].expand(5, 3))[1] for i in range(3))
    assert_close(rate, -field.net.weight.trace().expand(5))


def test_differentiating_a_state_that_requires_nothing_raises(x):
    field = Velocity(lambda m, t, x: torch.autograd.grad(x.square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="does not require grad"):
        NeuralODE(field)(x)
    assert_close(NeuralODE(field, t1=-1.0, tolerance=TIGHT)(x.requires_grad_()), x * math.exp(-2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [FIXED, {"tolerance": TIGHT}], ids=["fixed", "adaptive"])
def test_least_action_has_equal_gradients_in_every_mode(x, settings):
    torch.manual_seed(0)
    network = Network(nn.Linear(3, 4), NeuralODE(MLPField(4, 8, activation="tanh"), **settings), nn.Linear(4, 2))
    network.double()
    labels, gradients = torch.arange(5) % 2, []
    for gradient in GRADIENTS:
        network.flows[0].gradient = gradient
        loss = LeastAction()(network, x, labels)
        gradients.append(torch.autograd.grad(loss, [*network.parameters()]))
    for one, other in zip(gradients[0] * 2, gradients[1] + gradients[2], strict=True):
        assert_close(one, other, rtol=1e-3 if settings is FIXED else 1e-6, atol=1e-4 if settings is FIXED else 1e-7)


@pytest.mark.parametrize("mode", [{"gradient": gradient} for gradient in GRADIENTS] + [{"control": "sample"}], ids=str)
def test_least_action_moves_the_data_less(mode):
    points = torch.randn(64, 2)
    labels, actions = (points.norm(dim=1) > 1).long(), []
    settings = mode if "control" in mode else mode | FIXED
    for objective in (Task(nn.functional.cross_entropy), LeastAction(lambda0=0.1, tau=0.1)):
        torch.manual_seed(0)
        network = Network(nn.Linear(2, 4), NeuralODE(MLPField(4), **settings), nn.Linear(4, 2))
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(40):
            loss = objective(network, points, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        actions.append(network.record(points, action=measures.action)[1]["action"].sum(0).mean())
    assert actions[1] < actions[0] / 2


@pytest.mark.parametrize("mode", [{}, {"gradient": "checkpoint"}, {"gradient": "backsolve"}, {"control": "sample"}])
def test_the_action_is_the_integral_of_the_squared_velocity_along_the_solution(x, field, mode):
    _, records = NeuralODE(field, tolerance=TIGHT, t1=2.0, **mode).record(x, action=measures.action)
    solution = NeuralODE(field, tolerance=TIGHT, t1=2.0).solution(x)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(20))
    expected = sum(
        w * field(t, solution(t)).square().mean(1) for t, w in zip((nodes + 1).tolist(), weights, strict=True)
    )
    assert_close(records["action"].sum(0), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_fixed_steps_compile_whole_and_train(x, gradient):
    field = Conditioned().double()
    ode = NeuralODE(field, gradient=gradient, steps=2, solver="heun")
    results = []
    for function in (ode, torch.compile(ode, backend="eager", fullgraph=True)):
        states = function(x, x, at=[0.25, 1.0])
        results.append((states, *torch.autograd.grad(states.sum(), [*field.parameters()])))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_fixed_steps_are_exported(x, field):
    ode = NeuralODE(field, **FIXED)
    assert_close(torch.export.export(ode, (x,)).module()(x), ode(x))


def test_fixed_steps_go_through_transforms(x, field):
    ode = NeuralODE(field, **FIXED)
    batches = torch.randn(4, 5, 3, dtype=torch.float64)
    assert_close(torch.vmap(ode)(batches), torch.stack([*map(ode, batches)]))
    _, tangent = torch.func.jvp(ode, (x,), (batches[0],))
    ahead, back = ode(x + 1e-6 * batches[0]), ode(x - 1e-6 * batches[0])
    assert_close(tangent, (ahead - back) / 2e-6, rtol=1e-6, atol=1e-7)
    weights = {name: torch.zeros_like(p) for name, p in ode.named_parameters()}
    assert_close(torch.func.functional_call(ode, weights, (x,)), x)
    with pytest.raises(RuntimeError, match=r"cannot be mapped by torch.vmap.*control='sample'"):
        torch.vmap(NeuralODE(field))(batches)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_gradient_of_a_gradient(x, field, gradient):
    results = []
    for one in ("direct", gradient):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(
            NeuralODE(field, tolerance=TIGHT, gradient=one)(z).square().sum(), z, create_graph=True
        )
        results.append(torch.autograd.grad(g.square().sum(), z)[0])
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_backward_pass_outside_of_autocast_is_that_of_the_forward_pass(gradient):
    field, x = MLPField(3, 8), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        end = NeuralODE(field, gradient=gradient, **FIXED)(x)
        expected = torch.autograd.grad(NeuralODE(field, **FIXED)(x).sum(), [*field.parameters()])
    assert end.dtype == torch.float32
    for one, other in zip(torch.autograd.grad(end.sum(), [*field.parameters()]), expected, strict=True):
        assert_close(one, other, rtol=0.05, atol=0.05)


def test_inference_mode_and_half_precision(x, field):
    with torch.inference_mode():
        for gradient in GRADIENTS:
            assert not NeuralODE(field, gradient=gradient)(x).requires_grad
    for dtype in (torch.bfloat16, torch.float16):
        end = NeuralODE(Velocity(lambda m, t, x: -x))(torch.ones(2, 3, dtype=dtype))
        assert end.dtype == dtype
        assert_close(end.float(), torch.full((2, 3), math.exp(-1)), rtol=0.02, atol=0.02)


def test_it_is_a_layer_of_a_sequential(x):
    layers = nn.Sequential(nn.Linear(3, 4), NeuralODE(MLPField(4)), nn.Linear(4, 1)).double()
    layers(x).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())


def test_a_function_that_cannot_be_pickled_can_be_copied(x, field):
    ode = NeuralODE(field, event=lambda t, x: x.sum() - 100)
    assert torch.equal(copy.deepcopy(ode)(x), ode(x))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(ode)


def test_a_copy_of_a_method_is_that_of_the_copy(x):
    ode = NeuralODE(Bound().velocity).double()
    other = copy.deepcopy(ode)
    nn.init.zeros_(other.owner.layer.weight)
    nn.init.zeros_(other.owner.layer.bias)
    assert torch.equal(other(x), x)
    assert not torch.equal(ode(x), x)
