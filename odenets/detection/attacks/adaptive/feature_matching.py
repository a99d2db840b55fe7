"""The second adaptive attack [K24, eq. 42]: features that the detector calls clean, then an image that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.detection.attacks.adaptive.evasion import Evasion, Features, Target, checked_pool, judge, starting_points
from odenets.detection.attacks.art import decision_attack
from odenets.detection.attacks.generation import Attacked, with_progress
from odenets.detection.attacks.presets import preset
from odenets.detection.features.base import in_batches
from odenets.detection.isolation import Logits, frozen, seeded
from odenets.errors import check_count
from odenets.modes import device_of

__all__ = ["feature_attack"]


def feature_attack(
    network: nn.Module,
    features: Features,
    detector: Callable[[Tensor], Any],
    start: Attacked,
    images: Tensor,
    *,
    pool: Tensor | None = None,
    weights: Sequence[tuple[float, float]] = ((1.0, 1.0), (10.0, 1.0), (10.0, 10.0)),
    rounds: int = 10,
    steps: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    progress: str | None = None,
    **settings: int,
) -> Evasion:
    """HopSkipJump on the detector in the space of its features, then L-BFGS on the pixels.

    HopSkipJump moves from features ``z*`` that the detector calls clean, those of the nearest such image among the
    clean ones and ``pool``, towards the features ``z~`` of a start image ``x~``. Then, from ``x~``::

        min over x*  -CE(N(x*), y) + c1 |D(x*) - z*| + c2 |x* - x|

    with the network N, its features D, the clean image x and its label y. Distances of features are taken in
    deviations of each feature over all these images, on which HopSkipJump too depends. Pixels are clamped to [0, 1] in
    the objective and after each round. The result is, of all rounds of all pairs (c1, c2), the image nearest to x that
    evades both; the start image if none does.

    Args:
        features: of network and images, ``(B, F)``, differentiable, such as :class:`Trajectory`.
        detector: of features ``(B, F)`` on the CPU alone, 1 or True where detected, ``(B,)``.
        network, start, images, seed, progress, settings: as for :func:`black_box`.
        pool: further clean images, ``(K, C, H, W)`` in [0, 1], from whose features HopSkipJump may begin.
        weights: the pairs (c1, c2).
        rounds, steps: L-BFGS is restarted ``rounds`` times and takes ``steps`` steps each time; the cross-entropy is
            unbounded, so that many short rounds reach nearer images than few long ones.
        batch_size: images or features at a time.

    Returns:
        The final images, in the order of ``start``, and which of them evade network and detector.

    Raises:
        TypeError, ValueError: arguments that are not as described.
        ModuleNotFoundError: ART is not installed: ``pip install 'odenets[detection]'``.

    References:
        [K24, section 5.4.5], second attack. Carlini, Wagner. Adversarial examples are not easily detected: bypassing
        ten detection methods. AISec 2017.
    """
    hop_skip_jump = dict(preset("HSJ", **settings).settings)
    check_count("rounds", rounds, 1)
    check_count("steps", steps, 1)
    if not weights:
        raise ValueError("weights must not be empty")
    with frozen(network) as network:
        target = Target(network, features, detector)
        matching = _FeatureMatching(target, start, images, pool, batch_size)
        final = start.images.clone()
        for i in with_progress(range(len(start)), progress, "image"):
            with seeded(seed, i, device=device_of(network)):
                z = matching.undetected_features(i, hop_skip_jump)
            if z is not None:
                final[i] = matching.nearest_image(i, z, weights, rounds, steps)
        return judge(network, target.detects_images, final, start.labels, matching.images, batch_size)


@dataclass
class _FeatureMatching:
    """Start images and their features in deviations of each feature, in which all distances are taken."""

    target: Target
    start: Attacked
    images: Tensor
    pool: Tensor | None
    batch_size: int

    def __post_init__(self) -> None:
        network = self.target.network
        self.device, self.logits = device_of(network), Logits(network)
        detects = self.target.detects_images
        self.images = starting_points(network, detects, self.start, self.images, self.batch_size)
        clean = self.images if self.pool is None else torch.cat([self.images, checked_pool(self.pool, self.start)])
        z_clean, self.z_start = (
            in_batches(self.target.features_of, network, x, self.batch_size) for x in (clean, self.start.images)
        )
        self.z_undetected = z_clean[~self.target.detects(z_clean)]
        z = torch.cat([z_clean, self.z_start])
        if not z.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity")
        mean, scale = z.double().mean(0), z.double().std(0)
        varies = scale > torch.finfo(torch.float32).eps * mean.abs()  # smaller deviations are rounding
        self.mean, self.scale = mean.float(), torch.where(varies, scale, 1).float()
        standardized = self.standardize(z)
        self.clip = (standardized.min().item(), standardized.max().item())

    def standardize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.scale

    def restore(self, points: np.ndarray) -> Tensor:
        return torch.from_numpy(points) * self.scale + self.mean

    def undetected_features(self, i: int, settings: Mapping[str, Any]) -> Tensor | None:
        """Features near those of start image i that are not detected; None if no clean image is undetected."""
        z = self.z_start[i]
        order = (self.z_undetected - z).div(self.scale).norm(dim=1).argsort()
        first = self.standardize(self.z_undetected[order]).numpy()

        def undetected(points: np.ndarray) -> np.ndarray:
            return ~self.target.detects(self.restore(points)).numpy()

        origin = self.standardize(z).numpy()
        point = decision_attack("HSJ", settings, undetected, origin, first, clip=self.clip, batch_size=self.batch_size)
        return None if point is None else self.restore(point)

    def nearest_image(
        self, i: int, z: Tensor, weights: Sequence[tuple[float, float]], rounds: int, steps: int
    ) -> Tensor:
        """The image nearest to clean image i that evades, on the way to features z; the start image if none does."""
        nearest, distance = self.start.images[i], torch.inf
        for c1, c2 in weights:
            objective = partial(self.objective, i=i, z=z.to(self.device), c1=c1, c2=c2)
            for x in _descend(objective, self.start.images[i].to(self.device), rounds, steps):
                moved = (x.cpu() - self.images[i]).norm().item()
                fools = int(self.logits.predict(x[None])) != int(self.start.labels[i])
                if fools and not self.target.detects_images(x[None]) and moved < distance:
                    nearest, distance = x.cpu(), moved
        return nearest

    def objective(self, x: Tensor, i: int, z: Tensor, c1: float, c2: float) -> Tensor:
        label = self.start.labels[i : i + 1].to(self.device)
        apart = ((self.target.features_of(x)[0] - z) / self.scale.to(self.device)).norm()
        moved = (x[0] - self.images[i].to(self.device)).norm()
        return -F.cross_entropy(self.logits(x), label) + c1 * apart + c2 * moved


def _descend(objective: Callable[[Tensor], Tensor], x: Tensor, rounds: int, steps: int) -> Iterator[Tensor]:
    """The image ``(C, H, W)`` after each round of L-BFGS, in [0, 1], until the objective is not finite."""
    x = x[None].clone().requires_grad_()
    for _ in range(rounds):
        optimizer = torch.optim.LBFGS([x], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            loss = objective(x.clamp(0, 1))
            (x.grad,) = torch.autograd.grad(loss, x)  # of x alone: the features may come from other networks
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            x.clamp_(0, 1)
        if not x.isfinite().all():
            return
        yield x.detach()[0].clone()
