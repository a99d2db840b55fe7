import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odenets import ConvField, Flow, MLPField, Network
from odenets.checkpoints import load_weights, save_weights
from odenets.depth import AdaptiveDepth, DepthRule, adapt_depth, block_errors, refine
from tests.odenets.depth.networks import X, check_alignment, network, train


def test_growing_and_shrinking():
    net = network(depth=1, gain=20.0)
    edits = adapt_depth(net, lambda: [X], DepthRule(1e-6)).edits
    assert [edit.kind for edit in edits] == ["duplicate"]
    assert net.flows[0].h == (0.5, 0.5)
    first, second = net.flows[0].blocks
    assert all(torch.equal(a, b) and a is not b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert "flow 0 block 0: duplicated, error" in str(edits[0])
    net = network(depth=8, gain=0.1)
    while adapt_depth(net, lambda: [X], DepthRule(0.1)).edits:
        pass
    assert net.flows[0].h == (1.0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_taken_to_the_dtype_of_the_network(dtype):
    net = network().to(dtype)
    assert block_errors(net, [X]) == block_errors(net, [X.to(dtype)])
    assert [e.kind for e in adapt_depth(net, lambda: [X], DepthRule(1e-9, max_depth=4)).edits] == ["duplicate"]


def test_a_non_finite_error_counts_as_too_large():
    net = network(depth=1, flows=2)
    net.flows[0].blocks[0].fields[0].second.bias.data.fill_(1e38)
    assert block_errors(net, [X])[0] == [math.inf]
    assert adapt_depth(net, lambda: [X], DepthRule(1.0)).edits[0].kind == "duplicate"


def test_a_merge_that_breaks_the_tolerance_is_taken_back():
    """Two blocks of opposite velocity: small errors apart, a large one when the first takes the time of both."""

    class Stiff(MLPField):
        def forward(self, t, x, stage=0):
            return 3 * torch.sin(4 * x)

    net = Network(nn.Identity(), Flow(lambda: Stiff(3), depth=2, h=[0.05, 0.95]), nn.Linear(3, 2))
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    small, large = block_errors(net, [x])[0]
    rule = DepthRule(large * 1.01, K=large / small / 2)
    optimizer = torch.optim.SGD(net.named_parameters(), 0.1, momentum=0.9)
    blocks = list(net.flows[0].blocks)
    edits = adapt_depth(net, lambda: [x], rule, optimizer).edits
    assert [edit.kind for edit in edits] == ["merge", "undo"]
    assert list(net.flows[0].blocks) == blocks
    assert net.flows[0].h == (0.05, 0.95)


@pytest.mark.parametrize("part", ["_flows.0.blocks.1.fields.0.second.weight", "head.bias"])
def test_weights_that_are_not_finite_are_not_duplicated(part):
    net = network()
    dict(net.named_parameters())[part].data.view(-1)[0] = math.nan
    for edit in (lambda: adapt_depth(net, lambda: [X], DepthRule(1.0)), lambda: refine(net, DepthRule(1.0))):
        with pytest.raises(ValueError, match=f"weights that are not finite, which no step size mends: {part};"):
            edit()
    net.register_buffer("scale", torch.tensor(math.inf))
    with pytest.raises(ValueError, match="scale"):
        refine(net, DepthRule(1.0))
    assert net.depth == 3


def test_measuring_and_editing_leave_each_module_its_mode_and_the_random_state_also_after_an_error():
    net = network(flows=2).train()
    net.head.eval()
    net.flows[1].eval()
    modes, state = {module: module.training for module in net.modules()}, torch.get_rng_state()
    block_errors(net, [X])
    with pytest.raises(RuntimeError, match="dtype"):
        block_errors(net, [X, X.long()])
    assert {module: module.training for module in net.modules()} == modes
    edits = adapt_depth(net, lambda: [X], DepthRule(1e9, K=1 + 1e-9)).edits
    assert [edit.kind for edit in edits] == ["merge", "merge"]
    assert all(module.training == modes.get(module, net.flows[0].training) for module in net.flows[0].modules())
    assert not any(module.training for module in net.flows[1].modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_after_an_error_nothing_is_edited():
    net = network(depth=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, optimizer)
    blocks, params, state = list(net.flows[0].blocks), list(net.parameters()), copy.copy(optimizer.state)
    errors = block_errors(net, [X])[0]
    rule = DepthRule(sorted(errors)[-1] * 0.999, K=1.0001)  # one block is duplicated, others merged
    batches = iter([[X], []])
    with pytest.raises(ValueError, match="inputs must hold at least one batch, got none"):
        adapt_depth(net, lambda: next(batches), rule, optimizer)
    assert list(net.flows[0].blocks) == blocks
    assert net.flows[0].h == (0.25,) * 4
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]
    assert set(optimizer.state) == set(state)


def test_batch_norm_follows_and_is_recalibrated():
    x = 2 + torch.randn(16, 4, 6, 6)
    net = Network(nn.Identity(), Flow(lambda: ConvField(4, norm="batch")), nn.Flatten())
    net(x)
    adapt_depth(net, lambda: [x], DepthRule(1e-9))
    first, second = (block.fields[0].norm1 for block in net.flows[0].blocks)
    torch.testing.assert_close(first.running_mean[0], x.mean((0, 2, 3)))
    assert not torch.equal(first.running_mean, second.running_mean)


@settings(max_examples=25, deadline=None)
@given(
    tolerances=st.lists(st.sampled_from([1e-12, 1e-4, 1e-3, 1e-2, 1.0]), min_size=1, max_size=5),
    flows=st.integers(1, 2),
    stage_fields=st.sampled_from(["tied", "chained", "untied"]),
)
def test_any_edits_keep_time_depth_and_state_and_round_trip(tmp_path_factory, tolerances, flows, stage_fields):
    torch.manual_seed(0)
    net = network(depth=2, flows=flows, stage_fields=stage_fields)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for tolerance in tolerances:
        train(net, optimizer, 1)
        adapt_depth(net, lambda: [X], DepthRule(tolerance, max_depth=6), optimizer)
        for flow in net.flows:
            assert flow.total_time == pytest.approx(1.0, abs=1e-12)
            assert 1 <= flow.depth <= 6
        check_alignment(net, optimizer)
    path = save_weights(net, tmp_path_factory.mktemp("weights") / "net.safetensors")
    with warnings.catch_warnings(action="ignore"):  # of another depth
        again = load_weights(network(depth=2, flows=flows, stage_fields=stage_fields), path)
    assert [flow.h for flow in again.flows] == [flow.h for flow in net.flows]
    assert torch.equal(again(X), net(X))


def twice():
    flow = Flow(lambda: MLPField(3), depth=2)
    return Network(nn.Identity(), [flow, flow], nn.Linear(3, 2), transitions=[nn.Identity()])


def of_one_flow(field, **options):
    return Network(nn.Identity(), Flow(field, **options), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "inputs", "error", "message"),
    [
        (twice, lambda: [X], ValueError, "uses a flow or a block twice"),
        (lambda: of_one_flow(MLPField(3), depth=2, shared=True), lambda: [X], ValueError, "flow 0 has one field for"),
        (lambda: of_one_flow(MLPField(3), solver="euler"), lambda: [X], ValueError, "no embedded error"),
        (lambda: nn.Linear(3, 3), lambda: [X], TypeError, "got Linear"),
        (network, [X], TypeError, "inputs must be a function .* got list"),
        (network, lambda: X, TypeError, r"inputs must hold .* one tensor .*: a DataLoader, or \[x\]"),
        (network, lambda: [(X, X, X)], TypeError, r"inputs must hold .* pairs \(inputs, labels\), got a tuple of 3"),
    ],
)
def test_what_cannot_be_edited_is_named(make, inputs, error, message):
    with pytest.raises(error, match=message):
        adapt_depth(make(), inputs, DepthRule(1.0))


@pytest.mark.parametrize(
    "use",
    [adapt_depth, lambda net, inputs, rule: refine(net, rule), lambda net, inputs, rule: AdaptiveDepth(rule, inputs)],
)
def test_a_tolerance_alone_is_no_rule(use):
    with pytest.raises(TypeError, match=r"rule must be a DepthRule, .* got 0.1"):
        use(network(), lambda: [X], 0.1)
