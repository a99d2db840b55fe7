"""Linear maps by least squares: the precision of their sums, whatever that of torch's products."""

from __future__ import annotations

import pytest
import torch

from odenets.depth import compress
from odenets.depth.compression.least_squares import NormalEquations
from tests.odenets.depth.compression.networks import images


@pytest.fixture
def fast_products():
    """Products of float32 with fewer digits, where the processor or the device has them."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def fitted():
    x = 1 + 1e-3 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(12.0).reshape(6, 2)
    sums = NormalEquations(6, 2)
    for part, held_out in zip(x.split(200), (False, True), strict=True):
        sums.add(part, part.double() @ weight.double(), held_out=held_out)
    return sums.solve(), weight


def test_sums_are_of_float64_where_products_of_float32_are_rounded(fast_products):
    fit, weight = fitted()
    torch.testing.assert_close(fit.weight, weight.double(), rtol=0, atol=1e-3)


def test_what_is_made_on_the_way_is_on_the_device_of_the_network_whatever_the_default():
    network, x = images(), torch.rand(60, 1, 8, 8)
    plain = compress(network, [x], remove=2)
    with torch.device("meta"):
        small = compress(network, [x], remove=2)
    assert small.divergence == plain.divergence
