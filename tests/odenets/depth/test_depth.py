import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odenets import ConvField, Flow, MLPField, Network, adapt, recalibrate
from odenets.checkpoints import load_weights, save_weights
from odenets.depth import AdaptiveDepth, DepthRule, adapt_depth, block_errors, plan, refine
from odenets.training import data
from odenets.training.loop import fit
from solvers import Tolerance

X = torch.randn(32, 3)


def network(depth=3, *, flows=1, stage_fields="tied", gain=1.0):
    made = []
    for _ in range(flows):
        flow = Flow(lambda: MLPField(3), depth=depth, stage_fields=stage_fields)
        for block in flow.blocks:
            for field in block.fields:
                field.second.weight.data.mul_(gain)
        made.append(flow)
    return Network(nn.Identity(), made, nn.Linear(3, 2), transitions=[nn.Linear(3, 3)] * (flows - 1))


def train(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()


def test_plan_follows_the_rule():
    rule = DepthRule(1.0, K=8)
    h = [0.25] * 4
    assert plan([2.0, 0.5, 0.1, 0.5], h, rule) == ["duplicate", "keep", "merge", "keep"]
    assert plan([0.1, 0.1, 0.1, 0.1], h, rule) == ["merge", "keep", "merge", "keep"]
    assert plan([0.1, 2.0, 0.1, 0.1], h, rule) == ["keep", "duplicate", "merge", "keep"]
    assert plan([0.5, 0.5, 0.5, 0.01], h, rule) == ["keep"] * 4, "the last block has nothing to absorb"
    assert plan([math.inf, math.nan, 0.5, 0.5], h, rule)[:2] == ["duplicate", "duplicate"]
    assert plan([2.0] * 4, h, DepthRule(1.0, max_depth=5)) == ["duplicate", "keep", "keep", "keep"]
    assert plan([2.0] * 4, h, DepthRule(1.0, min_h=0.2)) == ["keep"] * 4
    assert plan([0.01], [1.0], rule) == ["keep"], "a flow keeps at least one block"


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
    with pytest.raises(ValueError, match="at least one batch"):
        block_errors(net, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_taken_to_the_dtype_of_the_network(dtype):
    net = network().to(dtype)
    assert block_errors(net, [X]) == block_errors(net, [X.to(dtype)])
    adapted = adapt_depth(net, lambda: [X], DepthRule(1e-9, max_depth=4))
    assert [edit.kind for edit in adapted.edits] == ["duplicate"]


def test_a_non_finite_error_counts_as_too_large():
    net = network(depth=1, flows=2)
    net.flows[0].blocks[0].fields[0].second.bias.data.fill_(1e38)
    assert block_errors(net, [X])[0] == [math.inf]
    edits = adapt_depth(net, lambda: [X], DepthRule(1.0)).edits
    assert edits[0].kind == "duplicate"


@pytest.mark.parametrize("part", ["_flows.0.blocks.1.fields.0.second.weight", "head.bias"])
def test_weights_that_are_not_finite_are_not_duplicated(part):
    net = network()
    dict(net.named_parameters())[part].data.view(-1)[0] = math.nan
    for edit in (lambda: adapt_depth(net, lambda: [X], DepthRule(1.0)), lambda: refine(net, DepthRule(1.0))):
        with pytest.raises(ValueError, match=f"weights that are not finite, which no step size mends: {part};"):
            edit()
    assert net.depth == 3
    net.register_buffer("scale", torch.tensor(math.inf))
    with pytest.raises(ValueError, match="scale"):
        refine(net, DepthRule(1.0))
    training = SimpleNamespace(network=net, optimizer=None, epoch=0)
    assert not AdaptiveDepth(DepthRule(1.0), lambda: [X]).on_divergence(training)
    assert net.depth == 3


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
    with pytest.raises(ValueError, match="must make at least one batch of inputs at each call"):
        adapt_depth(net, lambda: next(batches), rule, optimizer)
    assert list(net.flows[0].blocks) == blocks
    assert net.flows[0].h == (0.25,) * 4
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]
    assert set(optimizer.state) == set(state)


def test_a_weight_that_another_block_shares_trains_on_when_its_block_goes():
    field = MLPField(3)
    fields = iter([MLPField(3), field, field, MLPField(3)])
    net = Network(nn.Identity(), Flow(lambda: next(fields), depth=4), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    train(net, optimizer)
    adapt_depth(net, lambda: [X], DepthRule(1e3), optimizer)
    assert net.flows[0].h == (0.5, 0.5)
    check_alignment(net, optimizer)
    assert all(p in optimizer.state for p in field.parameters())


def test_an_optimizer_s_other_parameters_and_its_own_list_stay():
    net, other = network(depth=2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *other.parameters()], 0.01)
    (group,) = optimizer.param_groups
    held = group["params"]
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert group["params"] is held
    assert {id(p) for p in held} == {id(p) for p in (*net.parameters(), *other.parameters())}


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
    assert net.flows[0].total_time == pytest.approx(1.0)


def test_what_a_merge_frees_is_not_given_away_in_the_same_round():
    """The merge may be taken back, and then the flow would be deeper than it may be."""
    assert plan([0.01, 0.5, 2.0], [0.3] * 3, DepthRule(1.0, K=8, max_depth=3)) == ["merge", "keep", "keep"]


def test_names_of_parameters_follow_the_blocks():
    net = network(depth=2, gain=10.0)
    optimizer = torch.optim.SGD(net.named_parameters(), 0.01, momentum=0.9)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    (group,) = optimizer.param_groups
    assert net.depth == 4
    assert list(zip(group["param_names"], group["params"], strict=True)) == list(net.named_parameters())


def test_one_tensor_is_no_collection_of_batches():
    net = network()
    with pytest.raises(TypeError, match=r"batches must hold inputs.*got one tensor: pass \[x\]"):
        block_errors(net, torch.rand(4, 1, 8, 8))


def test_errors_are_not_measured_on_statistics_that_were_never_taken():
    net = Network(nn.Identity(), Flow(lambda: ConvField(4, norm="batch"), solver="bs23", depth=2), nn.Flatten())
    x = torch.rand(8, 4, 5, 5)
    net.train()(x)
    with pytest.raises(ValueError, match=r"no statistics of stage 4 of 4.*recalibrate"):
        block_errors(net, [x])
    recalibrate(net, [x])
    assert all(math.isfinite(e) for e in block_errors(net, [x])[0])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimizer_state_follows_the_blocks(kind):
    net = network(depth=2, gain=10.0)
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}[kind]
    optimizer = make(net.parameters())
    train(net, optimizer)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert net.depth == 4
    check_alignment(net, optimizer)
    for a, b in zip(net.flows[0].blocks[0].parameters(), net.flows[0].blocks[1].parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[b][key]))
            assert not isinstance(value, torch.Tensor) or value is not optimizer.state[b][key]
    train(net, optimizer)
    assert not torch.equal(net.flows[0].blocks[0].fields[0].first.weight, net.flows[0].blocks[1].fields[0].first.weight)


