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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_far_from_zero_lose_no_digits_in_the_sums(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    weight = torch.arange(12, dtype=torch.float64).reshape(6, 2)
    y = x @ weight + 0.3 * torch.randn(600, 2, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(600, generator=generator, dtype=torch.float64)

    def solved(x, weights=None):
        sums = NormalEquations(6, 2)
        sums.add(x[:0].to(dtype), y[:0].to(dtype), held_out=False)  # of padding alone
        for rows, held_out in ((slice(400), False), (slice(400, None), True)):
            its = None if weights is None else weights[rows].to(dtype)
            sums.add(x[rows].to(dtype), 100 + y[rows].to(dtype), held_out=held_out, weights=its)
        return sums.solve()

    for its in (None, weights):
        fit, near = solved(x + 1000, its), solved(x, its)
        errors = (x[400:] + 1000) @ fit.weight + fit.bias - 100 - y[400:]
        assert near.error == pytest.approx(0.09 * (1 if its is None else its.square().mean().item()), rel=0.2)
        assert fit.error == pytest.approx(near.error, rel=1e-2)
        assert errors.square().mean().item() == pytest.approx(0.09, rel=0.2)


def test_a_map_without_a_constant_is_found_of_features_far_from_zero():
    x = 100 + torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(12.0).reshape(6, 2)
    sums = NormalEquations(6, 2, constant=False)
    sums.add(x[:400], x[:400] @ weight, held_out=False)
    sums.add(x[400:], x[400:] @ weight, held_out=True)
    fit = sums.solve()
    assert not fit.bias.any()
    torch.testing.assert_close(fit.weight.float(), weight, rtol=0, atol=1e-3)


def test_the_ridge_pulls_to_the_prior_wherever_the_features_lie():
    x = 3 + torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, prior = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.ones(5, 1)
    y = x.sum(1, keepdim=True) + 3 * noise
    sums = NormalEquations(4, 1)
    sums.add(x[:20], y[:20], held_out=False)
    sums.add(x[20:], y[20:], held_out=True)
    fit = sums.solve(prior.double())
    rows = torch.cat([x[:20], torch.ones(20, 1, dtype=torch.float64)], 1)
    pull = torch.full((5,), fit.ridge * x[:20].square().mean().item(), dtype=torch.float64)
    pull[-1] = 0
    left, right = rows.T @ rows / 20 + pull.diag(), rows.T @ y[:20] / 20 + pull[:, None] * prior
    wanted = torch.linalg.solve(left, right)
    assert fit.ridge > 0
    torch.testing.assert_close(torch.cat([fit.weight, fit.bias[None]]), wanted, rtol=0, atol=1e-6)


def test_what_is_made_on_the_way_is_on_the_device_of_the_network_whatever_the_default():
    network, x = images(), torch.rand(60, 1, 8, 8)
    plain = compress(network, [x], remove=2)
    with torch.device("meta"):
        small = compress(network, [x], remove=2)
    assert small.divergence == plain.divergence
