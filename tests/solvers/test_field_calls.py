"""A field that is no ``v(t, x, *args)`` is named, with the remedy."""

import re

import pytest
import torch
from torch import nn

from solvers import integrate
from tests.solvers.problems import CONTROLS, X0, D, Net

linear = nn.Linear(2, 2, dtype=D)
WAYS = [{"steps": 2}, {"gradient": "checkpoint"}, {"gradient": "backsolve", "parameters": ()}, *CONTROLS]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize(
    ("field", "args", "message"),
    [
        (linear, (), "field must take t and x, as v(t, x), but Linear takes (input"),
        (nn.Sequential(linear), (), "field must take t and x, as v(t, x), but Sequential takes (input"),
        (lambda x: -x, (), "field must take t and x, as v(t, x), but <lambda> takes (x)"),
        (lambda t, x: -x, (1.0,), "field must take t, x and 1 further, as v(t, x, c), but <lambda> takes (t, x)"),
        (lambda t, x, a, b: -x, (1.0,), "missing a required argument: 'b'"),
    ],
)
def test_a_field_of_other_arguments_is_named(field, args, message, options):
    with pytest.raises(TypeError, match=re.escape(message)):
        integrate(field, X0.clone().requires_grad_(), 0.0, 1.0, args=args, **options)


def test_the_remedy_for_a_network_is_a_function_around_it():
    with pytest.raises(TypeError, match="wrap a network, as lambda t, x: net"):
        integrate(linear, X0, 0.0, 1.0)
    assert integrate(lambda t, x: linear(x), X0, 0.0, 1.0).x1.shape == X0.shape


@pytest.mark.parametrize("options", WAYS)
def test_an_error_inside_the_field_is_its_own(options):
    def field(t, x):
        return len(3) + x

    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        integrate(field, X0, 0.0, 1.0, **options)


def test_a_builtin_function_without_signature_keeps_its_own_error():
    with pytest.raises(TypeError, match="lerp"):
        integrate(torch.lerp, X0, 0.0, 1.0)


@pytest.mark.parametrize("field", [3, None, "field", X0])
def test_what_cannot_be_called_is_named(field):
    with pytest.raises(TypeError, match=r"field must be a function v\(t, x\), got"):
        integrate(field, X0, 0.0, 1.0)


def test_bound_methods_and_modules_with_arguments_are_fields():
    net = Net()
    assert torch.equal(integrate(net.forward, X0, 0.0, 1.0).x1, integrate(net, X0, 0.0, 1.0, args=(torch.zeros(2),)).x1)
