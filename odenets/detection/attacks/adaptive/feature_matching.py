"""The second adaptive attack (eq. 42): features that the detector calls clean, then an image that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from odenets.detection.attacks.adaptive.evasion import Evasion, detected_by, judge, matching, starting_points
from odenets.detection.attacks.art import decision_attack
from odenets.detection.attacks.generation import Attacked
from odenets.detection.attacks.presets import checked, preset
from odenets.detection.features.trajectory import in_batches
from odenets.detection.isolation import Logits, frozen, in_float32, seeded
from odenets.modes import device_of

__all__ = ["feature_attack"]

FeaturesOf = Callable[[Any, Tensor], Tensor]


def feature_attack(
    network: nn.Module,
    features: FeaturesOf,
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

    From the features z~ of a start image x~, HopSkipJump asks the detector its way to near features z* that it calls
    clean, beginning at those of a clean image or of one of ``pool``, the nearest that it calls clean. Then

        min over x*  -CE(N(x*), y) + c1 |D(x*) - z*| + c2 |x* - x|

    from x~, with the network N, its features D, the clean image x and its label y. Distances of features are taken in
    deviations of each feature over all these images, on which HopSkipJump too depends. Pixels are clamped to
    [0, 1] in the objective and after each round. Kept is, of all rounds of all pairs (c1, c2), the image that fools
    both and is nearest to x; where there is none, the start image.

    Args:
        network: from pixels in [0, 1] to logits.
        features: of network and images, ``(B, F)``, differentiable.
        detector: of features ``(B, F)`` on the CPU and of nothing else, 1 or True where detected, ``(B,)``.
        start: successful adversarial images that are detected.
        images: the clean images of these, ``(N, C, H, W)``.
        pool: further clean images, ``(K, C, H, W)`` in [0, 1], from whose features HopSkipJump may begin.
        weights: the pairs (c1, c2).
        rounds, steps: L-BFGS is begun anew ``rounds`` times and takes ``steps`` steps each time; the cross-entropy
            knows no bound, so that many short rounds find nearer images than few long ones.
        seed: of HopSkipJump; image i draws from ``(seed, i)``.
        batch_size: images or features at a time.
        progress: label of a progress bar over images; none without it.
        settings: of HopSkipJump, as for :func:`~odenets.detection.attacks.adaptive.black_box`.

    Raises:
        TypeError, ValueError: arguments that are not as described.
        ModuleNotFoundError: ART is not installed.

    References:
        Section 5.4.5, second attack. Carlini, Wagner. Adversarial examples are not easily detected: bypassing ten
        detection methods. AISec 2017.
    """
    chosen = dict(checked(preset("HSJ", **settings)).settings)
    if rounds < 1 or steps < 1 or not weights:
        raise ValueError(f"rounds and steps must be at least 1 and weights not empty, got {rounds}, {steps}, {weights}")

    def features_of(x: Tensor) -> Tensor:
        return in_float32(network, lambda x: features(network, x), x).float()

    def of_images(x: Tensor) -> Tensor:
        return detected_by(detector, features_of(x).detach().cpu())

    def objective(x: Tensor, i: int, z: Tensor, c1: float, c2: float) -> Tensor:
        label = start.labels[i : i + 1].to(device)
        apart = ((features_of(x)[0] - z) / scale).norm()
        moved = (x[0] - images[i].to(device)).norm()
        return -F.cross_entropy(logits(x), label) + c1 * apart + c2 * moved

    device = device_of(network)
    with frozen(network) as network:
        logits = Logits(network)
        images = starting_points(network, of_images, start, images, batch_size)
        clean = images if pool is None else torch.cat([images, matching(pool, start)])
        z_clean, z_start = (in_batches(features_of, network, x, batch_size) for x in (clean, start.images))
        silent = z_clean[~detected_by(detector, z_clean)]
        z_both = torch.cat([z_clean, z_start])
        if not z_both.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity")
        mean, scale = z_both.double().mean(0), z_both.double().std(0)
        varies = scale > torch.finfo(torch.float32).eps * mean.abs()  # what does not is rounding
        ask = _Standardized(detector, mean.float(), torch.where(varies, scale, 1).float())
        clip = (ask.standardize(z_both).min().item(), ask.standardize(z_both).max().item())
        scale = ask.scale.to(device)
        final = start.images.clone()
        for i in tqdm(range(len(start)), desc=progress, disable=progress is None, unit="image", leave=False):
            origin = ask.standardize(z_start[i]).numpy()
            first = ask.standardize(silent[(silent - z_start[i]).div(ask.scale).norm(dim=1).argsort()]).numpy()
            with seeded(seed, i, device=device_of(network)):
                found = decision_attack("HSJ", chosen, ask.undetected, origin, first, clip=clip, batch_size=batch_size)
            if found is None:
                continue
            z = ask.restore(torch.from_numpy(found)).to(device)
            nearest = torch.inf
            for c1, c2 in weights:
                for x in _descend(
                    partial(objective, i=i, z=z, c1=c1, c2=c2), start.images[i].to(device), rounds, steps
                ):
                    distance = (x.cpu() - images[i]).norm().item()
                    fools = int(logits.predict(x[None])) != int(start.labels[i]) and not of_images(x[None])
                    if fools and distance < nearest:
                        final[i], nearest = x.cpu(), distance
        return judge(network, of_images, final, start.labels, images, batch_size)


@dataclass(frozen=True, slots=True)
class _Standardized:
    """A detector asked in deviations of each feature."""

    detector: Callable[[Tensor], Any]
    mean: Tensor
    scale: Tensor

    def standardize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.scale

    def restore(self, points: Tensor) -> Tensor:
        return points * self.scale + self.mean

    def undetected(self, points: np.ndarray) -> np.ndarray:
        return ~detected_by(self.detector, self.restore(torch.from_numpy(points))).numpy()


def _descend(objective: Callable[[Tensor], Tensor], x: Tensor, rounds: int, steps: int) -> Iterator[Tensor]:
    """The image ``(C, H, W)`` after each round of L-BFGS, in [0, 1]; it ends where the objective is not finite."""
    x = x[None].clone().requires_grad_()
    for _ in range(rounds):
        optimizer = torch.optim.LBFGS([x], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            loss = objective(x.clamp(0, 1))
            (x.grad,) = torch.autograd.grad(loss, x)  # of nothing else: the features may come from other networks
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            x.clamp_(0, 1)
        if not x.isfinite().all():
            return
        yield x.detach()[0].clone()
