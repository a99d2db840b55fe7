import itertools
import math
from fractions import Fraction

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odenets import Flow, Network, adapt, models
from odenets.transport import Moves, moves, states_of, wasserstein
from tests.odenets.checks import unchanged
from tests.odenets.networks import Velocity


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
    moved = moves(net, torch.randn(25, dimensions, generator=torch.Generator().manual_seed(seed)))
    assert (moved.w1 <= moved.mean * (1 + 1e-6) + 1e-9).all()
    assert (moved.w2 <= moved.root_mean_square * (1 + 1e-6) + 1e-9).all()
    assert (moved.w1 <= moved.w2 * (1 + 1e-6)).all()
    assert moved.gap >= -1e-6


def test_states_begin_at_the_input_and_end_at_the_output():
    net, x = network().train(), torch.randn(6, 2)
    clouds = states_of(net, x)
    assert len(clouds) == 5
    assert torch.equal(clouds[0], x)
    torch.testing.assert_close(net.head(clouds[-1]), net(x))
    assert net.training


def test_displacements_are_those_of_the_steps():
    net, x = network(), torch.randn(6, 2)
    moved = moves(net, x)
    for block, step in enumerate(net.steps(x)):
        length = (step.x1 - step.x0).norm(dim=1)
        assert moved.mean[block] == pytest.approx(length.mean().item(), rel=1e-5)
        assert moved.root_mean_square[block] == pytest.approx(length.square().mean().sqrt().item(), rel=1e-5)
    assert isinstance(moved.w2, np.ndarray)
    assert not math.isnan(moved.gap)


def exactly(x, y, p):
    """The distance of few points, in rational numbers and over all maps."""
    a, b = ([[Fraction(v) for v in row] for row in z.double().tolist()] for z in (x, y))
    squares = [[sum((s - t) ** 2 for s, t in zip(u, v, strict=True)) for v in b] for u in a]
    roots = [[math.sqrt(each) if p == 1 else each for each in row] for row in squares]
    least = min(sum(roots[i][j] for i, j in enumerate(order)) for order in itertools.permutations(range(len(a))))
    return float(least / len(a)) ** (1 / p)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("scale", [1e-150, 1e-10, 1e-4, 1.0, 1e10, 1e150])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e9])
def test_distances_are_exact_at_any_scale_and_offset(p, scale, offset):
    draws = torch.Generator().manual_seed(0)
    x, y = (scale * (torch.randn(6, 2, dtype=torch.float64, generator=draws) + offset) for _ in range(2))
    assert wasserstein(x, y, p) == pytest.approx(exactly(x / scale, y / scale, p) * scale, rel=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("far", [1e5, 1e8, 1e12])
@pytest.mark.parametrize("first", [True, False])
def test_far_points_do_not_hide_the_near_ones(p, far, first):
    """Two of five are far away in either cloud, in opposite directions."""
    draws = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, 2, dtype=torch.float64, generator=draws) for _ in range(2))
    x[:2] += far * torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    y[:2] += far * torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    y = y if first else y.flip(0)
    assert wasserstein(x, y, p) == pytest.approx(exactly(x, y, p), rel=1e-6)


@pytest.mark.parametrize("size", [1e-7, 1e-11])
def test_small_clusters_far_apart(size):
    """Within each of three clusters the points are shifted; costs between them are 1e14 times larger or more."""
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
    x = size * torch.randn(30, 2, dtype=torch.float64) + centers
    y = x[torch.randperm(30)] + size * torch.tensor([3.0, 4.0])
    assert wasserstein(x, y) == pytest.approx(5 * size, rel=1e-3 if size < 1e-8 else 1e-6)  # 1 + 1e-11 has few digits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.complex64])
def test_points_of_any_precision_are_those_numbers(dtype):
    x, y = (100 * torch.randn(6, 2, dtype=torch.complex64 if dtype.is_complex else torch.float32) for _ in range(2))
    x, y = x.to(dtype), y.to(dtype)
    real = [torch.view_as_real(z).flatten(1) if dtype.is_complex else z.double() for z in (x, y)]
    assert wasserstein(x, y) == pytest.approx(exactly(*real, 2), rel=1e-9)


def test_arrays_are_points():
    x, y = np.random.default_rng(0).random((2, 6, 2))
    assert wasserstein(x, y) == wasserstein(torch.tensor(x), torch.tensor(y))


