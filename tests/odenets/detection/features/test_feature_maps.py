import pytest
import torch
from torchvision.models import resnet18

import odenets
from odenets import models
from odenets.detection.features.feature_maps import feature_map_values, feature_maps_of, pooled
from tests.odenets.detection.victims import refused


def test_one_flow_has_two_feature_maps():
    network, x = models.small_network(solver="bs23", depth=2).eval(), torch.rand(5, 1, 8, 8)
    before, after = feature_maps_of(network, x)
    torch.testing.assert_close((before, network.head(after)), (network.encoder(x), network(x)))


@torch.no_grad()
def test_each_flow_of_another_shape_has_one():
    network, x = models.resnet110(blocks=2).eval(), torch.rand(5, 3, 16, 16)
    expected = [network.encoder(x)]
    for i, flow in enumerate(network.flows):
        entering = network.transitions[i - 1](expected[-1]) if i else expected[-1]
        expected.append(flow(entering))
    assert len(expected) == 4
    torch.testing.assert_close(feature_maps_of(network, x), expected)


@torch.no_grad()
def test_no_more_steps_are_taken_than_are_needed():
    network, x = models.resnet110(blocks=2).eval(), torch.rand(5, 3, 16, 16)
    states, calls = feature_maps_of(network, x), []
    for field in network.modules():
        if isinstance(field, odenets.fields.ConvField):
            field.register_forward_hook(lambda *_: calls.append(1))
    for count, steps in ((1, 1), (2, 3), (3, 5), (4, 6)):
        calls.clear()
        torch.testing.assert_close(feature_maps_of(network, x, count), states[:count], atol=0, rtol=0)
        assert len(calls) == steps


def test_flows_of_one_shape_share_one():
    flows = [odenets.Flow(odenets.fields.MLPField(2, 4), depth=2) for _ in range(2)]
    network = odenets.Network(torch.nn.Identity(), flows, torch.nn.Linear(2, 2), transitions=[torch.nn.Linear(2, 2)])
    assert len(feature_maps_of(network, torch.randn(3, 2))) == 2


def test_flow_alone_begins_at_its_input():
    flow, x = odenets.Flow(depth=3), torch.randn(4, 2)
    torch.testing.assert_close(feature_maps_of(flow, x), [x, flow(x)])


@torch.no_grad()
def test_those_of_torchvision_are_its_layers():
    model, x = resnet18().eval(), torch.rand(2, 3, 32, 32)
    adapted, ends = odenets.adapt(model, x), []
    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: ends.append(output))
    states = feature_maps_of(adapted, x)
    assert len(states) == 5
    torch.testing.assert_close(states, ends)


@pytest.mark.parametrize(
    ("shape", "positions"), [((4, 3), ()), ((4, 5, 3), (1,)), ((4, 3, 5, 6), (2, 3)), ((4, 3, 5, 6, 2), (2, 3, 4))]
)
def test_pooling_is_the_mean_over_positions(shape, positions):
    state = torch.randn(shape)
    assert pooled(state).shape == (4, 3)
    torch.testing.assert_close(pooled(state), state.mean(positions) if positions else state)


def test_values_of_batches_are_those_in_eval_mode():
    network, x = models.resnet110(blocks=1).train(), torch.rand(300, 3, 8, 8)
    maps = feature_map_values(network, x)
    assert network.training
    with torch.no_grad():
        expected = [state.mean((2, 3)) for state in feature_maps_of(network.eval(), x)]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


def test_errors():
    refused(r"got ResNet: pass odenets\.adapt", feature_maps_of, resnet18(), torch.rand(2, 3, 32, 32))
    refused(r"state must be a batch \(B, C, \.\.\.\), got shape \(3,\)", pooled, torch.rand(3))


@torch.no_grad()
def test_means_of_states_in_half_precision_are_in_single():
    state = (1 + torch.rand(3, 4, 6, 6) / 100).bfloat16()
    values = pooled(state)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, state.float().mean((2, 3)))
