"""A differentiable surrogate of a detector that has no gradient, fitted to the detector's scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.errors import check_count

__all__ = ["Score", "Surrogate", "distill", "scores_of"]

Score = Callable[[np.ndarray], np.ndarray]
"""A detector: of features ``(N, F)`` scores in [0, 1], ``(N,)``, high for adversarial ones."""


class Surrogate(nn.Module):
    """A multilayer perceptron on standardized features, whose logit approximates that of a detector's score.

    :func:`distill` makes and fits one.

    Args:
        mean, std: of the features, ``(F,)``; a std of 0 counts as 1.
        hidden: width of its two hidden layers.

    >>> Surrogate(torch.zeros(4), torch.ones(4))(torch.rand(5, 4)).shape
    torch.Size([5])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.where(std > 0, std, 1).float())
        self.layers = nn.Sequential(
            nn.Linear(len(mean), hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        ).float()

    def forward(self, z: Tensor) -> Tensor:
        """Logits of features ``z`` ``(B, F)``, ``(B,)``; their sigmoid is the score.

        Raises:
            ValueError: another number of features.
        """
        if z.ndim != 2 or z.shape[1] != len(self.mean):
            rule = f"features must be (B, {len(self.mean)}), as those that the surrogate was fitted to"
            raise ValueError(f"{rule}, got shape {tuple(z.shape)}")
        return self.layers(((z - self.mean) / self.std).to(self.mean.dtype))[:, 0]


def distill(
    score: Score,
    features: np.ndarray,
    *,
    copies: int = 8,
    noise: float = 0.5,
    hidden: int = 64,
    epochs: int = 60,
    learning_rate: float = 3e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> Surrogate:
    """Fit a surrogate to the scores of a detector.

    It is trained by cross-entropy with the scores, on the features and on synthetic ones, at which a forest has scores
    too: half of them are features with Gaussian noise, half lie between two features. The size of the noise is drawn
    from [0, ``noise``], so that both the neighborhood of the data and the space around it are covered.

    Args:
        score: the detector: of features ``(N, F)`` scores in [0, 1], ``(N,)``, high for adversarial ones.
        features: of clean and of adversarial images, ``(N, F)``.
        copies: synthetic features per feature.
        noise: largest deviation of the noise, in deviations of each feature.
        hidden: width of the surrogate.
        epochs, learning_rate, batch_size: of Adam, whose rate falls to 0 along a cosine.
        seed: of draws and initial weights; the random state is restored.

    Returns:
        The surrogate, in eval mode and on the CPU, its weights without gradients.

    Raises:
        TypeError: a score that is no function.
        ValueError: numbers out of range, fewer than two features, features or scores that are not finite, or scores
            outside [0, 1].

    References:
        Papernot, McDaniel, Goodfellow, Jha, Celik, Swami. Practical black-box attacks against machine learning.
        AsiaCCS 2017.
    """
    for name, value, least in (
        ("copies", copies, 0), ("hidden", hidden, 1), ("epochs", epochs, 1), ("batch_size", batch_size, 1),
    ):  # fmt: skip
        check_count(name, value, least)
    if not (noise >= 0 and learning_rate > 0):
        raise ValueError(f"noise must not be negative and learning_rate positive, got {noise} and {learning_rate}")
    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, F) with N at least 2, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity")
    draws = np.random.default_rng(seed)
    synthetic = [_synthetic(features, noise, draws) for _ in range(copies)]
    z = torch.from_numpy(np.concatenate([features, *synthetic]))
    target = torch.from_numpy(scores_of(score, z.numpy()))
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = (torch.from_numpy(each) for each in _moments(features))
        surrogate = Surrogate(mean, std, hidden)
        optimizer = torch.optim.Adam(surrogate.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for index in torch.randperm(len(z)).split(batch_size):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(surrogate(z[index]), target[index]).backward()
                optimizer.step()
            schedule.step()
    surrogate.zero_grad()
    return surrogate.eval().requires_grad_(False)


def scores_of(score: Score, features: np.ndarray) -> np.ndarray:
    """A detector's scores of features ``(N, F)``, ``(N,)`` float32, if they are numbers in [0, 1]."""
    if not callable(score):
        remedy = "lambda z: pipeline.detector.predict_proba(z)[:, 1]"
        raise TypeError(f"score must be a function of features (N, F), such as {remedy}, got {type(score).__name__}")
    scores = np.asarray(score(features), dtype=np.float32)
    if scores.shape != (len(features),):
        raise ValueError(f"score must give one number for each of {len(features)} features, got shape {scores.shape}")
    if not (np.isfinite(scores) & (scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"score must give numbers in [0, 1], got [{scores.min():.3g}, {scores.max():.3g}]")
    return scores


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, ``(F,)`` float64; a deviation that is rounding counts as 0."""
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    return mean, np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, 0)


def _synthetic(features: np.ndarray, noise: float, draws: np.random.Generator) -> np.ndarray:
    """As many features, half of them noisy ones and half between two."""
    size = (len(features), 1)
    noisy = features + draws.uniform(0, noise, size) * _moments(features)[1] * draws.standard_normal(features.shape)
    between = features + draws.uniform(0, 1, size) * (features[draws.permutation(len(features))] - features)
    return np.where(draws.uniform(size=size) < 0.5, noisy, between).astype(np.float32)