def check_alignment(net, optimizer):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in net.parameters()]
    assert set(optimizer.state) <= set(held)
    for p, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == p.shape


@settings(max_examples=25, deadline=None)
@given(
    tolerances=st.lists(st.sampled_from([1e-12, 1e-4, 1e-3, 1e-2, 1.0]), min_size=1, max_size=5),
    flows=st.integers(1, 2),
    stages=st.sampled_from(["tied", "chained", "untied"]),
)
def test_any_sequence_of_edits_keeps_time_depth_state_and_round_trips(tmp_path_factory, tolerances, flows, stages):
    torch.manual_seed(0)
    net = network(depth=2, flows=flows, stage_fields=stages)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for tolerance in tolerances:
        train(net, optimizer, 1)
        adapt_depth(net, lambda: [X], DepthRule(tolerance, max_depth=6), optimizer)
        for flow in net.flows:
            assert flow.total_time == pytest.approx(1.0, abs=1e-12)
            assert 1 <= flow.depth <= 6
        check_alignment(net, optimizer)
    path = save_weights(net, tmp_path_factory.mktemp("weights") / "net.safetensors")
    again = load_weights(network(depth=2, flows=flows, stage_fields=stages), path)
    assert [flow.h for flow in again.flows] == [flow.h for flow in net.flows]
    assert torch.equal(again(X), net(X))


