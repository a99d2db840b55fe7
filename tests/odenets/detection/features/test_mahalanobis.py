import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance

from odenets import Flow, Network, models
from odenets.detection.features.feature_maps import feature_map_values, feature_maps_of, pooled
from odenets.detection.features.mahalanobis import MAGNITUDES, Mahalanobis
from tests.odenets.detection.victims import Affine, refused


def network():
    return models.resnet110(blocks=1).eval()


@pytest.fixture
def images():
    """Images of three classes that differ in brightness, away from 0 and 1, and their labels in any order."""
    y = torch.randperm(150, generator=torch.Generator().manual_seed(0)) % 3
    return 0.2 + 0.5 * torch.rand(150, 3, 16, 16) + 0.05 * y[:, None, None, None], y


def gaussians(z, y):
    """Means of classes, and precision of the covariance they share, by scikit-learn."""
    means = np.stack([z[y == c].mean(0) for c in range(3)])
    return means, EmpiricalCovariance(assume_centered=True).fit(z - means[y]).precision_


def well_conditioned(classes=3, n=200, dimensions=2):
    y = torch.arange(n) % classes
    return torch.randn(n, dimensions) @ torch.randn(dimensions, dimensions) + y[:, None], y


@torch.no_grad()
def test_confidence_is_that_of_scipy_and_sklearn(images):
    net = models.small_network(3, solver="bs23", depth=2, size=16).eval()
    x, y = images
    scores = Mahalanobis().fit(net, x, y)(net, x[:10])
    assert scores.dtype == torch.float32
    z = feature_map_values(net, x)[1].double().numpy()
    means, precision = gaussians(z, y.numpy())
    expected = [-min(mahalanobis(each, mean, precision) ** 2 for mean in means) / 2 for each in z[:10]]
    np.testing.assert_allclose(scores[:, 1], expected, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("relative", [False, True])
def test_confidence_is_that_of_pytorch_ood(relative):
    detector = pytest.importorskip("pytorch_ood.detector")
    net = models.points_network(2, 3, depth=2)
    x, y = well_conditioned()
    scores = Mahalanobis(relative=relative).fit(net, x, y)(net, x)
    for i, z in enumerate(feature_maps_of(net, x)):
        peer = (detector.RMD if relative else detector.Mahalanobis)(None).fit_features(z, y)
        # theirs is a distance, with the sum over the samples instead of the mean, and RMD without the half
        expected = -len(x) * peer.predict_features(z) / (2 if relative else 1)
        torch.testing.assert_close(scores[:, i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("i", [0, 1])
def test_input_step_is_that_of_pytorch_ood(images, i):
    detector = pytest.importorskip("pytorch_ood.detector")
    net, (x, y) = network(), images
    magnitude = 0.002
    scores = Mahalanobis(magnitude=magnitude).fit(net, x, y)(net, x[:8])
    peer = detector.MahalanobisODIN(lambda x: pooled(feature_maps_of(net, x)[i]), eps=magnitude)
    means, precision = gaussians(feature_map_values(net, x)[i].double().numpy(), y.numpy())
    peer._base.mu, peer._base.precision = torch.tensor(means).float(), torch.tensor(precision).float()
    torch.testing.assert_close(scores[:, i], -peer.predict(x[:8]).detach(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_input_step_raises_the_confidence_of_its_own_state(images, relative):
    net, (x, y) = network(), images
    at_rest = Mahalanobis(relative=relative).fit(net, x, y)(net, x[:30])
    moved = Mahalanobis(magnitude=MAGNITUDES[1], relative=relative).fit(net, x, y)(net, x[:30])
    assert ((moved >= at_rest).float().mean(0) > 0.9).all()


def test_input_step_stays_among_images(images):
    net, (x, y) = network(), images
    seen = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    fitted = Mahalanobis(magnitude=0.01).fit(net, x, y)
    bright = x[:4].round()
    seen.clear()
    fitted(net, bright)
    assert all(part.min() >= 0 and part.max() <= 1 for part in seen)
    assert len({tuple(part.flatten().tolist()) for part in seen[1:]}) == 4  # a step of its own for every state


def test_gradient_is_that_of_differences():
    net = models.points_network(2, 3, depth=2).double()
    x, y = well_conditioned()
    fitted = Mahalanobis(relative=True).fit(net, x.double(), y)
    x = x[:4].double().requires_grad_()
    (gradient,) = torch.autograd.grad(fitted(net, x).sum(), x)
    way = torch.randn_like(x)
    with torch.no_grad():
        ahead, behind = (fitted(net, x + s * way).double().sum().item() for s in (1e-3, -1e-3))
    assert (gradient * way).sum().item() == pytest.approx((ahead - behind) / 2e-3, rel=1e-2)


@torch.no_grad()
def test_rounding_in_directions_that_do_not_vary_is_left_out():
    net = models.small_network(depth=1).eval()
    x = torch.zeros(100, 1, 8, 8)
    x[:, :, 2:6, 2:6] = torch.rand(100, 1, 4, 4)  # all shifts have one mean: 16 channels of the encoder, one direction
    y = torch.arange(100) % 2
    fitted = Mahalanobis().fit(net, x, y)
    assert fitted.factors[0].shape == (16, 1)
    brightness = x.mean((1, 2, 3)).double()
    means = torch.stack([brightness[y == c].mean() for c in (0, 1)])
    variance = (brightness - means[y]).square().mean()
    expected = -(brightness[:, None] - means).square().amin(1) / variance / 2
    torch.testing.assert_close(fitted(net, x)[:, 0].double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_and_images_of_any_precision(images, dtype):
    net, (x, y) = network(), images
    fitted = Mahalanobis(magnitude=0.05).fit(net, x, y)
    expected, ways = Mahalanobis().fit(net, x, y)(net, x), fitted._directions(net, x[:5])
    net = net.to(dtype)
    scores = Mahalanobis().fit(net, x.to(dtype), y)(net, x)
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores[:, 0], expected[:, 0]]))[0, 1] > 0.9
    for way, wide in zip(fitted._directions(net, x[:5]), ways, strict=True):
        assert (way == wide).double().mean() > 0.7
    assert fitted(net, x[:5].to(dtype)).isfinite().all()


def test_a_network_made_in_inference_mode_has_no_input_step(images):
    x, y = images
    with torch.inference_mode():
        net = network()
        fitted = Mahalanobis(magnitude=0.002).fit(net, x, y)
        refused(r"made outside torch\.inference_mode for an input step", fitted, net, x[:5])


def on_states(gain, offset, x, y, relative=True):
    """Fitted to a network whose states are the points, scaled and shifted; their confidences."""
    encoder, field = Affine(gain, offset), Affine(0, 0)
    net = Network(encoder, Flow(lambda: field, solver="euler", h=1.0, depth=1), torch.nn.Identity())
    features = Mahalanobis(relative=relative).fit(net, x, y)
    return features, features(net, x)


@torch.no_grad()
@pytest.mark.parametrize("gain", [1e-200, 1e-20, 1.0, 1e20, 1e200])
def test_confidence_has_no_scale(gain):
    x, y = well_conditioned()
    (_, values), (_, expected) = (on_states(each, 0.0, x.double(), y) for each in (gain, 1.0))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rounding_of_constant_states_is_no_variance():
    """0.1 is no binary number: the mean of a class differs from its members in the last digit."""
    x, y = torch.randn(30, 2), torch.arange(30) % 3
    refused("equal ones in state 0", on_states, 0.0, 1e6 + 0.1, x, y)
    noise = 1e-7 * x  # below the last digit of a million in single precision
    refused("equal ones in state 0", on_states, 1.0, 1e6 + 0.1, noise, y)


@torch.no_grad()
def test_labels_of_bytes_count_to_255():
    x, y = torch.randn(512, 2), (torch.arange(512) % 256).to(torch.uint8)
    assert len(on_states(1.0, 0.0, x, y, relative=False)[0].means[0]) == 256


def test_errors(images):
    net, (x, y), features = network(), images, Mahalanobis(magnitude=0.01)
    refused("magnitude must not be negative, got -1.0", Mahalanobis, magnitude=-1.0)
    refused(r"at most 1, in units of pixels in \[0, 1\], got 2.0", Mahalanobis, magnitude=2.0)
    refused(r"no image of \[0\]", features.fit, net, x, y + 1)
    refused("got -1", features.fit, net, x, y - 1)
    refused("one integer label", features.fit, net, x, y[:2])
    refused("float32", features.fit, net, x, y.float())
    refused("not empty", features.fit, net, x[:0], y[:0])
    refused("equal ones in state 0", features.fit, net, 0 * x, y)
    refused(r"pixels in \[0, 1\]", features.fit(net, x, y), net, x + 1)
    refused(r"\[4, 4, 8\]", features, models.resnet110(blocks=1, channels=(4, 8)), x)
    net.transitions[0].weight.data.fill_(torch.inf)
    refused("infinity in state 2", features.fit, net, x, y)
