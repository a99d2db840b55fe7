import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odenets import models
from odenets.transport import moves, states, wasserstein


def network(dimensions=2, depth=4, **flow):
    torch.manual_seed(0)
    return models.points_network(dimensions, 2, hidden=8, **{"solver": "euler", "h": 1.0, "depth": depth} | flow)


@pytest.mark.parametrize("p", [1, 2])
def test_on_a_line_points_go_in_order(p):
    x, y = torch.randn(2, 40, 1, dtype=torch.float64)
    sorted_ = (x.sort(0).values - y.sort(0).values).abs().pow(p).mean() ** (1 / p)
    assert wasserstein(x, y, p) == pytest.approx(sorted_.item(), rel=1e-9)
    assert wasserstein(x, y, p) == pytest.approx(ot.wasserstein_1d(x.numpy(), y.numpy(), p=p)[0] ** (1 / p), rel=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_a_shift_is_optimal_and_order_does_not_matter(p):
    x = torch.randn(30, 3)
    shift = torch.tensor([3.0, 4.0, 0.0])
    assert wasserstein(x, x[torch.randperm(30)] + shift, p) == pytest.approx(5, rel=1e-5)
    assert wasserstein(x, x, p) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["euler", "bs23"]), st.sampled_from([2, 5]))
def test_no_map_moves_less_than_the_distance(seed, solver, dimensions):
    net = network(dimensions, 3, solver=solver)
    found = moves(net, torch.randn(25, dimensions, generator=torch.Generator().manual_seed(seed)))
    assert (found.w1 <= found.mean * (1 + 1e-6) + 1e-9).all()
    assert (found.w2 <= found.root_mean_square * (1 + 1e-6) + 1e-9).all()
    assert (found.w1 <= found.w2 * (1 + 1e-6)).all()
    assert found.gap >= -1e-6


def test_states_begin_at_the_input_and_end_at_the_output():
    net, x = network().train(), torch.randn(6, 2)
    clouds = states(net, x)
    assert len(clouds) == 5
    assert torch.equal(clouds[0], x)
    torch.testing.assert_close(net.head(clouds[-1]), net(x))
    assert net.training


def test_displacements_are_those_of_the_steps():
    net, x = network(), torch.randn(6, 2)
    found = moves(net, x)
    for block, step in enumerate(net.steps(x)):
        length = (step.x1 - step.x0).norm(dim=1)
        assert found.mean[block] == pytest.approx(length.mean().item(), rel=1e-5)
        assert found.root_mean_square[block] == pytest.approx(length.square().mean().sqrt().item(), rel=1e-5)
    assert isinstance(found.w2, np.ndarray)
    assert not math.isnan(found.gap)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: wasserstein(torch.randn(3, 2), torch.randn(4, 2)), "one shape"),
        (lambda: wasserstein(torch.randn(3, 2), torch.randn(3, 2), 3), "p must be 1 or 2"),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()
