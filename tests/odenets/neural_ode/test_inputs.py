"""What a NeuralODE does not take it names, with what it takes instead."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from odenets import MLPField, Network, NeuralODE, measures
from tests.odenets.networks import Velocity

LAYER = nn.Linear(3, 3)


def through_a_global(x):
    return LAYER(x)


class Holder:
    """No module, but it holds one."""

    def __init__(self):
        self.layer = nn.Linear(3, 3)

    def __call__(self, t, x):
        return self.layer(x)

    def velocity(self, t, x):
        return self.layer(x)


class Swapped(nn.Module):
    def forward(self, x, t):
        return -x


class Reading(nn.Module):
    """A field and an event that share parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.direction = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, t, x):
        return 1 + torch.tanh(self.layer(x))

    def crossing(self, t, x):
        return (x @ self.direction).sum() - 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "dopri5"}, "takes no 'method': that is solver"),
        ({"rtol": 1e-3}, r"takes no 'rtol': that is tolerance=Tolerance\(rtol=1e-3, atol=1e-6\)"),
        ({"atol": 1e-3}, r"takes no 'atol': that is tolerance=Tolerance"),
        ({"adjoint": True}, "takes no 'adjoint': that is gradient=\"backsolve\""),
        ({"sensitivity": "adjoint"}, 'that is gradient="backsolve"'),
        ({"options": {"step_size": 0.1}}, "that is steps, the number of equal steps"),
        ({"depth": 3}, "that is steps, the number of equal steps"),
        ({"t_span": (0, 1)}, r"that is t0 and t1, and in the call at: ode\(x, at=times\)"),
        ({"adjoint_params": ()}, "that is the field, a module that holds what trains"),
        ({"event_fn": abs}, "that is event"),
        ({"args": ()}, r"that is the call: ode\(x, \*args\)"),
        ({"frobnicate": 1}, "takes no 'frobnicate'$"),
    ],
    ids=str,
)
def test_settings_of_other_libraries_name_those_of_this_one(keywords, message):
    with pytest.raises(TypeError, match=message):
        NeuralODE(MLPField(3), **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": 1e-3}, TypeError, r"tolerance must be a Tolerance, as Tolerance\(rtol=1e-3\)"),
        (
            {"solver": "dop853"},
            ValueError,
            "unknown solver 'dop853': take 'dopri8'; known are .*dopri5.*bosh3",
        ),
        ({"solver": "rk4"}, ValueError, "no embedded error"),
        ({"field": Swapped()}, TypeError, r"field must take t and x, .* takes \(x, t\) \(t is its first"),
        ({"field": lambda x, t: -x}, TypeError, "t is its first argument"),
        ({"field": lambda x: -x}, TypeError, "field must take t and x"),
        ({"field": nn.Sequential(LAYER)}, TypeError, "field must take t and x"),
        ({"field": MLPField(3)(0.0, torch.ones(1, 3))}, TypeError, "field must be a velocity"),
        ({"event": lambda x: x.sum()}, TypeError, "event must take t and x"),
        ({"event": nn.Linear(3, 1)}, TypeError, "event must take t and x, .* Linear takes"),
        ({"event": 0.5}, TypeError, r"event must be a function \(t, x\), got 0.5"),
        ({"event": lambda t, x: LAYER(x).sum()}, TypeError, "event must be a module.*hides 'LAYER'"),
        ({"t1": "1"}, TypeError, "t1 must be a number"),
        ({"t1": None}, TypeError, "t1 must be a number"),
        ({"t0": float("nan")}, ValueError, "t0 must be finite"),
    ],
)
def test_natural_mistakes_are_named_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        NeuralODE(**({"field": MLPField(3)} | arguments))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda t, x: (x,), "field must return a tensor, got tuple"),
        (lambda t, x: None, "field must return a tensor, got NoneType"),
        (lambda t, x: 1.0, "field must return a tensor, got float"),
        (lambda t, x: x[:, :2], "field must keep the shape of x"),
        (lambda t, x: x[0], "field must keep the shape of x"),
        (lambda t, x: x.double(), "field must keep the dtype of x"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"steps": 2, "solver": "rk4"}, {"control": "sample"}], ids=str)
