"""Momentum ResNet is the recurrence of its paper, from the residual network on."""

import pytest
import torch

from odenets.schemes import Momentum
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.0])
def test_momentum_is_the_formula_of_its_paper(gamma, reversible):
    flow, x = flow_of(Momentum(gamma, reversible=reversible), depth=6)
    y, r = x, torch.zeros_like(x)
    for (f,) in fields_of(flow):
        r = gamma * r + (1 - gamma) * f(y)
        y = y + 0.3 * r
    assert_same(flow, x, y)


@pytest.mark.parametrize("reversible", [True, False])
def test_without_momentum_it_is_the_residual_network(reversible):
    flow, x = flow_of(Momentum(0.0, reversible=reversible))
    assert_same(flow, x, flow.of(list(flow.blocks), solver="euler")(x))


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (1.0, ValueError, r"gamma must be in \[0, 1\), got 1\.0: 0 is a residual network"),
        (-0.5, ValueError, r"gamma must be in \[0, 1\)"),
        (True, TypeError, "gamma must be a number, got True"),
    ],
)
def test_another_momentum_is_refused(gamma, error, message):
    with pytest.raises(error, match=message):
        Momentum(gamma)
