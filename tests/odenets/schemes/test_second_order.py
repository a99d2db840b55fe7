"""Networks of second order and of two steps are the recurrences of their papers, of order 2, and stable."""

import itertools
import math

import pytest
import torch
from torch import nn

import odenets
from odenets.schemes import HeavyBall, SecondOrder, TwoStepMidpoint
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of

D = torch.float64


@pytest.mark.parametrize("reversible", [True, False])
def test_midpoint_is_the_formula_of_its_paper(reversible):
    flow, x = flow_of(TwoStepMidpoint(reversible=reversible))
    states = [x]
    for m, (f,) in enumerate(fields_of(flow)):
        states.append(states[-2] + 0.6 * f(states[-1]) if m else x + 0.3 * f(x))
    assert_same(flow, x, states[-1])


@pytest.mark.parametrize("reversible", [True, False])
def test_second_order_is_the_formula_of_its_paper(reversible):
    flow, x = flow_of(SecondOrder(reversible=reversible))
    states = [x]
    for m, (f,) in enumerate(fields_of(flow)):
        now = states[-1]
        states.append(2 * now - states[-2] + 0.09 * f(now) if m else x + 0.045 * f(x))
    assert_same(flow, x, states[-1])


@pytest.mark.parametrize("reversible", [True, False])
def test_heavy_ball_damps_exactly_between_kicks(reversible):
    flow, x = flow_of(HeavyBall(2.0, reversible=reversible), h=[0.3, 0.1, 0.2, 0.4])
    y, r, middle, t = x, torch.zeros_like(x), 0.0, 0.0
    for (f,), h in zip(fields_of(flow), flow.h, strict=True):
        tau, middle = t + h / 2 - middle, t + h / 2
        r = math.exp(-2 * tau) * r + (1 - math.exp(-2 * tau)) / 2 * f(y)
        y, t = y + h * r, t + h
    assert_same(flow, x, y)


def test_without_damping_a_heavy_ball_is_of_second_order():
    flow, x = flow_of("second_order")
    torch.testing.assert_close(flow.of(list(flow.blocks), solver=HeavyBall(0.0))(x), flow(x), rtol=0, atol=1e-15)


class Spiral(nn.Module):
    """``x' = cos(t) A x``, which turns by the angle ``sin(t)``."""

    def forward(self, t, x):
        return math.cos(t) * torch.stack([-x[:, 1], x[:, 0]], 1)


class Spring(nn.Module):
    def forward(self, t, x):
        return -4 * x


def _turned(t):
    return torch.tensor([[math.cos(math.sin(t)), math.sin(math.sin(t))]], dtype=D)


def _oscillated(t):
    return torch.tensor([[math.cos(2 * t), 0.0]], dtype=D)


def _damped(t):
    w = math.sqrt(3)
    return torch.tensor([[math.exp(-t) * (math.cos(w * t) + math.sin(w * t) / w), 0.0]], dtype=D)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("scheme", "field", "end"),
    [(TwoStepMidpoint(), Spiral, _turned), (SecondOrder(), Spring, _oscillated), (HeavyBall(2.0), Spring, _damped)],
    ids=["midpoint", "second order", "heavy ball"],
)
def test_they_are_of_order_two(scheme, field, end, sizes):
    errors, x = [], torch.tensor([[1.0, 0.0]], dtype=D)
    for depth in (40, 80, 160):
        weights = [1 + 0.5 * math.sin(6 * m / depth) * (sizes == "unequal") for m in range(depth)]
        h = [1.5 * w / sum(weights) for w in weights]
        errors.append((odenets.Flow(field, solver=scheme, depth=depth, h=h)(x) - end(1.5)).abs().max().item())
    assert scheme.order == 2
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.15)


class Symmetric(nn.Module):
    """``-K^T s(K x)`` with the energy ``S(K x)``."""

    def __init__(self, kind):
        super().__init__()
        self.K, self.kind = nn.Parameter(torch.randn(4, 4, dtype=D) / 2), kind

    def forward(self, t, x):
        y = x @ self.K.T
        return -(y if self.kind == "quadratic" else torch.tanh(y)) @ self.K

    def energy(self, x):
        y = x @ self.K.T
        return (y.square() / 2 if self.kind == "quadratic" else torch.log(torch.cosh(y))).sum(1)


@pytest.mark.parametrize("kind", ["quadratic", "tanh"])
def test_the_energy_of_second_order_is_bounded_over_a_thousand_steps(kind):
    field, x = Symmetric(kind), torch.randn(8, 4, dtype=D)
    flow = odenets.Flow(field, solver="second_order", depth=1000, h=0.05, shared=True)
    with torch.no_grad():
        steps = [*flow.steps(x)]
        middle = [
            (one.residue + two.residue) / 2 for one, two in itertools.pairwise(steps)
        ]  # the velocity at x0 of two
        pairs = zip(middle, steps[1:], strict=True)
        energies = torch.stack([field.energy(x)] + [v.square().sum(1) / 2 + field.energy(s.x0) for v, s in pairs])
    assert ((energies - energies[0]).abs() <= 0.02 * energies[0]).all()


class Antisymmetric(nn.Module):
    def __init__(self):
        super().__init__()
        self.K = nn.Parameter(torch.randn(4, 4, dtype=D) / 2)

    def forward(self, t, x):
        return torch.tanh(x @ (self.K - self.K.T))


@pytest.mark.parametrize(
    ("scheme", "field"), [("two_step_midpoint", Antisymmetric), ("second_order", lambda: Symmetric("tanh"))]
)
def test_gradients_neither_vanish_nor_explode(scheme, field):
    def norm(depth):
        torch.manual_seed(0)
        flow = odenets.Flow(field, solver=scheme, depth=depth, h=0.1, shared=True)
        x, weights = torch.randn(16, 4, dtype=D, requires_grad=True), torch.randn(16, 4, dtype=D)
        return torch.autograd.grad((flow(x) * weights).sum(), x)[0].norm().item()

    assert 0.1 <= norm(200) / norm(1) <= 10


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (-0.1, ValueError, r"gamma must be finite and not negative, got -0\.1"),
        (math.inf, ValueError, "gamma must be finite and not negative, got inf"),
        ("1", TypeError, "gamma must be a number, got '1'"),
    ],
)
def test_another_damping_is_refused(gamma, error, message):
    with pytest.raises(error, match=message):
        HeavyBall(gamma)
