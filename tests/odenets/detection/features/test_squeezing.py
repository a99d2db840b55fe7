import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import nn

from odenets import models
from odenets.detection import FeatureSqueezing
from odenets.detection.features.squeezing import median_smoothed, non_local_means, reduced_depth
from tests.odenets.detection.victims import refused

X = torch.rand(6, 2, 9, 7, generator=torch.Generator().manual_seed(0))


def test_pixels_at_fewer_bits():
    assert torch.equal(reduced_depth(X, 1), (X > 0.5).float())
    assert len(reduced_depth(X, 3).unique()) == 8
    torch.testing.assert_close(reduced_depth(torch.arange(256) / 255, 8), torch.arange(256) / 255)


@pytest.mark.parametrize("window", [2, 3])
def test_median_is_that_of_scipy(window):
    expected = median_filter(X.numpy(), (1, 1, window, window), mode="reflect")
    np.testing.assert_array_equal(median_smoothed(X, window), expected)


def test_non_local_means_are_those_of_the_formula():
    x, h, reach = X[:1, :, :6, :6].double(), 0.3, 2
    p = np.pad(x[0].numpy(), ((0, 0), (3, 3), (3, 3)), mode="reflect")
    expected = np.zeros((2, 6, 6))
    for i in range(6):
        for j in range(6):
            here, total = p[:, i + 2 : i + 5, j + 2 : j + 5], 0.0
            for a in range(i - reach, i + reach + 1):
                for b in range(j - reach, j + reach + 1):
                    w = np.exp(-np.mean((p[:, a + 2 : a + 5, b + 2 : b + 5] - here) ** 2) / h**2)
                    total, expected[:, i, j] = total + w, expected[:, i, j] + w * p[:, a + 3, b + 3]
            expected[:, i, j] /= total
    np.testing.assert_allclose(non_local_means(x, h, search=5)[0], expected, rtol=1e-12)


def test_non_local_means_of_small_images_and_of_flat_ones():
    assert non_local_means(torch.rand(2, 1, 2, 2), 0.1).shape == (2, 1, 2, 2)
    torch.testing.assert_close(non_local_means(torch.full((1, 3, 8, 8), 0.3), 0.1), torch.full((1, 3, 8, 8), 0.3))


def test_features_are_distances_of_probabilities_and_the_largest():
    torch.manual_seed(0)
    net = models.small_network(depth=1).eval()
    x = torch.rand(5, 1, 8, 8)
    kind = FeatureSqueezing("median", "bits", bits=2, window=3)
    views = [median_smoothed(x, 3), reduced_depth(x, 2)]
    expected = torch.stack([(net(view).softmax(1) - net(x).softmax(1)).abs().sum(1) for view in views], 1)
    logits, features = kind.output_and_features(net, x)
    torch.testing.assert_close(features, torch.cat([expected, expected.max(1, keepdim=True).values], 1))
    assert torch.equal(logits, net(x))
    assert torch.equal(kind(net, x), features)


def test_a_network_that_sees_no_detail_gives_zero():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(net[1].weight)
    assert FeatureSqueezing()(net, torch.rand(4, 1, 8, 8)).abs().max() == 0


def test_bad_input():
    refused("squeezers must be among bits, median, means, got 'jpeg'", FeatureSqueezing, "jpeg")
    refused("bits must be", FeatureSqueezing, bits=0)
    refused("window must be 2 or 3, got 5", FeatureSqueezing, window=5)
    refused("strength must be positive, got 0", FeatureSqueezing, strength=0)
    refused(r"pixels in \[0, 1\]", FeatureSqueezing(), models.small_network(depth=1), torch.rand(2, 1, 8, 8) + 1)
