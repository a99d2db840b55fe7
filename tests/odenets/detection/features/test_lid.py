import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from odenets import models
from odenets.detection.features.feature_maps import feature_maps_of
from odenets.detection.features.lid import LARGEST, LID, local_dimension
from tests.odenets.detection.victims import refused


def network():
    return models.small_network(solver="bs23", depth=2).eval()


def images(n=60):
    return torch.rand(n, 1, 8, 8), torch.arange(n) % 10


def ball(n, dimension):
    """Points drawn uniformly from the unit ball."""
    directions = torch.nn.functional.normalize(torch.randn(n, dimension, dtype=torch.float64), dim=1)
    return directions * torch.rand(n, 1, dtype=torch.float64) ** (1 / dimension)


@pytest.mark.parametrize("dimension", [1, 2, 5, 20])
def test_dimension_of_a_ball(dimension):
    center, k = torch.zeros(1, dimension), 100
    dimensions = torch.cat([local_dimension(center, ball(1000, dimension), k) for _ in range(40)])
    # -log(r_i / r_k) are exponential variables of mean 1/d for i < k, and 0 for i = k
    assert (1 / dimensions).mean().item() * k / (k - 1) == pytest.approx(1 / dimension, rel=0.06)


def test_dimension_is_that_of_the_subspace_and_not_of_the_space_around():
    isometry = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64)).Q.T
    points = ball(500, 3)
    embedded = points @ isometry
    torch.testing.assert_close(local_dimension(embedded[:5], embedded, 20), local_dimension(points[:5], points, 20))


def test_dimension_is_that_of_the_formula_with_neighbors_by_sklearn():
    points, near = torch.randn(7, 4), torch.randn(50, 4)
    r, _ = NearestNeighbors(n_neighbors=12).fit(near.numpy()).kneighbors(points.numpy())
    expected = -1 / np.log(r / r[:, -1:]).mean(1)
    np.testing.assert_allclose(local_dimension(points, near, 12), expected, rtol=1e-5)


@pytest.mark.parametrize("rounding", [0, 1e-7])
def test_a_point_is_no_neighbor_of_its_own(rounding):
    near = torch.randn(50, 4, dtype=torch.float64)
    alone = torch.cat([local_dimension(near[i : i + 1], torch.cat([near[:i], near[i + 1 :]]), 20) for i in range(50)])
    torch.testing.assert_close(local_dimension(near + rounding, near, 20), alone, rtol=1e-5, atol=0)


def test_fewer_neighbors_than_k_all_count():
    point, near = torch.zeros(1, 2), torch.randn(10, 2)
    near[3:7] = 0
    others = torch.cat([near[:3], near[7:]])
    torch.testing.assert_close(local_dimension(point, near, 8), local_dimension(point, others, 6))


@pytest.mark.parametrize(
    "near",
    [torch.zeros(10, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(5, 1), torch.tensor([[0.0, 0.0], [0.0, 1.0]])],
    ids=["copies", "on a circle", "one neighbor"],
)
def test_equal_distances_give_a_finite_number(near):
    point = torch.zeros(1, 2, requires_grad=True)
    dimensions = local_dimension(point, near, 2)
    assert dimensions.item() == pytest.approx(LARGEST)
    (gradient,) = torch.autograd.grad(dimensions.sum(), point)
    assert gradient.isfinite().all()


@torch.no_grad()
def test_features_are_dimensions_of_each_state_among_those_of_training_images():
    net, (x, y) = network(), images()
    fitted = LID(k=5, reference=60).fit(net, x, y)  # all images: their order does not matter
    new = torch.rand(4, 1, 8, 8)
    dimensions = fitted(net, new)
    assert dimensions.dtype == torch.float32
    maps = ([state.flatten(1) for state in feature_maps_of(net, each)] for each in (new, x))
    expected = torch.stack([local_dimension(z, near, 5) for z, near in zip(*maps, strict=True)], 1)
    torch.testing.assert_close(dimensions.double(), expected, rtol=1e-4, atol=0)


def test_reference_is_drawn_by_the_seed():
    net, (x, y) = network(), images()
    one, same, other = (LID(k=5, reference=20, seed=seed).fit(net, x, y).states[0] for seed in (0, 0, 1))
    assert one.shape == (20, 16 * 8 * 8)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len(np.unique(one, axis=0)) == 20


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-10, 1e10, 1e30, 1e200])
def test_dimension_has_no_scale(scale):
    points, near = torch.randn(7, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    expected = local_dimension(points, near, 12)
    torch.testing.assert_close(local_dimension(scale * points, scale * near, 12), expected, rtol=1e-9, atol=0)


def test_a_far_point_of_the_reference_does_not_make_all_others_one():
    points, near = torch.randn(7, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    far = torch.cat([near, torch.full((1, 4), 1e9, dtype=torch.float64)])
    torch.testing.assert_close(local_dimension(points, far, 12), local_dimension(points, near, 12))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_dimension(value):
    points, near = torch.randn(3, 4), torch.randn(50, 4)
    expected = local_dimension(points, near, 12)
    points[1, 2] = value
    dimensions = local_dimension(points, near, 12)
    assert dimensions[1].isnan()
    assert torch.equal(dimensions[[0, 2]], expected[[0, 2]])
    refused("reference must be finite, got NaN or infinity", local_dimension, near, points, 2)


def test_gradient_is_that_of_differences():
    near = torch.randn(30, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: local_dimension(x, near, 10), x)


def test_errors():
    refused("k must be at least 2, got 1", LID, k=1)
    refused("reference must be more than the k = 20", LID, k=20, reference=20)
    refused("at least the reference = 100 images, got 60", LID().fit, network(), *images())
    refused("between 1 and the 5 points", local_dimension, torch.rand(2, 3), torch.rand(5, 3), 6)
