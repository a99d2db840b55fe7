import math
from types import SimpleNamespace

import pytest
from torch import nn

from odenets import adapt
from odenets.depth import AdaptiveDepth, DepthRule
from tests.odenets.depth.networks import X, network


def test_after_divergence_blocks_are_duplicated_unless_weights_are_not_finite():
    net = network()
    training = SimpleNamespace(network=net, optimizer=None, epoch=0)
    callback = AdaptiveDepth(DepthRule(1.0), lambda: [X])
    assert callback.on_divergence(training)
    assert net.depth == 6
    net.head.bias.data[0] = math.nan
    assert not callback.on_divergence(training)
    assert net.depth == 6


def test_a_network_without_flows_is_refused():
    training = SimpleNamespace(
        network=adapt(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), displacement=True)
    )
    with pytest.raises(TypeError, match="whose flows can be edited"):
        AdaptiveDepth(DepthRule(1.0), lambda: [X]).after_epoch(training, {})


def test_checks_are_a_whole_number_of_epochs_apart():
    with pytest.raises(TypeError, match=r"every must be a whole number, got 2.5"):
        AdaptiveDepth(DepthRule(1.0), lambda: [X], every=2.5)


def test_inputs_are_made_by_a_function():
    with pytest.raises(TypeError, match=r"inputs must be a function that makes inputs .* got list"):
        AdaptiveDepth(DepthRule(1.0), [X])
