"""A network's modes are its own again after it was looked at; its device and dtype are those of its weights."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import odenets
from odenets.modes import (
    device_of,
    dtype_of,
    evaluating,
    inputs_for,
    keeping_modes,
    keeping_state,
    set_random_state,
    total_dtype,
)
from tests.odenets.checks import unchanged


def test_each_modules_own_mode_is_restored_also_after_an_exception():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval())
    with unchanged(network), evaluating(network):
        assert not any(module.training for module in network.modules())
    with unchanged(network), pytest.raises(KeyError), keeping_modes(network):
        {}[network.train()]


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


@pytest.mark.parametrize("fails", [False, True])
def test_passes_in_training_mode_leave_buffers_and_random_state(fails):
    """Of a module in two places, of buffers that are replaced and of those that are changed in place."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("replaced", torch.zeros(()))
            self.register_buffer("nothing", None)

        def forward(self, x):
            self.replaced = self.replaced + 1
            return x

    norm, counting = nn.BatchNorm1d(2), Counting()
    network = nn.Sequential(norm, nn.Dropout(), counting, norm).eval()
    buffers = dict(network.named_buffers())

    def look():
        with keeping_state(network, norm):
            network.train()(torch.randn(8, 2))
            assert counting.replaced == 1
            assert norm.num_batches_tracked == 2
            if fails:
                raise KeyError

    with unchanged(network), pytest.raises(KeyError) if fails else nullcontext():
        look()
    assert all(value is buffers[name] for name, value in network.named_buffers())


def test_the_random_state_of_more_devices_than_there_are_is_that_of_the_first(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", taken.append)
    with pytest.warns(UserWarning, match="is of 2 CUDA devices, and there are 1: that of the first 1"):
        set_random_state({"rng": torch.get_rng_state(), "cuda_rng": ["first", "second"]})
    assert taken == [["first"]]


def test_a_graph_from_before_is_not_disturbed():
    norm, x = nn.BatchNorm1d(2).eval(), torch.randn(4, 2, requires_grad=True)
    loss = norm(x).square().sum()
    with keeping_state(norm):
        norm.train()(x)
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_follow_a_network_in_its_real_precision(dtype):
    network = nn.Linear(2, 2).to(dtype)
    assert inputs_for(network, torch.ones(3, 2)).dtype == dtype
    assert inputs_for(network, torch.ones(3, 2, dtype=torch.long)).dtype == torch.long
    assert inputs_for(nn.Linear(2, 2, dtype=torch.complex64), torch.ones(3, 2, dtype=dtype)).dtype == torch.float32
    assert inputs_for(nn.Flatten(), torch.ones(3, 2, dtype=dtype)).dtype == dtype


def test_totals_are_in_float64_where_there_is_one(monkeypatch):
    assert total_dtype("cpu") == torch.float64
    zeros = torch.zeros

    def without(*size, dtype=None, **options):
        if dtype == torch.float64:
            raise TypeError("the device does not support float64")
        return zeros(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", without)
    assert total_dtype("cpu") == torch.float32
