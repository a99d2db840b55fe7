"""Noisy steps are those of Euler and Maruyama, and their mean solves the equation of Feynman and Kac."""

import math

import pytest
import torch

import odenets
from odenets.schemes import Noisy, mean_over_paths


class Pull(torch.nn.Module):
    """``v = -x``: with noise, the process of Ornstein and Uhlenbeck."""

    def forward(self, t, x):
        return -x


def test_steps_are_euler_and_maruyamas():
    flow = odenets.Flow(Pull(), solver=Noisy(0.5), depth=1, h=0.25)
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(0)
    got = flow(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, x - 0.25 * x + 0.5 * math.sqrt(0.25) * torch.randn_like(x))


def test_the_mean_over_paths_is_the_closed_form():
    """Of ``f(x) = x^2``: the mean of n steps is ``((1 - h)^n x)^2 + sigma^2 h sum_k (1 - h)^(2k)``."""
    n, h, sigma, x = 10, 0.1, 0.7, torch.tensor([[1.5]], dtype=torch.float64)
    flow = odenets.Flow(Pull(), solver=Noisy(sigma), depth=n, h=h, shared=True)
    got = mean_over_paths(flow, x.expand(20000, 1), paths=1, function=torch.square)
    wanted = ((1 - h) ** n * x) ** 2 + sigma**2 * h * sum((1 - h) ** (2 * k) for k in range(n))
    assert abs(got.mean() - wanted.item()) < 5 * got.std() / math.sqrt(20000)


def test_an_ensemble_is_the_mean_of_its_networks():
    networks = [odenets.models.points_network(depth=2, solver=Noisy(0.0)) for _ in range(3)]
    x = torch.randn(5, 2)
    wanted = sum(network(x).softmax(1) for network in networks) / 3
    torch.testing.assert_close(mean_over_paths(networks, x, paths=2), wanted)


@pytest.mark.parametrize(("sigma", "error"), [(-1.0, ValueError), (float("inf"), ValueError), ("a", TypeError)])
def test_a_bad_sigma_is_refused(sigma, error):
    with pytest.raises(error, match="sigma must be"):
        Noisy(sigma)


def test_no_networks_are_refused():
    with pytest.raises(ValueError, match="network must be one, or several, got none"):
        mean_over_paths([], torch.randn(1, 2), paths=1)
