"""What reads inputs takes the loader of a training, and does not read its labels."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import odenets
from odenets.depth import (
    DepthRule,
    Doubling,
    EarlyExit,
    SampleSteps,
    adapt_depth,
    block_errors,
    fit_heads,
    pooled_head,
    without_flow,
)
from odenets.module_wise import split_into_modules
from odenets.training import fit
from tests.odenets.module_wise import conditioned

X, Y = torch.rand(12, 1, 6, 6), torch.arange(12) % 3


def network():
    torch.manual_seed(0)
    flow = odenets.Flow(lambda: odenets.ConvField(4, norm="batch"), solver="heun", depth=3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    whole = odenets.Network(nn.Conv2d(1, 4, 3, padding=1), flow, head)
    odenets.recalibrate(whole, [X])
    return whole.eval()


def modules():
    torch.manual_seed(1)
    return split_into_modules(network(), 2, X[:2], head=pooled_head)


def recalibrated(batches):
    whole = network()
    odenets.recalibrate(whole, batches)
    return whole.state_dict()


def adapted(batches):
    whole = network()
    adapt_depth(whole, lambda: batches, DepthRule(1e-9))
    return whole.state_dict()


def grown(batches):
    whole = network()
    callback = Doubling([1], recalibration=lambda: batches)
    fit(whole, [(X, Y)], epochs=2, optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3), callbacks=[callback])
    return whole.state_dict()


@pytest.mark.parametrize(
    "call",
    [
        lambda batches: network().at_depth(2, inputs=batches).state_dict(),
        lambda batches: network().at_depth(2, inputs=lambda: batches, rule="output").state_dict(),
        lambda batches: network().at_depth(2, inputs=[X], recalibration=batches).state_dict(),
        lambda batches: without_flow(network(), batches).state_dict(),
        lambda batches: block_errors(network(), batches),
        recalibrated,
        adapted,
        grown,
        lambda batches: SampleSteps(network(), 0.0).calibrate(batches, 5, rounds=3),
        lambda batches: EarlyExit(modules()).calibrate(batches, 2.0),
    ],
)
def test_labels_beside_inputs_are_not_read(call):
    plain, pairs = call([X[:6], X[6:]]), call(DataLoader(TensorDataset(X, Y), 6))
    torch.testing.assert_close(plain, pairs, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["error", "difference", "output"])
def test_what_fields_take_besides_comes_in_a_pair(rule):
    whole, batch = conditioned.network(), ((conditioned.X, conditioned.C), conditioned.Y)
    coarse = whole.at_depth(2, inputs=[batch], rule=rule)
    assert coarse.depth == 2
    assert coarse(*batch[0]).shape == whole(*batch[0]).shape
    assert without_flow(whole, [batch])(conditioned.X).shape == (22, 1)
    assert SampleSteps(whole, 0.0).calibrate([batch], 3) > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda batches: network().at_depth(2, inputs=batches),
        lambda batches: SampleSteps(network(), 0.0).calibrate(batches, 5),
        lambda batches: EarlyExit(modules()).calibrate(batches, 2.0),
        lambda batches: odenets.recalibrate(network(), batches),
    ],
)
def test_inputs_and_labels_exchanged_are_named(call):
    with pytest.raises(TypeError, match=r"pairs \(inputs, labels\), got one tensor \(12,\) of torch.int64 before"):
        call([(Y, X)])
    with pytest.raises(TypeError, match=r"got one pair of inputs and labels: pass \[\(x, y\)\]"):
        call((X, Y))


def test_an_error_of_the_network_names_the_batch():
    parts = modules()
    for call in (EarlyExit(parts).calibrate, lambda batches, cost: fit_heads(parts, batches)):
        with pytest.raises(RuntimeError) as caught:
            call([(X, Y), (Y, Y)], 2.0)
        assert "in batch 2 of batches, of 12 samples" in caught.value.__notes__[0]
