"""What holds of every kind of features."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from odenets import Flow, models
from odenets.detection import (
    LID,
    FeatureSqueezing,
    FourierSpectrum,
    KernelDensity,
    Mahalanobis,
    NaturalSceneStatistics,
    Separation,
    Trajectory,
    in_batches,
)
from odenets.detection.features.feature_maps import feature_maps_of
from tests.odenets.detection.victims import refused

X, Y = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10
KINDS = [
    *(Trajectory(), LID(k=5, reference=30), Mahalanobis(), Mahalanobis(magnitude=0.002, relative=True)),
    *(KernelDensity(bandwidth=1.0), FeatureSqueezing("median"), Separation()),
    *(FourierSpectrum(), FourierSpectrum("phase"), NaturalSceneStatistics()),
]


def network():
    torch.manual_seed(0)
    return models.small_network(solver="bs23", depth=2).eval()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_an_image_has_its_features_in_any_batch_and_mode_of_the_caller(kind, mode):
    net = network()
    expected = kind.fit(net, X, Y)(net, X).detach()
    with mode():
        features = kind.fit(net, X.clone(), Y.clone())
        batches = in_batches(lambda part: features(net, part), net, X.clone(), batch_size=7)
    assert batches.dtype == torch.float32
    torch.testing.assert_close(batches, expected, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS[:3], ids=repr)
def test_images_are_taken_to_the_precision_of_the_network(kind, dtype):
    expected = kind.fit(network(), X, Y)(network(), X)
    net = network().to(dtype)
    assert {state.dtype for state in feature_maps_of(net, X)} == {dtype}
    features = kind.fit(net, X, Y)(net, X)
    assert torch.equal(features, kind.fit(net, X.to(dtype), Y)(net, X.to(dtype)))
    assert features.dtype == (dtype if dtype == torch.float64 and kind is KINDS[0] else torch.float32)
    assert (features / expected - 1).abs().median() < (1e-4 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("kind", KINDS[:-1], ids=repr)
def test_gradients_pass(kind):
    net, x = network(), X[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kind.fit(net, X, Y)(net, x).square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS[-3:], ids=repr)
def test_the_network_plays_no_part_in_features_of_the_image(kind):
    assert kind.fit(network(), X, Y) is kind
    assert torch.equal(kind(network(), X), kind(Flow(), X))
    refused(r"x must be a batch \(N, C, H, W\)", kind, network(), X[0, 0])
    refused(r"pixels in \[0, 1\]", kind, network(), X + 1)


@pytest.mark.parametrize("kind", [LID(k=5, reference=30), Mahalanobis()], ids=repr)
def test_features_are_fitted_to_one_network_that_does_not_diverge(kind):
    net = network()
    refused("before it is called", kind, net, X)
    refused("network must be the one of fit", kind.fit(net, X, Y), models.small_network(features=4), X)
    net.encoder[-1].weight.data.fill_(torch.inf)
    refused("network must have finite states.*, got NaN or infinity", kind.fit, net, X, Y)


FITTED = [LID(k=5, reference=30), Mahalanobis(), KernelDensity(bandwidth=1.0)]


@pytest.mark.parametrize("kind", FITTED, ids=repr)
def test_training_images_are_pixels_unless_they_come_normalized(kind):
    net = network()
    refused("x must be a floating tensor .* divide bytes by 255", kind.fit, net, (255 * X).byte(), Y, error=TypeError)
    refused(r"x must have pixels in \[0, 1\], got \[0.*, 25", kind.fit, net, 255 * X, Y)
    refused(r"x must have pixels in \[0, 1\], got \[-", kind.fit, net, X - 0.5, Y)
    for index in (3, 59):  # LID draws some of them
        spoiled = X.clone()
        spoiled[index] = torch.nan
        refused("x must be finite, got NaN or infinity", kind.fit, net, spoiled, Y)
        refused("x must be finite, got NaN or infinity", kind.fit, net, spoiled, Y, normalized=True)
    refused("x must hold numbers, got a tensor on the meta device", kind.fit, net, X.to("meta"), Y, error=TypeError)
    refused("got ndarray: torch.from_numpy", kind.fit, net, X.numpy(), Y, error=TypeError)
    refused("got DataLoader: one tensor of all", kind.fit, net, DataLoader(TensorDataset(X, Y)), Y, error=TypeError)
    assert kind.fit(net, X - 0.5, Y, normalized=True)(net, X[:5] - 0.5).isfinite().all()


@pytest.mark.parametrize("kind", FITTED[1:], ids=repr)
@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (None, TypeError, "y must be a tensor of integer labels (N,), got NoneType$"),
        (Y.tolist(), TypeError, "got list: torch.as_tensor"),
        (Y.numpy(), TypeError, "got ndarray: torch.as_tensor"),
        (Y.float(), ValueError, "one integer label for each of 60 images, got torch.float32"),
        (Y[:, None], ValueError, "one integer label for each of 60 images, got torch.int64 of shape"),
        (Y - 1, ValueError, "y must hold labels 0, 1, ..., got -1"),
        (100 * Y, ValueError, r"from 0 to 900, got .* of .1, 2, 3, 4, 5, ..."),
    ],
)
def test_labels_are_one_whole_number_for_each_image(kind, labels, error, match):
    refused(match.replace("(N,)", r"\(N,\)"), kind.fit, network(), X, labels, error=error)