def test_what_the_network_simplex_cannot_prove_is_not_believed(monkeypatch):
    x, y = (torch.randn(6, 2, dtype=torch.float64) for _ in range(2))
    right = wasserstein(x, y)
    simplex = ot.emd

    def shuffled(*arguments, **options):
        plan, log = simplex(*arguments, **options)
        return np.roll(plan, 1, 0), log

    monkeypatch.setattr(ot, "emd", shuffled)
    assert wasserstein(x, y) == pytest.approx(right, rel=1e-12)
    assert right == pytest.approx(exactly(x, y, 2), rel=1e-9)


@pytest.mark.parametrize("network_dtype", [torch.float64, torch.bfloat16])
def test_clouds_follow_the_precision_of_the_network(network_dtype):
    net = network().to(network_dtype)
    clouds = states_of(net, torch.randn(6, 2))
    assert all(cloud.dtype == network_dtype for cloud in clouds)
    result = moves(net, torch.randn(6, 2))
    assert (result.w2 <= result.root_mean_square * (1 + 1e-9)).all()


def test_the_displacements_of_large_half_precision_states_are_finite():
    """The square of 300 is beyond a half's largest number."""
    flow = Flow(constant, solver="euler", h=1.0, depth=2)
    result = moves(flow, torch.randn(4, 3).half())
    assert result.mean == pytest.approx([300 * math.sqrt(3)] * 2, rel=1e-2)
    assert result.w2 == pytest.approx(result.root_mean_square, rel=1e-9)


def constant(velocity=300.0):
    return Velocity(lambda m, t, x: torch.full_like(x, velocity))


def test_the_gap_of_what_does_not_move_is_zero():
    still = moves(Flow(lambda: constant(0.0), solver="euler", h=1.0, depth=2), torch.randn(4, 2))
    assert (still.w2 == 0).all()
    assert still.gap == 0
    one = np.ones(1)
    assert Moves(one, one, 0 * one, 0 * one).gap == math.inf


def test_states_leave_the_modes_of_each_module_also_after_an_exception():
    net = network().train()
    net.head.eval()
    good, bad = torch.randn(6, 2), torch.randn(6, 5)
    with unchanged(net):
        states_of(net, good)
    with unchanged(net), pytest.raises((RuntimeError, ValueError)):
        states_of(net, bad)


@pytest.mark.parametrize("measure", [states_of, moves])
def test_an_adapted_model_is_named(measure):
    chain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    adapted = adapt(chain, displacement=True)
    with pytest.raises(TypeError, match=r"got AdaptedModel: .*wasserstein\(step\.x0, step\.x1\)"):
        measure(adapted, torch.randn(4, 3))
    assert all(wasserstein(step.x0, step.x1) >= 0 for step in adapted.steps(torch.randn(4, 3)))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: wasserstein(torch.randn(3, 2), torch.randn(4, 2)), "one shape"),
        (lambda: wasserstein(torch.randn(3), torch.randn(3)), "one shape"),
        (lambda: wasserstein(torch.randn(3, 2), torch.randn(3, 2), 3), "p must be 1 or 2"),
        (lambda: wasserstein(torch.zeros(0, 2), torch.zeros(0, 2)), r"between 1 and 20000 points .*got shape \(0, 2\)"),
        (lambda: wasserstein(torch.zeros(3, 0), torch.zeros(3, 0)), "between 1 and 20000 points"),
        (lambda: wasserstein(torch.zeros(20_001, 1), torch.zeros(20_001, 1)), "between 1 and 20000 points"),
        (lambda: wasserstein(torch.zeros(3, 2), torch.full((3, 2), torch.nan)), "must be finite"),
        (lambda: wasserstein(torch.full((3, 2), torch.inf), torch.zeros(3, 2)), "must be finite"),
        (
            lambda: wasserstein(*(torch.tensor([[1.0], [size]], dtype=torch.float64) for size in (1e-200, 2e-200))),
            "within 150 orders of magnitude",
        ),
        (lambda: moves(Flow(lambda: constant(torch.inf), depth=2), torch.randn(4, 2)), "finite states.*after block 1"),
        (lambda: moves(Network(nn.Identity(), [Flow(), Flow()], nn.Identity(), transitions=[nn.Identity()]),
                       torch.randn(4, 2)), "must have one flow, got 2"),
        (lambda: moves(nn.Linear(2, 2), torch.randn(4, 2)), "must be a Network or a Flow, got Linear"),
    ],
)  # fmt: skip
def test_errors(run, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run()
