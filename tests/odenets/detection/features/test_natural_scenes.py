import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import gamma
from scipy.stats import gennorm
from torchvision.transforms.functional import rgb_to_grayscale

import odenets
from odenets.detection import NaturalSceneStatistics
from odenets.detection.features.natural_scenes import asymmetric_gaussian, contrast_normalized, generalized_gaussian
from tests.odenets.detection.victims import refused

network = odenets.models.small_network(depth=1)
statistics = NaturalSceneStatistics()


def noise(*shape):
    """Images of independent pixels."""
    return torch.tensor(np.random.default_rng(0).random(shape))


def smooth(*shape):
    """Random images with neighbors that resemble each other."""
    x = gaussian_filter(noise(*shape).numpy(), (0, 0, 2, 2))
    return torch.tensor((x - x.min()) / (x.max() - x.min()))


@pytest.mark.parametrize("images", [noise(3, 1, 32, 32), smooth(3, 1, 28, 20)], ids=["noise", "smooth"])
def test_statistics_are_those_of_piq(images):
    expected = pytest.importorskip("piq.brisque")._natural_scene_statistics(255 * images.double())
    values = statistics(network, images)
    assert values.dtype == torch.float32
    # shapes lie on a grid of 0.001, where piq compares the inverse ratio for the first
    torch.testing.assert_close(values.double(), expected, atol=1.5e-3, rtol=2e-3)


def test_statistics_of_colors_are_those_of_their_luma():
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    exact = (x * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(statistics(network, x), statistics(network, exact))
    torch.testing.assert_close(statistics(network, x), statistics(network, rgb_to_grayscale(x)), rtol=2e-2, atol=2e-3)
    refused("gray or RGB", statistics, network, x[:, :2])


def test_contrast_is_normalized_as_by_scipy():
    image = 255 * np.random.default_rng(0).random((12, 9))
    window = {"sigma": 7 / 6, "mode": "constant", "radius": 3}
    mean = gaussian_filter(image, **window)
    deviation = np.sqrt(gaussian_filter(image**2, **window) - mean**2)
    values = contrast_normalized(torch.tensor(image)[None])[0]
    np.testing.assert_allclose(values, (image - mean) / (deviation + 1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_a_generalized_gaussian_gets_its_shape_and_variance_back(shape):
    law = gennorm(shape, scale=1.7)
    samples = torch.tensor(law.rvs((4, 100_000), random_state=np.random.default_rng(0)))
    values, variance = generalized_gaussian(samples)
    torch.testing.assert_close(values.mean().item(), shape, rtol=0.03, atol=0)
    torch.testing.assert_close(variance.mean().item(), float(law.var()), rtol=0.03, atol=0)
    values, mean, left, right = asymmetric_gaussian(samples)  # the special case of one scale
    torch.testing.assert_close(values.mean().item(), shape, rtol=0.03, atol=0)
    assert mean.abs().max() < 0.01 * law.std()
    torch.testing.assert_close(left, right, rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("scales", [(1.0, 3.0), (2.0, 0.5)])
def test_an_asymmetric_gaussian_gets_its_parameters_back(shape, scales):
    rng, (below, above) = np.random.default_rng(0), scales
    size = np.abs(gennorm(shape).rvs(400_000, random_state=rng))
    negative = rng.random(size.shape) < below / (below + above)  # the sides weigh as their scales
    samples = np.where(negative, -below, above) * size
    values, mean, left, right = (each.item() for each in asymmetric_gaussian(torch.tensor(samples)[None]))
    assert values == pytest.approx(shape, rel=0.03)
    assert left == pytest.approx(below**2 * gennorm(shape).var(), rel=0.03)
    assert right == pytest.approx(above**2 * gennorm(shape).var(), rel=0.03)
    assert mean == pytest.approx((above - below) * gamma(2 / shape) / gamma(1 / shape), rel=0.03)
    assert mean == pytest.approx(samples.mean(), rel=0.03)


def test_shape_is_on_the_grid_and_within_its_ends():
    rare = torch.zeros(1, 10_000)
    rare[0, 0] = 1
    flat = torch.tensor([[1.0, -1.0]]).repeat(1, 50)
    assert generalized_gaussian(rare)[0].item() == pytest.approx(0.2)
    assert generalized_gaussian(flat)[0].item() == pytest.approx(10)
    shape = generalized_gaussian(torch.randn(5, 100))[0] * 1000
    torch.testing.assert_close(shape, shape.round())


@pytest.mark.parametrize("gray", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_flat_images_have_finite_statistics(gray, channels):
    values = statistics(network, torch.full((2, channels, 8, 8), gray))
    assert values.isfinite().all()
    if gray == 0:
        torch.testing.assert_close(values[0], torch.tensor([0.2, 0, *[0.2, 0, 0, 0] * 4]))


@pytest.mark.parametrize("gray", [5, 20, 178])  # of these 5 and 20 are not met exactly by the weighted mean
def test_flat_parts_of_an_image_count_on_neither_side(gray):
    x = torch.full((1, 1, 40, 40), gray / 255)
    x[:, :, 15:25, 15:25] = torch.rand(10, 10)
    m = contrast_normalized(255 * x[0])[0]
    assert (m[4:11, 4:-4] == 0).all()
    products = m * m.roll(1, 1)
    *_, left, right = asymmetric_gaussian(products.flatten()[None])
    for values, side in ((left, products < -1e-12), (right, products > 1e-12)):
        assert values.item() == pytest.approx(products[side].square().mean().item())


def test_noise_changes_the_statistics_of_a_smooth_image():
    x = smooth(4, 1, 32, 32)
    noisy = (x + 0.03 * torch.randn(x.shape).sign()).clamp(0, 1)
    products = [2 + 4 * i for i in range(4)]
    clean, changed = (statistics(network, images)[:, products] for images in (x, noisy))
    assert ((changed - clean).mean(0) > 0.1).all()
