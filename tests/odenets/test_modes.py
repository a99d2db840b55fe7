"""A network's modes are its own again after it was looked at; its device and dtype are those of its weights."""

import pytest
import torch
from torch import nn

import odenets
from odenets.modes import device_of, dtype_of, evaluating, keeping_modes


def frozen_part():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval())
    return network, [module.training for module in network.modules()]


def test_evaluating_restores_each_modules_own_mode():
    network, modes = frozen_part()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes


def test_modes_are_restored_after_an_exception():
    network, modes = frozen_part()

    def fail():
        with keeping_modes(network):
            network.train()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
def test_what_is_made_meanwhile_has_the_mode_of_its_holder(training):
    network = odenets.Flow(depth=2).train(training)
    with evaluating(network):
        network(torch.randn(3, 2))
    assert all(module.training == training for module in network.modules())


def test_device_and_dtype_are_those_of_the_first_weight():
    network = nn.Sequential(nn.Linear(2, 2).to("meta", torch.float64), nn.Linear(2, 2))
    assert device_of(network) == torch.device("meta")
    assert dtype_of(network) == torch.float64


def test_without_weights_the_default_is_taken():
    lazy = odenets.Flow(depth=2)  # has no field yet
    assert device_of(lazy, "meta") == torch.device("meta")
    assert dtype_of(lazy) == torch.float32
    assert dtype_of(nn.Identity(), torch.float64) == torch.float64


def test_whole_numbers_decide_no_dtype():
    network = nn.Module()
    network.register_buffer("steps", torch.tensor(3))
    network.register_buffer("mean", torch.zeros(2, dtype=torch.bfloat16))
    assert dtype_of(network) == torch.bfloat16
