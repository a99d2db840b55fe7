import numpy as np
import pytest
import torch
from sklearn.neighbors import KernelDensity as Density

from odenets import models
from odenets.detection import in_batches
from odenets.detection.features.feature_maps import feature_maps_of, pooled
from odenets.detection.features.kernel_density import KernelDensity, log_density
from tests.odenets.detection.victims import refused

X, Y = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10


def network():
    torch.manual_seed(0)
    return models.small_network(solver="bs23", depth=2).eval()


def test_density_is_that_of_the_formula():
    x, points = torch.randn(7, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    expected = [np.log(np.mean([np.exp(-((a - p) ** 2).sum() / 0.8**2) for p in points.numpy()])) for a in x.numpy()]
    np.testing.assert_allclose(log_density(x, points, 0.8), expected, rtol=1e-12)


def test_density_is_that_of_sklearn_but_for_its_constant():
    x, points = torch.randn(9, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    theirs = Density(bandwidth=0.7 / np.sqrt(2)).fit(points.numpy()).score_samples(x.numpy())
    ours = log_density(x, points, 0.7).numpy()
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-9, atol=1e-12)


def test_points_far_away_have_a_finite_density():
    assert log_density(torch.full((1, 2), 1e3), torch.zeros(3, 2), 1.0).item() == pytest.approx(-2e6)


def test_density_is_among_training_images_of_the_predicted_class():
    net, new = network(), torch.rand(20, 1, 8, 8)
    kind = KernelDensity(bandwidth=0.5).fit(net, X, Y)
    z, at = (in_batches(lambda part: pooled(feature_maps_of(net, part)[-1]), net, x).double() for x in (X, new))
    predicted = in_batches(net, net, new).argmax(1)
    inside = [(z[c == Y][:, None] - z[c == Y]).square().sum(2) for c in range(10)]
    width = 0.5 * np.mean([each.sum() / (6 * 5) for each in inside]) ** 0.5  # six images a class, in pairs
    expected = [log_density(each[None], z[c == Y], width).item() for each, c in zip(at, predicted, strict=True)]
    np.testing.assert_allclose(kind(net, new)[:, 0].detach(), expected, rtol=1e-5)
    logits, features = kind.output_and_features(net, new)
    assert torch.equal(logits, net(new))
    assert torch.equal(features, kind(net, new))


def test_bad_input():
    net = network()
    refused("bandwidth must be positive and finite, got 0", KernelDensity, bandwidth=0)
    refused("must be fitted to training images before it is called", KernelDensity(), net, X)
    refused("one integer label for each of 60 images, got torch.float32", KernelDensity().fit, net, X, Y.float())
    refused(r"2 images of every class from 0 to 3, got fewer of \[0, 1, 2\]", KernelDensity().fit, net, X, Y * 0 + 3)
    refused("images that differ within a class", KernelDensity().fit, net, torch.zeros(20, 1, 8, 8), Y[:20])
    kind = KernelDensity().fit(net, X, Y)
    refused("network must be the one of fit, with states of", kind, models.small_network(features=4), X)
    kind.states = kind.states[:1]
    refused("network must predict the 1 classes of fit", kind, net, X)
