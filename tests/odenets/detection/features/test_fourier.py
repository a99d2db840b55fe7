import numpy as np
import pytest
import torch

import odenets
from odenets.detection.features.fourier import FourierSpectrum
from tests.odenets.detection.victims import refused

network = odenets.models.small_network(depth=1)


def test_parts():
    refused("part must be 'magnitude' or 'phase', got 'power'", FourierSpectrum, "power")


@pytest.mark.parametrize(("part", "values"), [("magnitude", np.abs), ("phase", np.angle)])
def test_spectrum_is_that_of_numpy(part, values):
    x = torch.rand(4, 3, 7, 9, dtype=torch.float64)
    spectrum = FourierSpectrum(part)(network, x)
    assert spectrum.dtype == torch.float32
    assert spectrum.shape == (4, 3 * 7 * 9)
    np.testing.assert_allclose(spectrum, values(np.fft.fft2(x.numpy())).reshape(4, -1), rtol=1e-5, atol=1e-5)


def test_parseval():
    x = torch.rand(5, 1, 28, 28)
    squares = FourierSpectrum()(network, x).square().sum(1)
    torch.testing.assert_close(squares, 28 * 28 * x.square().sum((1, 2, 3)))


def test_magnitude_stays_and_phase_turns_where_the_image_is_shifted():
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    shifted = x.roll(1, 3)
    magnitude, phase = FourierSpectrum(), FourierSpectrum("phase")
    torch.testing.assert_close(magnitude(network, shifted), magnitude(network, x))
    turn = (phase(network, shifted) - phase(network, x)).view(5, 8, 8) + 2 * torch.pi * torch.arange(8) / 8
    torch.testing.assert_close(turn.cos(), torch.ones(5, 8, 8), atol=1e-5, rtol=0)


def test_magnitude_and_phase_give_the_image_back():
    x = torch.rand(2, 3, 6, 6)
    magnitude, phase = (FourierSpectrum(part)(network, x).view(2, 3, 6, 6) for part in ("magnitude", "phase"))
    torch.testing.assert_close(torch.fft.ifft2(torch.polar(magnitude, phase)).real, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["magnitude", "phase"])
@pytest.mark.parametrize("gray", [0.0, 0.3, 1.0])
def test_flat_images_are_finite_and_so_are_their_gradients(part, gray):
    x = torch.full((2, 1, 8, 8), gray, requires_grad=True)
    spectrum = FourierSpectrum(part)(network, x)
    assert spectrum.isfinite().all()
    assert torch.autograd.grad(spectrum.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["magnitude", "phase"])
def test_images_in_half_precision_are_transformed_in_single(dtype, part):
    x = torch.rand(2, 1, 7, 9).to(dtype)
    assert torch.equal(FourierSpectrum(part)(network, x), FourierSpectrum(part)(network, x.float()))
