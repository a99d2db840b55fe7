"""Surrogates of detectors."""

import numpy as np
import pytest
import torch

from odenets.detection import Pipeline, distill
from odenets.detection.isolation import seeded
from tests.odenets.detection.victims import detection, digits, features_of, refused, victim


def ring(z):
    """A detector of what is far from (3, -1), in features of unlike size."""
    away = (z[:, 0] - 3) ** 2 + ((z[:, 1] + 100) / 100) ** 2
    return (1 / (1 + np.exp(-8 * (away - 1.5)))).astype(np.float64)


def drawn(n, seed):
    return np.random.default_rng(seed).normal([3, -100], [1, 100], (n, 2))


def agreement(surrogate, score, z):
    """Share of features on which surrogate and detector decide alike."""
    z = torch.as_tensor(z).float()
    return ((surrogate(z) > 0).numpy() == (score(z.numpy()) > 0.5)).mean()


def test_it_learns_the_scores_of_the_detector():
    surrogate = distill(ring, drawn(150, 0), copies=4)
    assert agreement(surrogate, ring, drawn(1000, 1)) > 0.95
    z = torch.from_numpy(drawn(1000, 1)).float()
    errors = (surrogate(z).sigmoid().numpy() - ring(z.numpy())) ** 2
    assert errors.mean() < 0.01


def test_it_learns_a_forest():
    train, test = digits()
    score = lambda z: detection().predict_proba(z)[:, 1]  # noqa: E731
    surrogate = distill(score, features_of(train.x[:300]).numpy(), copies=4, epochs=30)
    assert agreement(surrogate, score, features_of(test.x).numpy()) > 0.75


def test_its_gradient_leads_away_from_detection():
    surrogate = distill(ring, drawn(150, 0), copies=4)
    z = torch.tensor([[5.0, -100.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(surrogate(z).sum(), z)
    assert gradient[0, 0] > 0
    assert all(p.grad is None and not p.requires_grad for p in surrogate.parameters())
    assert surrogate(z - 2 * gradient / gradient.norm()) < surrogate(z)


def test_it_follows_the_seed_and_leaves_the_random_state():
    state = torch.get_rng_state()
    a, b, c = (distill(ring, drawn(50, 0), copies=1, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    z = torch.from_numpy(drawn(20, 1)).float()
    assert torch.equal(a(z), b(z))
    assert not torch.equal(a(z), c(z))


def test_other_devices_are_left_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    distill(ring, drawn(50, 0), copies=1, epochs=1)
    with seeded(1, 2):
        torch.rand(1)
    assert not seeds


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_it_learns_at_any_scale_of_the_features(scale):
    def scaled(z):
        return ring(z / scale)

    surrogate = distill(scaled, scale * drawn(150, 0), copies=4, epochs=30)
    assert agreement(surrogate, scaled, scale * drawn(500, 1)) > 0.9


@pytest.mark.parametrize("value", [7.0, 1e8 + 0.1])  # the mean of the latter differs from it in the last digit
def test_a_constant_feature_has_unit_deviation(value):
    features = np.concatenate([drawn(50, 0), np.full((50, 1), value)], 1)
    surrogate = distill(ring, features, copies=1, epochs=2)
    assert surrogate.std[2] == 1
    assert surrogate(torch.from_numpy(features).float()).isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_fitted_whatever_the_mode_of_the_caller(mode):
    z = torch.from_numpy(drawn(20, 1)).float()
    expected = distill(ring, drawn(50, 0), copies=1, epochs=2)
    with mode():
        surrogate = distill(ring, drawn(50, 0), copies=1, epochs=2)
    assert torch.equal(surrogate(z), expected(z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_takes_features_of_any_precision(dtype):
    surrogate = distill(ring, drawn(50, 0), copies=1, epochs=2)
    z = torch.from_numpy(drawn(20, 1)).to(dtype)
    torch.testing.assert_close(surrogate(z), surrogate(z.float()))


def test_arguments_are_checked():
    ones = np.ones((4, 2))
    refused(r"features must be \(N, F\) with N at least 2, got shape \(4,\)", distill, ring, np.ones(4))
    refused("features must be finite, got NaN or infinity", distill, ring, np.nan * ones)
    refused(r"score must give numbers in \[0, 1\], got \[2, 2\]", distill, lambda z: z[:, 0] * 0 + 2, ones)
    message = r"score must give one number for each of 36 features, got shape \(36, 2\)"
    refused(message, distill, lambda z: z, ones)
    refused("epochs must be at least 1, got 0", distill, ring, ones, epochs=0)
    refused("score must be a function of features .* got Pipeline", distill, Pipeline(victim()), ones, error=TypeError)
    refused(
        r"features must be \(B, 2\), .* got shape \(3, 5\)", distill(ring, drawn(50, 0), epochs=1), torch.rand(3, 5)
    )
    refused("copies must not be negative", distill, ring, ones, copies=-1)
    refused("batch_size must be at least 1", distill, ring, ones, batch_size=0)
    refused("hidden must be at least 1", distill, ring, ones, hidden=0)
    refused("noise must not be negative", distill, ring, ones, noise=-1.0)
    refused("learning_rate positive", distill, ring, ones, learning_rate=0.0)
