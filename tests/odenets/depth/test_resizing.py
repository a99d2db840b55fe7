import copy

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, Network
from odenets.depth import DepthRule, adapt_depth, resize_as
from tests.odenets.depth.networks import X, network


def test_a_network_takes_the_state_of_an_edited_one():
    edited = network(depth=1, gain=10.0)
    fresh = copy.deepcopy(edited)
    adapt_depth(edited, lambda: [X], DepthRule(1e-9))
    state = edited.state_dict()
    with pytest.raises(
        ValueError, match=r"holds 2 blocks and this flow has 1: call odenets.depth.resize_as\(network, st"
    ):
        fresh.load_state_dict(state)
    resize_as(fresh, state).load_state_dict(state)
    assert torch.equal(fresh(X), edited(X))


def test_a_state_of_another_network_is_refused():
    net = Network(nn.Linear(2, 3), Flow(MLPField(3), depth=2), nn.Linear(3, 2))
    with pytest.raises(KeyError, match=r"no step sizes '_flows.0._extra_state' of the flow '_flows.0', but .'0._extra"):
        resize_as(net, nn.Sequential(Flow(MLPField(3))).state_dict())
    with pytest.raises(ValueError, match="has no field yet"):
        resize_as(Flow(), Flow(MLPField(2), depth=2).state_dict())
