"""RevNet and Hamiltonian networks are the formulas of their papers, of the orders that they say."""

import itertools
import math

import pytest
import torch
from torch import nn

import odenets
from odenets.fields import SymmetricField
from odenets.schemes import Hamiltonian, RevNet
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of

D = torch.float64


def halves(x):
    return x[:, :3], x[:, 3:]


def flow_and_state(scheme, **settings):
    flow, _ = flow_of(scheme, **settings)
    return flow, torch.randn(5, 6, dtype=D, requires_grad=True)


@pytest.mark.parametrize("reversible", [True, False])
def test_revnet_is_the_formula_of_its_paper(reversible):
    flow, x = flow_and_state(RevNet(reversible=reversible))
    x1, x2 = halves(x)
    for f, g in fields_of(flow):
        x1 = x1 + 0.3 * f(x2)
        x2 = x2 + 0.3 * g(x1)
    assert_same(flow, x, torch.cat([x1, x2], 1))


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("form", ["euler", "verlet"])
def test_hamiltonian_is_the_formula_of_its_paper(form, reversible):
    flow, x = flow_and_state(Hamiltonian(form, reversible=reversible))
    y, z = halves(x)
    for f, g in fields_of(flow):
        if form == "euler":
            y = y + 0.3 * f(z)
            z = z - 0.3 * g(y)
        else:
            y = y + 0.15 * f(z)
            z = z - 0.3 * g(y)
            y = y + 0.15 * f(z)
    assert_same(flow, x, torch.cat([y, z], 1))


class Turning(nn.Module):
    """``cos(t) x``, so that halves turn by the angle ``sin(t)``."""

    def forward(self, t, x):
        return math.cos(t) * x


@pytest.mark.parametrize(("form", "order"), [("euler", 1), ("verlet", 2)])
def test_they_are_of_their_orders(form, order):
    x, errors = torch.randn(4, 6, dtype=D), []
    y, z = halves(x)
    angle = math.sin(1.5)
    c, s = math.cos(angle), math.sin(angle)
    end = torch.cat([c * y + s * z, c * z - s * y], 1)
    for depth in (20, 40, 80):
        flow = odenets.Flow(Turning, solver=Hamiltonian(form), depth=depth, total_time=1.5)
        assert flow.tableau.order == order
        errors.append((flow(x) - end).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


class Linear(nn.Module):
    """``W x`` with a symmetric positive W."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.randn(3, 3, dtype=D) / 2)

    def forward(self, t, x):
        return x @ self.root @ self.root.T

    def energy(self, x):
        return ((x @ self.root) ** 2).sum(1) / 2


class Tanh(SymmetricField):
    def __init__(self):
        super().__init__(3, activation="tanh", sign=1)
        self.to(D)

    def energy(self, x):
        return torch.log(torch.cosh(self.K(x))).sum(1)


@pytest.mark.parametrize("form", ["hamiltonian", "hamiltonian_verlet"])
@pytest.mark.parametrize("kind", [Linear, Tanh])
def test_their_energy_is_bounded_over_a_thousand_steps(kind, form):
    fields = [kind(), kind()]
    flow = odenets.Flow(iter(fields).__next__, solver=form, depth=1000, h=0.05, shared=True)
    x = torch.randn(8, 6, dtype=D)

    def energy(x):
        y, z = halves(x)
        return fields[0].energy(z) + fields[1].energy(y)

    with torch.no_grad():
        energies = torch.stack([energy(x), *(energy(step.x1) for step in flow.steps(x))])
    assert ((energies - energies[0]).abs() <= (0.02 if "verlet" in form else 0.2) * energies[0]).all()
    early, late = (part.sub(energies[0]).abs().amax(0) for part in (energies[:500], energies[500:]))
    assert (late <= 1.2 * early + 1e-9).all()


@pytest.mark.parametrize("form", ["euler", "verlet"])
def test_gradients_neither_vanish_nor_explode(form):
    def norm(depth):
        torch.manual_seed(0)
        flow = odenets.Flow(Tanh, solver=Hamiltonian(form), depth=depth, h=0.1, shared=True)
        x = torch.randn(16, 6, dtype=D, requires_grad=True)
        weights = torch.randn(16, 6, dtype=D)
        return torch.autograd.grad((flow(x) * weights).sum(), x)[0].norm().item()

    assert 0.1 <= norm(200) / norm(1) <= 10


def test_statistics_of_a_second_use_are_its_own():
    flow = odenets.Flow(odenets.ConvField(2, norm="batch"), solver=Hamiltonian("verlet"), depth=2)
    assert [field.norm1.stages for field in flow.blocks[0].fields] == [2, 1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hamiltonian("leapfrog"), ValueError, "form must be 'euler' or 'verlet', got 'leapfrog'"),
        (lambda: RevNet(reversible="yes"), TypeError, "reversible must be True or False, got 'yes'"),
        (
            lambda: odenets.Flow(odenets.MLPField(2), solver="revnet")(torch.randn(4, 5)),
            ValueError,
            r"x must have an even number of channels with solver='revnet'.*got shape \(4, 5\)",
        ),
        (
            lambda: odenets.Flow(solver="hamiltonian")(torch.randn(4, 5)),
            ValueError,
            r"x must have an even number of channels with solver='hamiltonian'",
        ),
    ],
)
def test_what_has_no_halves_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
