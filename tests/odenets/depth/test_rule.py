import copy
import math

import pytest
import torch
from torch import nn

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, recalibrate
from odenets.depth import DepthRule, block_errors, plan
from tests.odenets.depth.networks import X, network

CONTINUOUS = Network(nn.Identity(), NeuralODE(MLPField(3)), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("errors", "options", "decisions"),
    [
        ([2.0, 0.5, 0.1, 0.5], {}, ["duplicate", "keep", "merge", "keep"]),
        ([0.1, 0.1, 0.1, 0.1], {}, ["merge", "keep", "merge", "keep"]),
        ([0.1, 2.0, 0.1, 0.1], {}, ["keep", "duplicate", "merge", "keep"]),
        ([0.5, 0.5, 0.5, 0.01], {}, ["keep"] * 4),  # the last block has nothing to absorb
        ([math.inf, math.nan, 0.5, 0.5], {}, ["duplicate", "duplicate", "keep", "keep"]),
        ([2.0] * 4, {"max_depth": 5}, ["duplicate", "keep", "keep", "keep"]),
        ([2.0] * 4, {"min_h": 0.2}, ["keep"] * 4),
        ([0.01], {}, ["keep"]),  # a flow keeps at least one block
        ([0.01, 0.5, 2.0], {"max_depth": 3}, ["merge", "keep", "keep"]),  # a merge may be taken back and frees nothing
    ],
)
def test_plan_follows_the_rule(errors, options, decisions):
    assert plan(errors, [0.25] * len(errors), DepthRule(1.0, K=8, **options)) == decisions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"tolerance": math.nan}, "tolerance must be positive"),
        ({"K": 1.0}, "K must be greater than 1"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"min_h": -1.0}, "min_h must not be negative"),
        ({"norm": "l1"}, "norm must be 'rms' or 'raw'"),
    ],
)
def test_rules_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        DepthRule(**({"tolerance": 0.1} | change))


def test_errors_of_every_block():
    net = network(flows=2)
    errors = block_errors(net.train(), [X[:20], X[20:]])
    assert [len(e) for e in errors] == [3, 3]
    assert net.training
    step = next(iter(net.eval().steps(X)))
    # an error of 1e-5 is what is left of stages of 1e-1 in float32
    assert errors[0][0] == pytest.approx(step.error().square().mean(1).sqrt().mean().item(), rel=1e-3)
    raw = block_errors(net, [X], norm="raw")
    assert raw[1][2] == pytest.approx(errors[1][2] * math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8), (5, 5)])
def test_raw_errors_are_norms_of_the_states_that_pass(sizes):
    net = Network(nn.Identity(), Flow(lambda: ConvField(2, norm=None), depth=2), nn.Identity()).eval()
    inputs = [torch.randn(4, 2, size, size) for size in sizes]
    expected = [torch.stack([step.error().flatten(1).norm(dim=1) for step in net.steps(x)]).mean(1) for x in inputs]
    raw = block_errors(net, inputs, "raw")[0]
    assert raw == pytest.approx(torch.stack(expected).mean(0).tolist(), rel=1e-3)


@pytest.mark.parametrize(("activation", "low", "high"), [("silu", 7.0, 8.5), ("relu", 5.0, 6.5)])
def test_how_the_error_grows_with_h(activation, low, high):
    """By 8 for smooth fields, and less for those with kinks."""
    field = ConvField(16, activation=activation).double()
    x = torch.randn(8, 16, 8, 8, dtype=torch.float64)
    one, half = (
        block_errors(Network(nn.Identity(), Flow(copy.deepcopy(field), h=h), nn.Identity()), [x])[0][0]
        for h in (0.5, 0.25)
    )
    assert low < one / half < high


def test_errors_are_not_measured_on_statistics_that_were_never_taken():
    net = Network(nn.Identity(), Flow(lambda: ConvField(4, norm="batch"), solver="bs23", depth=2), nn.Flatten())
    x = torch.rand(8, 4, 5, 5)
    net.train()(x)
    with pytest.raises(ValueError, match=r"no statistics of stage 4 of 4.*recalibrate"):
        block_errors(net, [x])
    recalibrate(net, [x])
    assert all(math.isfinite(e) for e in block_errors(net, [x])[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: block_errors(network(), []), ValueError, "at least one batch"),
        (
            lambda: block_errors(network(), X),
            TypeError,
            r"batches must hold batches.*one tensor .*, or \[x\] for one",
        ),
        (lambda: block_errors(CONTINUOUS, [X]), ValueError, "flow 0 is a neural ODE"),
        (lambda: block_errors(network(), [X], "l1"), ValueError, "norm must be 'rms' or 'raw', got 'l1'"),
        (lambda: block_errors(nn.Linear(3, 3), [X]), TypeError, "must be an odenets.Network, .* got Linear"),
        (lambda: plan([1.0], [0.5, 0.5], DepthRule(1.0)), ValueError, "a number per block, got 1 and 2"),
    ],
)
def test_what_cannot_be_measured_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
