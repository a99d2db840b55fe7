"""Last blocks that are repeated, or share one field, are the formulas, and keep the weights of the flow."""

import pytest
import torch

import odenets
from odenets.depth import share_last, unroll_last

X = torch.randn(4, 2, dtype=torch.float64)


def flow_of(**settings):
    return odenets.Flow(odenets.MLPField(2), **{"solver": "euler", "depth": 3, "h": 1.0} | settings).double()


def test_the_last_block_is_taken_several_times():
    flow = flow_of()
    state, field = flow.part(0, 2)(X), flow.blocks[2].fields[0]
    for _ in range(4):
        state = state + field(0.0, state)
    unrolled = unroll_last(flow, 4)
    torch.testing.assert_close(unrolled(X), state)
    assert {*unrolled.parameters()} == {*flow.parameters()}


def test_refined_repetitions_tend_to_the_flow_of_the_last_block():
    flow = flow_of(h=0.5)
    fine = odenets.Flow(flow.blocks[2].fields[0], solver="rk4", depth=20, total_time=0.5, shared=True)
    exact = fine(flow.part(0, 2)(X))
    gaps = [(unroll_last(flow, n, refine=True)(X) - exact).norm().item() for n in (10, 20, 40)]
    assert 1.8 < gaps[0] / gaps[1] < 2.2
    assert 1.8 < gaps[1] / gaps[2] < 2.2


def test_last_blocks_share_the_field_of_the_first_of_them():
    flow = flow_of(depth=4)
    shared = share_last(flow, 3)
    state = flow.part(0, 1)(X)
    for _ in range(3):
        state = state + flow.blocks[1].fields[0](0.0, state)
    torch.testing.assert_close(shared(X), state)
    assert shared.h == flow.h
    assert len([*shared.parameters()]) == 8


def test_schemes_are_repeated_too():
    flow = flow_of(solver="lm", depth=3, h=0.1)
    assert unroll_last(flow, 2)(X).shape == X.shape
    assert flow.at_depth(3)(X).equal(flow(X))


def test_modes_of_fields_stay():
    flow = odenets.Flow(odenets.ConvField(4, norm="batch"), solver="euler", depth=2)
    flow.blocks[1].fields[0].norm1.eval()
    unrolled = unroll_last(flow, 2)
    assert unrolled.training
    assert not flow.blocks[1].fields[0].norm1.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unroll_last(flow_of(), 0), "times must be at least 1"),
        (lambda: share_last(flow_of(), 4), "count must be at most the depth, 3, got 4"),
        (lambda: unroll_last(flow_of(shared=True), 2), "blocks of their own"),
        (lambda: unroll_last(odenets.Flow(), 2), "has no field yet"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_are_told_where_their_flows_are():
    with pytest.raises(TypeError, match=r"network\.flows\[i\]"):
        unroll_last(odenets.models.points_network(), 2)
