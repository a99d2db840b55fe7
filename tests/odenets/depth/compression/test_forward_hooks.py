"""Forward hooks of a network that is compressed: those that look, and those that change what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from odenets.depth import compress
from tests.odenets.depth.compression.networks import Half, images

CHOICES = ["remove", "fit", "merge"]


def test_hooks_that_look_see_the_first_batch_and_stay_with_their_modules():
    network, x, seen = images(), torch.rand(60, 1, 8, 8), []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.append((name, len(inputs[0]))))
        module.register_forward_pre_hook(lambda *_, **__: seen.append(("", 0)), with_kwargs=True)
    small = compress(network, [*x.split(30)], remove=2, choices=CHOICES)
    assert sum(name == "1" for name, _ in seen) <= 2  # of the copy, and of the network to which it is compared
    plain = compress(images(), [*x.split(30)], remove=2, choices=CHOICES)
    assert small.divergence == plain.divergence
    seen.clear()
    small.model(x[:3])
    assert {name for name, _ in seen} >= {"", "0", "8"}
    assert sum(name.endswith("conv1") for name, _ in seen) == 3


def test_hooks_that_change_what_is_computed_are_part_of_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(*(Half(torch.eye(5) + 0.1 * torch.randn(5, 5)) for _ in range(4)), nn.Linear(5, 3))
    network[1].register_forward_hook(lambda _, inputs, output: inputs[0] + 2 * (output - inputs[0]))
    network[4].register_forward_pre_hook(lambda _, inputs: (inputs[0] / 3,))
    x = torch.randn(80, 5)
    small = compress(network, [x], remove=2)
    assert small.divergence < 1e-5
    torch.testing.assert_close(small.model(x), network(x), rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_norms_of_weights_by_hooks_go_on_with_the_layers_that_stay():
    torch.manual_seed(0)
    network = nn.Sequential(*(Half(torch.eye(5) + 0.1 * torch.randn(5, 5)) for _ in range(4)), nn.Linear(5, 3))
    network[4] = nn.utils.weight_norm(network[4])
    with torch.no_grad():
        network(torch.randn(1, 5))  # torch copies no weights with gradients
    small = compress(network, [torch.randn(80, 5)], remove=1)
    x, before = torch.randn(3, 5), small.model(torch.ones(1, 5))
    with torch.no_grad():
        small.model.get_submodule("4").weight_g.mul_(2)
    assert not torch.equal(small.model(torch.ones(1, 5)), before)
    assert small.model(x).shape == (3, 3)