def test_no_velocity_is_named(field, message, mode):
    with pytest.raises((TypeError, ValueError), match=message):
        NeuralODE(field, **mode)(torch.ones(5, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ode, x: ode(x, torch.linspace(0, 1, 5)), TypeError, r"output times are named: ode\(x, at=times\)"),
        (lambda ode, x: ode(x, [0.0, 1.0]), TypeError, r"output times are named: ode\(x, at=times\)"),
        (lambda ode, x: ode(x, x), TypeError, "field must take t, x and 1 further"),
        (lambda ode, x: ode(x.long()), TypeError, "x0 must be floating or complex"),
        (lambda ode, x: ode(x[:0]), ValueError, "x0 must hold at least one number"),
        (lambda ode, x: ode(x[:0], at=[0.5]), ValueError, "x0 must hold at least one number"),
        (lambda ode, x: ode([1.0, 2.0]), TypeError, "x0 must"),
        (lambda ode, x: ode.record(x, c=x), TypeError, r"measure 'c' must be a function.*record\(x, c\)"),
        (lambda ode, x: ode.record((x, x), action=measures.action), TypeError, "x must be one tensor.*torch.cat"),
        (lambda ode, x: ode.record(x, action=lambda step: 1.0), ValueError, "must return one number per sample"),
        (lambda ode, x: ode.steps((x, x)), TypeError, "x must be one tensor"),
        (lambda ode, x: Network(LAYER, ode, LAYER).ensemble(x), ValueError, "a neural ODE has one output"),
        (lambda ode, x: Network(LAYER, ode, LAYER, readout="ensemble")(x), ValueError, "readout must be 'solution'"),
    ],
)
def test_calls_that_do_not_work_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(NeuralODE(MLPField(3)), torch.randn(5, 3))


@pytest.mark.parametrize(
    ("field", "hidden"),
    [
        (lambda t, x: LAYER(x), "LAYER"),
        (lambda t, x: through_a_global(x), "LAYER"),
        (lambda t, x: next(LAYER(x) for _ in range(1)), "LAYER"),
        (lambda t, x, layer=LAYER: layer(x), "<lambda>"),
        ((lambda layers: lambda t, x: layers[0](x))([LAYER]), "layers"),
        ((lambda layers: lambda t, x: layers.one(x))(SimpleNamespace(one=LAYER)), "one"),
        (partial(Velocity(lambda m, t, x: m.layer(x), layer=LAYER)), "Velocity"),
        (Holder(), "layer"),
        (Holder().velocity, "layer"),
        ((lambda weight: lambda t, x: x @ weight)(torch.ones(3, 3, requires_grad=True)), "weight"),
    ],
)
def test_parameters_that_would_not_train_are_named(field, hidden):
    with pytest.raises(TypeError, match=f"field must be a module where it reads one: a function hides '{hidden}'"):
        NeuralODE(field)


@pytest.mark.parametrize(
    "field",
    [
        torch.add,
        lambda t, x: nn.functional.softplus(x),
        lambda t, x: SimpleNamespace(LAYER=x).LAYER,
        partial(lambda t, x, c: c * x, c=2.0),
        (lambda matrix: lambda t, x: x @ matrix)(torch.eye(3)),
        MLPField(3).forward,
    ],
)
def test_functions_without_parameters_are_fields(field):
    for gradient in ("direct", "checkpoint", "backsolve"):
        assert NeuralODE(field, gradient=gradient)(torch.ones(2, 3)).shape == (2, 3)


def test_the_parameters_of_an_event_train_and_shared_ones_are_there_once():
    model = Reading()
    ode = NeuralODE(model, event=model.crossing)
    assert {*ode.state_dict()} == {"field.layer.weight", "field.layer.bias", "field.direction"}
    other = NeuralODE(MLPField(3), event=model.crossing)
    assert {*model.parameters()} < {*other.parameters()}
    end = ode(torch.zeros(1, 3))
    end.sum().backward()
    assert model.direction.grad.abs().sum() > 0


def test_bosh3_is_bs23():
    assert NeuralODE(MLPField(3), solver="bosh3").tableau.name == "bs23"
