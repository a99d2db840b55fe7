"""Healing: loaders that go by once, and networks and data in each other's places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from odenets.depth import compress, heal
from tests.odenets.depth.compression.networks import images


def test_the_batches_of_a_generator_are_gone_through_as_often_as_needed():
    teacher, model, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(40, 3)
    twin = copy.deepcopy(model)
    heal(model, teacher, (part for part in x.split(20)), images=400, lr=0.03)
    heal(twin, teacher, x.split(20), images=400, lr=0.03)
    assert torch.equal(model.weight, twin.weight)


def test_of_a_generator_without_end_no_more_is_read_than_is_seen():
    x, read = torch.randn(20, 3), []

    def batches():
        while True:
            read.append(x)
            yield x

    heal(nn.Linear(3, 2), nn.Linear(3, 2), batches(), images=50, lr=0.03)
    assert len(read) == 3


def test_what_is_in_the_wrong_place_is_refused_and_changes_nothing():
    network, x, y = images(), torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.long)
    small = compress(network, [x], remove=1).model
    before = copy.deepcopy(small.state_dict()), copy.deepcopy(network.state_dict())
    for arguments, message in (
        ((network, small, [x]), "teacher must be the whole network, got one of .* weights"),
        ((small, network, x), "loader must hold batches of inputs, got one tensor"),
        ((small, network, [y]), r"loader must hold .* inputs that Sequential takes, .* got one tensor \(20,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            heal(*arguments, images=40)
    for one, state in zip((small, network), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_after_outputs_that_are_not_finite_the_weights_are_those_before():
    torch.manual_seed(0)
    teacher, model, x = nn.Linear(3, 2), nn.Linear(3, 2), 1e10 * torch.randn(20, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="outputs are not finite after 20 images: a smaller lr than"):
        heal(model, teacher, [x], images=400, lr=1e30)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
