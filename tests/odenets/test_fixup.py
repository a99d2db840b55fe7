"""Fixup: the weights by the formula, and what a step of SGD does to the function, at any depth."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, models
from odenets.fields import FixupField, ScaledField
from odenets.fixup import fixup
from odenets.initialization import initialize


def linear_field(features, m, hidden=24):
    sizes = [features, *[hidden] * (m - 1), features]
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    return FixupField(*layers)


def network(depth, m=2, features=16):
    flow = Flow(lambda: linear_field(features, m), solver="euler", h=1.0, depth=depth)
    return Network(nn.Linear(8, features), flow, nn.Linear(features, 3))


@pytest.mark.parametrize(("m", "exponent"), [(2, -1 / 2), (3, -1 / 4), (4, -1 / 6)])
@pytest.mark.parametrize("depth", [4, 50])
def test_layers_of_a_field_are_scaled_by_the_depth_and_the_last_is_zero(m, exponent, depth):
    torch.manual_seed(0)
    net = fixup(network(depth, m, features=64 if depth == 4 else 16))
    for i in range(m):
        weights = torch.cat([block.fields[0].layers[i].weight.flatten() for block in net.flows[0].blocks])
        if i == m - 1:
            assert not weights.any()
        else:
            fan = net.flows[0].blocks[0].fields[0].layers[i].in_features
            assert weights.std().item() == pytest.approx((2 / fan) ** 0.5 * depth**exponent, rel=0.06)
    assert not net.head.weight.any()
    assert not net.head.bias.any()
    assert net.encoder.weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.2)


def test_convolutions_of_several_flows_count_all_blocks():
    torch.manual_seed(0)
    flows = [Flow(lambda c=c: ConvField(c, norm=None), solver="euler", h=1.0, depth=3) for c in (16, 32)]
    net = Network(
        nn.Conv2d(1, 16, 3), flows, nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), transitions=[nn.Conv2d(16, 32, 1)]
    )
    assert fixup(net) is net
    for flow, c in zip(flows, (16, 32), strict=True):
        for block in flow.blocks:
            assert block.fields[0].conv1.weight.std().item() == pytest.approx((2 / (9 * c) / 6) ** 0.5, rel=0.1)
            assert not block.fields[0].conv2.weight.any()
    assert net.transitions[0].weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.2)
    assert not net.head[1].weight.any()


def test_scalars_are_reset():
    flow = Flow(lambda: ScaledField(FixupField(nn.Linear(4, 4, bias=False))), depth=2)
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(3.0)
    fixup(flow)
    for block in flow.blocks:
        field = block.fields[0]
        assert field.scale == field.field.scale == 1
        assert not field.field.biases.any()


@pytest.mark.parametrize("field", [lambda: linear_field(8, 2), lambda: MLPField(8, activation="relu")])
def test_fifty_blocks_begin_as_the_identity(field):
    flow, x = fixup(Flow(field, solver="euler", h=1.0, depth=50)), torch.randn(4, 8)
    assert torch.equal(flow(x), x)


def change_by_a_step(net, eta):
    """Root mean square of what a step of SGD on the blocks does to the output; the head is drawn, since 0 hides all."""
    torch.manual_seed(7)
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.arange(32) % 3
    net = copy.deepcopy(net).double()
    for layer in (net.encoder, net.head):
        nn.init.normal_(layer.weight, std=0.3).requires_grad_(False)
    before = net(x)
    F.cross_entropy(before, y).backward()
    with torch.no_grad():
        for p in net.flows[0].parameters():
            p -= eta * p.grad
    return (net(x) - before).square().mean().sqrt().item()


@pytest.mark.parametrize("m", [2, 3])
def test_a_step_of_sgd_changes_the_function_by_eta_whatever_the_depth(m):
    """Theta(eta), the criterion of the paper; with He's weights alone it grows with the depth without bounds."""
    torch.manual_seed(0)
    net, deep = fixup(network(10, m)), fixup(network(100, m))
    assert 0.5 < change_by_a_step(deep, 0.01) / change_by_a_step(net, 0.01) < 2
    for one in (net, deep):
        assert change_by_a_step(one, 0.01) / change_by_a_step(one, 0.001) == pytest.approx(10, rel=0.1)
    others = [change_by_a_step(initialize(network(depth, m), "kaiming"), 1e-12) for depth in (10, 30)]
    assert others[1] > 1e4 * others[0]


MLP = MLPField(2)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: fixup(models.small_network()), ValueError, "fields must have no norms.*'norm1.*norm=None"),
        (lambda: fixup(Flow(depth=2)), ValueError, "flow 0 has no field yet"),
        (lambda: fixup(Flow(MLP, shared=True, depth=2)), ValueError, "one block for all its steps"),
        (lambda: fixup(Network(nn.Identity(), NeuralODE(MLP), nn.Identity())), TypeError, "got a NeuralODE"),
        (lambda: fixup(nn.Linear(2, 2)), TypeError, "network must be an odenets.Network or a Flow, got Linear"),
        (
            lambda: fixup(Flow(lambda: ScaledField(nn.Bilinear(1, 2, 2)))),
            ValueError, "got 'field' of ScaledField, which Fixup does not know how to draw",
        ),
        (lambda: fixup(Flow(lambda: ScaledField(nn.Identity()))), ValueError, "got none in ScaledField"),
    ],
)  # fmt: skip
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()
