"""Coverage of neurons, against the formulas written out."""

from typing import Any

import numpy as np
import pytest
import torch
from ood_coverage import Coverage, neuron_states

from lab.pretrained.resnets import ResNet


def model():
    network = ResNet(1, (2, 4, 6), channels=1, normalize=([0.5], [0.5]), classes=3).double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.get_buffer("running_mean"), -1, 1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return network.eval()


def divergence(logits):
    """Of the uniform distribution from the predicted one."""
    uniform = torch.full_like(logits, 1 / logits.shape[1])
    return (uniform * (uniform.log() - logits.log_softmax(1))).sum(1)


def test_products_of_the_last_stage_are_those_of_the_head():
    network, x = model(), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    logits, means, products = neuron_states(network, x)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(x))
        torch.testing.assert_close(network.linear(means[-1]), logits)
        expected = means[-1] * ((logits.softmax(1) - 1 / 3) @ network.linear.weight)
    torch.testing.assert_close(products[-1], expected)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_derivatives_are_those_of_a_shift_of_a_channel(stage):
    network, x, h = model(), torch.rand(2, 1, 8, 8, dtype=torch.float64), 1e-6
    _, means, products = neuron_states(network, x)
    module = network.get_submodule(network.stages[stage])
    for channel in range(means[stage].shape[1]):

        def shifted(by, channel=channel):
            shift = torch.zeros(means[stage].shape[1], 1, 1, dtype=torch.float64)
            shift[channel] = by
            add: Any = lambda module, args, out: out + shift  # noqa: E731
            hook = module.register_forward_hook(add)
            with torch.no_grad():
                value = divergence(network(x))
            hook.remove()
            return value

        expected = means[stage][:, channel] * (shifted(h) - shifted(-h)) / (2 * h)
        torch.testing.assert_close(products[stage][:, channel], expected, rtol=1e-5, atol=1e-8)


def test_reading_leaves_the_network_as_it_was():
    network = model().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = neuron_states(network, torch.rand(2, 1, 8, 8, dtype=torch.float64))
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(t.requires_grad for t in (outputs[0], *outputs[1], *outputs[2]))


def test_the_score_is_that_of_the_paper():
    draw = np.random.default_rng(0)
    fitted, others = ([draw.normal(0, size, (n, c)) for size, c in ((1, 3), (5, 2))] for n in (40, 7))
    alpha, intervals, least = 2.0, 10, 4
    expected = np.zeros(7)
    for image in range(7):
        for layer, other in zip(fitted, others, strict=True):
            steepness = alpha / np.sqrt((layer**2).mean())
            for neuron in range(layer.shape[1]):
                state = 1 / (1 + np.exp(-steepness * other[image, neuron]))
                k = np.floor(state * intervals)
                states = 1 / (1 + np.exp(-steepness * layer[:, neuron]))
                count = sum(k / intervals <= each < (k + 1) / intervals for each in states)
                expected[image] -= min(count / least, 1) / layer.shape[1] / 2
    np.testing.assert_allclose(Coverage(fitted, alpha, intervals, least)(others), expected)
    assert -1 <= expected.min() < expected.max() < 0


def test_states_at_the_bounds_are_in_the_outer_intervals():
    products = [np.array([[-1e9], [1e9]])]
    np.testing.assert_allclose(Coverage(products, 1e3, 10, 1)(products), [-1, -1])
    dead = [np.zeros((5, 2))]  # neurons that nothing moves
    np.testing.assert_allclose(Coverage(dead, 1, 10, 5)(dead), -1)