def test_batch_norm_follows_and_is_recalibrated():
    x = 2 + torch.randn(16, 4, 6, 6)
    net = Network(nn.Identity(), Flow(lambda: ConvField(4, norm="batch")), nn.Flatten())
    net(x)
    adapt_depth(net, lambda: [x], DepthRule(1e-9))
    first, second = (block.fields[0].norm1 for block in net.flows[0].blocks)
    torch.testing.assert_close(first.running_mean[0], x.mean((0, 2, 3)))
    assert not torch.equal(first.running_mean, second.running_mean)


def test_unused_optimizer_parameters_and_frozen_ones():
    net = network(depth=1, gain=20.0)
    net.flows[0].blocks[0].fields[0].first.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    adapt_depth(net, lambda: [X], DepthRule(1e-9), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2 * 3 + 2


def test_flows_without_a_field_per_block_are_refused():
    shared = Network(nn.Identity(), Flow(MLPField(3), depth=2, shared=True), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="flow 0 has one field for all its steps"):
        adapt_depth(shared, lambda: [X], DepthRule(0.1))
    euler = Network(nn.Identity(), Flow(MLPField(3), solver="euler"), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no embedded error"):
        adapt_depth(euler, lambda: [X], DepthRule(0.1))


def test_what_cannot_be_edited_is_named():
    flow = Flow(lambda: MLPField(3), depth=2)
    twice = Network(nn.Identity(), [flow, flow], nn.Linear(3, 2), transitions=[nn.Identity()])
    continuous = Network(nn.Identity(), Flow(MLPField(3), tolerance=Tolerance(1e-3, 1e-3)), nn.Linear(3, 2))
    for call, error, message in [
        (lambda: adapt_depth(twice, lambda: [X], DepthRule(1.0)), ValueError, "uses a flow or a block twice"),
        (lambda: block_errors(continuous, [X]), ValueError, "flow 0 is continuous"),
        (lambda: block_errors(network(), [X], "l1"), ValueError, "norm must be 'rms' or 'raw', got 'l1'"),
        (lambda: block_errors(nn.Linear(3, 3), [X]), TypeError, "must be an odenets.Network, .* got Linear"),
        (lambda: adapt_depth(nn.Linear(3, 3), lambda: [X], DepthRule(1.0)), TypeError, "got Linear"),
        (lambda: adapt_depth(network(), [X], DepthRule(1.0)), TypeError, "batches must be a function .* got list"),
        (lambda: plan([1.0], [0.5, 0.5], DepthRule(1.0)), ValueError, "a number per block, got 1 and 2"),
    ]:
        with pytest.raises(error, match=message):
            call()
    net = network()
    with pytest.raises(ValueError, match="LBFGS"):
        adapt_depth(net, lambda: [X], DepthRule(1e-9), torch.optim.LBFGS(net.parameters()))
    assert net.depth == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"tolerance": math.nan}, "tolerance must be positive"),
        ({"K": 1.0}, "K must be greater than 1"),
        ({"max_depth": 0}, "max_depth must be at least 1"),
        ({"max_depth": math.nan}, "max_depth must be at least 1"),
        ({"min_h": -1.0}, "min_h must not be negative"),
        ({"norm": "l1"}, "norm must be 'rms' or 'raw'"),
    ],
)
def test_rules_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        DepthRule(**({"tolerance": 0.1} | change))


def test_a_deep_copy_is_independent():
    net = network(depth=2)
    other = copy.deepcopy(net)
    adapt_depth(net, lambda: [X], DepthRule(1e-9))
    assert (net.depth, other.depth) == (4, 2)


def test_a_network_without_flows_is_refused():
    net = adapt(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    batches = data.Batches(data.TensorData("points", torch.rand(8, 3), torch.zeros(8).long(), 2, (0,), (1,)), 4)
    callback = AdaptiveDepth(DepthRule(1.0), batches.inputs)
    with pytest.raises(TypeError, match="whose flows can be edited"):
        fit(net, batches, epochs=1, optimizer=lambda n: torch.optim.SGD(n.parameters(), 0.1), callbacks=[callback])
