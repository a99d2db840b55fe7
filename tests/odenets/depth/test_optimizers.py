from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField, Network, load_weights, save_weights
from odenets.depth import DepthRule, adapt_depth
from tests.odenets.depth.networks import X, check_alignment, network, train


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
def test_optimizer_state_follows_the_blocks(make):
    net = network(depth=2, gain=10.0)
    optimizer = make(net.parameters(), lr=0.01)
    train(net, optimizer)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert net.depth == 4
    check_alignment(net, optimizer)
    for a, b in zip(net.flows[0].blocks[0].parameters(), net.flows[0].blocks[1].parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[b][key]))
            assert not isinstance(value, torch.Tensor) or value is not optimizer.state[b][key]
    train(net, optimizer)
    assert not torch.equal(net.flows[0].blocks[0].fields[0].first.weight, net.flows[0].blocks[1].fields[0].first.weight)


def test_a_weight_that_another_block_shares_trains_on_when_its_block_goes():
    field = MLPField(3)
    fields = iter([MLPField(3), field, field, MLPField(3)])
    net = Network(nn.Identity(), Flow(lambda: next(fields), depth=4), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, optimizer)
    adapt_depth(net, lambda: [X], DepthRule(1e3), optimizer)
    assert net.flows[0].h == (0.5, 0.5)
    check_alignment(net, optimizer)
    assert all(p in optimizer.state for p in field.parameters())


def test_a_layer_that_fields_share_stays_one(tmp_path):
    """With the other blocks and with the head, after duplicating, a step and loading."""

    class Sharing(nn.Module):
        def __init__(self, layer, weight):
            super().__init__()
            self.layer, self.weight, self.bias = layer, weight, nn.Parameter(torch.zeros(3))

        def forward(self, t, x):
            return F.linear(torch.tanh(self.layer(x)), self.weight, self.bias)

    def make():
        layer, head = nn.Linear(3, 3), nn.Linear(3, 3)
        return Network(nn.Identity(), Flow(lambda: Sharing(layer, head.weight), depth=2), head)

    net, other = make(), make()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, optimizer)
    adapt_depth(net, lambda: [X], DepthRule(1e-12), optimizer)
    train(net, optimizer)
    check_alignment(net, optimizer)
    with pytest.warns(UserWarning, match="depth=2, h=0.5, and gets depth=4, h=0.25"):
        load_weights(other, save_weights(net, tmp_path / "net.safetensors"))
    for one in (net, other):
        fields = [block.fields[0] for block in one.flows[0].blocks]
        assert len(fields) == 4
        assert all(field.layer is fields[0].layer and field.weight is one.head.weight for field in fields)
        assert len({field.bias for field in fields}) == 4
    torch.testing.assert_close(net(X), other(X), rtol=0, atol=0)


def test_an_optimizer_s_other_parameters_and_its_own_list_stay():
    net, other = network(depth=2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *other.parameters()], 0.01)
    (group,) = optimizer.param_groups
    listed = group["params"]
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert group["params"] is listed
    assert {id(p) for p in listed} == {id(p) for p in (*net.parameters(), *other.parameters())}


def test_names_of_parameters_follow_the_blocks():
    net = network(depth=2, gain=10.0)
    other = ("temperature", nn.Parameter(torch.ones(())))
    optimizer = torch.optim.SGD([*net.named_parameters(), other], 0.01, momentum=0.9)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    (group,) = optimizer.param_groups
    assert net.depth == 4
    assert list(zip(group["param_names"], group["params"], strict=True)) == [other, *net.named_parameters()]


def test_unused_optimizer_parameters_and_frozen_ones():
    net = network(depth=1, gain=20.0)
    net.flows[0].blocks[0].fields[0].first.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2 * 3 + 2


def test_an_optimizer_whose_state_is_not_of_one_parameter_is_refused():
    net = network()
    with pytest.raises(ValueError, match="LBFGS"):
        adapt_depth(net, lambda: [X], DepthRule(1e-9), torch.optim.LBFGS(net.parameters()))
    assert net.depth == 3


def test_an_optimizer_that_is_not_given_is_missed():
    net = network(depth=1, gain=10.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning,
        match=r"4 parameters of new blocks are in no optimizer.*adapt_depth\(network, inputs, rule, optimizer",
    ):
        adapt_depth(net, lambda: [X], DepthRule(1e-9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    adapt_depth(net, lambda: [X], DepthRule(1e9))  # parameters that go need no optimizer
    assert len(optimizer.param_groups[0]["params"]) > len([*net.parameters()])
