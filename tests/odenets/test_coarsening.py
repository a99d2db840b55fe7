"""Flows at another depth, against closed forms."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import odenets
from odenets import Block, ConvField, Flow, MLPField, Network, NeuralODE
from odenets.coarsening import at_depth, groups_at_depth
from odenets.groups import Group
from odenets.regrouping import coarsened
from tests.odenets.checks import assert_same, unchanged


class Linear(nn.Module):
    """``v = A x``"""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


class Constant(nn.Module):
    """``v = c``"""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, t, x):
        return self.value.expand_as(x)


MATRIX = torch.tensor([[0.0, 1.0], [-1.0, -0.2]], dtype=torch.float64)
X = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.1, -1.0]], dtype=torch.float64)


def linear_flow(depth, total_time=1.0, solver="bs23"):
    return Flow.of([Block([Linear(MATRIX)], total_time / depth) for _ in range(depth)], solver=solver)


def images_network(**flow):
    flows = [Flow(lambda: ConvField(4, norm="batch"), solver="euler", depth=4, **flow) for _ in range(2)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3))
    return Network(nn.Conv2d(1, 4, 1), flows, head, transitions=[nn.BatchNorm2d(4)])


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "bs23", "dopri5"])
def test_merged_blocks_of_a_constant_field_make_no_error(solver):
    flow = Flow.of([Block([Constant(0.7)], h) for h in (0.1, 0.2, 0.3, 0.4)], solver=solver)
    for count in (1, 2, 3):
        coarse = flow.at_depth(count, inputs=[X])
        assert coarse.depth == count
        torch.testing.assert_close(coarse(X), X + 0.7)
    assert flow.at_depth(tolerance=1e-6, inputs=[X]).depth == 1
    assert flow.depth == 4


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("bs23", 3), ("rk4", 4)])
def test_a_linear_flow_at_any_depth_has_the_order_of_its_method(solver, order):
    """Against the matrix exponential, from merged and from split blocks."""
    flow = linear_flow(8, 2.0, solver)
    exact = X @ torch.matrix_exp(2 * MATRIX).T
    errors = [(flow.at_depth(k)(X) - exact).norm().item() for k in (4, 8, 16, 32)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.4)
    assert orders[-1] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("bs23", 3)])
def test_what_a_merged_step_errs_falls_with_the_power_of_its_order(solver, order):
    """Two steps against one differ by ``O(h^(p+1))``: the tolerance that allows a merge falls so with the step size."""

    def allows(total_time, tolerance, rule):
        flow = linear_flow(2, total_time, solver)
        return flow.at_depth(tolerance=tolerance, inputs=[X], rule=rule).depth == 1

    def threshold(total_time, rule):
        low, high = -40.0, 5.0
        while high - low > 0.01:
            middle = (low + high) / 2
            low, high = (low, middle) if allows(total_time, 2**middle, rule) else (middle, high)
        return high

    assert threshold(0.4, "difference") - threshold(0.2, "difference") == pytest.approx(order + 1, abs=0.2)
    embedded = {"euler": 1, "heun": 1, "bs23": 2}[solver]  # the order of the lower solution; Euler has none
    assert threshold(0.4, "error") - threshold(0.2, "error") == pytest.approx(embedded + 1, abs=0.2)


@given(
    st.lists(st.floats(0.01, 2), min_size=1, max_size=6), st.integers(1, 12), st.sampled_from(["even", "difference"])
)
def test_the_total_time_stays(h, count, rule):
    flow = Flow.of([Block([Linear(MATRIX)], size) for size in h], solver="euler")
    coarse = flow.at_depth(count, inputs=[X], rule=rule)
    assert coarse.depth == count
    assert coarse.total_time == pytest.approx(flow.total_time)
    assert coarse.h != flow.h or count == len(h)
    assert flow.h == tuple(h)


def test_the_same_depth_is_the_network_itself_to_the_bit():
    network = images_network()
    x = torch.randn(8, 1, 6, 6)
    network(x)  # sets statistics, which are not computed anew
    for options in ({"blocks": 8}, {"blocks": [4, 4]}, {"tolerance": 0.0, "inputs": [x]}):
        same = network.at_depth(**options)
        assert_same(same, network)
        assert torch.equal(same.eval()(x), copy.deepcopy(network).eval()(x))
        assert same is not network
        assert {*same.parameters()}.isdisjoint(network.parameters())


def test_blocks_are_a_total_or_one_number_per_flow():
    network = images_network()
    assert [flow.depth for flow in network.at_depth(4).flows] == [2, 2]
    assert [flow.depth for flow in network.at_depth([1, 3]).flows] == [1, 3]
    deeper = network.at_depth([8, 5])
    assert [flow.h for flow in deeper.flows] == [(0.125,) * 8, (0.125, 0.125, 0.25, 0.25, 0.25)]
    first, second = deeper.flows[0].blocks[:2]
    assert_same(first.fields, second.fields)
    assert {*first.parameters()}.isdisjoint(second.parameters())


@pytest.mark.parametrize(("stays", "kept"), [("first", 0), ("middle", 1), ("last", 3), ("best", 2)])
def test_the_block_that_stays_is_the_one_asked_for(stays, kept):
    blocks = [Block([Constant(value)], 0.25) for value in (0.0, 1.0, 2.0, 5.0)]  # the mean is 2
    coarse = Flow.of(blocks, solver="euler").at_depth(1, inputs=[X], stays=stays)
    assert torch.equal(coarse.blocks[0].fields[0].value, blocks[kept].fields[0].value)


def test_blocks_that_are_alike_merge_by_error_and_others_not():
    flow = Flow.of([Block([Constant(value)], 0.25) for value in (0.0, 3.0, 3.0, 3.0)], solver="euler")
    assert flow.at_depth(2, inputs=[X]).h == (0.25, 0.75)
    assert flow.at_depth(2, inputs=[X], rule="even").h == (0.5, 0.5)
    assert flow.at_depth(tolerance=1e-6, inputs=[X]).h == (0.25, 0.75)
    assert flow.at_depth(tolerance=1e-6, inputs=[X], rule="even").depth == 3


def test_blocks_whose_merger_changes_the_output_least_merge_first():
    flow = Flow.of([Block([Constant(value)], 0.25) for value in (0.0, 1.0, 3.0, 3.0)], solver="euler")
    assert flow.at_depth(3, inputs=[X], rule="output").h == (0.25, 0.25, 0.5)
    coarse = flow.at_depth(2, inputs=[X], rule="output")
    others = [flow.at_depth(2, inputs=[X], rule=rule) for rule in ("even", "difference")]
    changes = [(one(X) - flow(X)).abs().max().item() for one in (coarse, *others)]
    assert changes[0] == min(changes)
    assert [flow.at_depth(1, inputs=[X], rule="output", stays=stays).depth for stays in ("first", "last")] == [1, 1]


def test_outputs_are_compared_with_the_statistics_of_the_inputs():
    network, x = images_network(), torch.randn(10, 1, 6, 6)
    network(x)
    with unchanged(network):
        assert network.at_depth([1, 4], inputs=[x], rule="output").flows[0].depth == 1


def test_measuring_leaves_the_network_as_it_was():
    network, x = images_network(), torch.randn(8, 1, 6, 6)
    network(x)
    network.flows[1].eval()
    with unchanged(network):
        coarse = network.at_depth(3, inputs=[x, x[:3]])
        groups_at_depth(network, tolerance=0.1, inputs=lambda: iter([x]))
    assert coarse.training
    assert not coarse.flows[1].training


def test_statistics_of_batch_norms_are_recomputed_on_the_inputs():
    network, x = images_network(), torch.randn(20, 1, 6, 6)
    network(x)
    coarse = network.at_depth(2, inputs=(part for part in x.split(10)))  # read twice, though an iterator has one epoch
    expected = copy.deepcopy(coarse)
    odenets.recalibrate(expected, x.split(10))
    assert_same(coarse, expected)
    other = network.at_depth(2, inputs=[x], recalibration=[2 * x])
    odenets.recalibrate(expected, [2 * x])
    assert_same(other, expected)
    with pytest.raises(ValueError, match=r"statistics of batch norms.*inputs=batches"):
        network.at_depth(2)
    assert images_network().at_depth(2).depth == 2  # a new network has none yet


def test_embedded_errors_of_untied_and_chained_stages():
    for stage_fields in ("untied", "chained"):
        flow = Flow(lambda: MLPField(2), solver="bs23", depth=4, stage_fields=stage_fields)
        coarse = flow.at_depth(2, inputs=[X.float()])
        assert coarse.h == (0.5, 0.5) or coarse.depth == 2
        assert coarse(X.float()).shape == X.shape


def test_a_coarsened_network_is_that_of_at_depth_and_then_itself_again():
    flow, x = Flow(MLPField(2), depth=4, solver="bs23"), torch.randn(5, 2)
    groups = groups_at_depth(flow, 2, inputs=[x])
    before, blocks = flow(x), [*flow.blocks]
    with coarsened(flow, groups):
        torch.testing.assert_close(flow(x), flow.at_depth(flow.depth)(x))
        inside = flow(x)
        assert flow.total_time == pytest.approx(1)
    torch.testing.assert_close(inside, flow.at_depth(2, inputs=[x])(x))
    with pytest.raises(RuntimeError, match="stop"), coarsened(flow, groups):
        raise RuntimeError("stop")
    assert [*flow.blocks] == blocks
    assert torch.equal(flow(x), before)
    assert list(flow.state_dict()) == list(copy.deepcopy(flow).state_dict())


def test_gradients_of_a_coarsened_network_reach_the_blocks_that_stay():
    flow = Flow(MLPField(2), depth=4, solver="euler")
    with coarsened(flow, [[Group(0, 2, 1), Group(2, 4, 2)]]):
        loss = flow(torch.randn(5, 2)).square().mean()
    loss.backward()  # behind the context
    assert [block.fields[0].first.weight.grad is not None for block in flow.blocks] == [False, True, True, False]


def test_a_network_at_another_depth_saves_and_loads(tmp_path):
    network, x = images_network(), torch.randn(8, 1, 6, 6)
    network(x)
    coarse = network.at_depth(3, inputs=[x]).eval()
    odenets.save_weights(coarse, tmp_path / "weights.safetensors")
    loaded = images_network()
    with pytest.warns(UserWarning, match="gets depth="):
        odenets.load_weights(loaded, tmp_path / "weights.safetensors")
    assert torch.equal(loaded.eval()(x), coarse(x))


def test_networks_without_blocks_to_merge_are_refused():
    field = MLPField(2)
    for flow in (NeuralODE(field), Flow(field, depth=3, shared=True)):
        network = Network(nn.Identity(), flow, nn.Identity())
        with pytest.raises(ValueError, match="flow 0 has one field for all its steps"):
            network.at_depth(1)
    with pytest.raises(TypeError, match=r"must be an odenets\.Network or Flow, whose blocks are steps, got NeuralODE"):
        at_depth(NeuralODE(field), 1)
    with pytest.raises(TypeError, match="got Linear"):
        at_depth(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="no field yet: call the network once"):
        Flow(depth=2).at_depth(1)
    block, flow = Block([field], 0.5), Flow(field, depth=2)
    with pytest.raises(ValueError, match="a flow or a block twice"):
        Flow.of([block, block]).at_depth(1)
    with pytest.raises(ValueError, match="a flow or a block twice"):
        Network(nn.Identity(), [flow, flow], nn.Identity(), transitions=[nn.Identity()]).at_depth(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "either blocks, how many there are to be, or tolerance"),
        ({"blocks": 2, "tolerance": 0.1}, ValueError, "either blocks"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1"),
        ({"blocks": 2.0}, TypeError, "blocks must be a whole number"),
        ({"blocks": [1, 1]}, ValueError, "one for each of 1 flows"),
        ({"tolerance": 0.1}, ValueError, "tolerance reads errors, which are measured on inputs"),
        ({"tolerance": -1.0, "inputs": [X]}, ValueError, "tolerance must be finite and not negative, got -1"),
        ({"tolerance": "small", "inputs": [X]}, TypeError, "tolerance must be a number"),
        ({"blocks": 2, "rule": "error"}, ValueError, "rule='error' reads errors"),
        (
            {"tolerance": 0.1, "inputs": [X], "rule": "output"},
            ValueError,
            "does not measure: give blocks",
        ),
        ({"blocks": 2, "stays": "best"}, ValueError, "stays='best' reads errors"),
        (
            {"blocks": 2, "rule": "odd"},
            ValueError,
            "rule must be one of .*'even', 'output', got 'odd'",
        ),
        ({"blocks": 2, "stays": "none"}, ValueError, "stays must be one of 'first', 'middle', 'last', 'best'"),
        (
            {"blocks": 2, "inputs": X},
            TypeError,
            r"inputs must hold batches.*one tensor .*, or \[x\] for one",
        ),
        ({"blocks": 2, "inputs": [(X, X, X)]}, TypeError, r"pairs \(inputs, labels\), got a tuple of 3 parts"),
        (
            {"blocks": 2, "inputs": (X, torch.arange(len(X)))},
            TypeError,
            r"got one pair.*: pass \[\(x, y\)\]",
        ),
        ({"blocks": 2, "inputs": [(torch.arange(len(X)), X)]}, TypeError, r"\(inputs, labels\).*exchange them"),
        ({"blocks": 2, "inputs": 3}, TypeError, "got int"),
        ({"blocks": 2, "inputs": []}, ValueError, "at least one batch"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        linear_flow(4).at_depth(**options)


def test_groups_of_other_flows_are_refused():
    with (
        pytest.raises(ValueError, match="groups must hold those of each of 1 flows, got 2"),
        coarsened(linear_flow(2), [[], []]),
    ):
        pass


def test_no_errors_are_measured_where_none_are_read():
    flow = linear_flow(8)
    nothing = [torch.zeros(0)]  # on which nothing could be measured
    assert groups_at_depth(flow, 2, inputs=nothing, rule="even", stays="first") == groups_at_depth(flow, 2)
    with pytest.raises(Exception):  # noqa: B017
        groups_at_depth(flow, 2, inputs=nothing, rule="even", stays="best")
