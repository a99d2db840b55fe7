"""A stronger adaptive attack than the thesis tried: gradients through the network and a surrogate of the detector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from odenets.detection.attacks.adaptive.evasion import Evasion, judge, starting_points
from odenets.detection.attacks.adaptive.surrogate import Score, Surrogate, scores_of
from odenets.detection.attacks.generation import Attacked
from odenets.detection.isolation import Logits, frozen, in_float32
from odenets.modes import device_of

__all__ = ["surrogate_attack"]


def surrogate_attack(
    network: nn.Module,
    features: Callable[[Any, Tensor], Tensor],
    score: Score,
    surrogate: Surrogate,
    start: Attacked,
    images: Tensor,
    *,
    eps: float = 0.03,
    norm: str | int = "inf",
    steps: int = 100,
    step_size: float | None = None,
    weights: Sequence[float] = (0.1, 1.0, 10.0),
    confidence: float = 1.0,
    threshold: float = 0.5,
    batch_size: int = 128,
    progress: str | None = None,
) -> Evasion:
    """Projected gradient descent end to end on both, in a ball about the clean image.

    With the logits N, the label y, the features D and the surrogate's logit s, it descends

        max(N_y - max over j != y of N_j, -confidence) + weight * s(D(x*))

    from the start image, brought into the ball, for each of the weights. The real detector is asked of every iterate,
    and of those that fool it and the network the nearest to the clean image in L2 is kept; where there is none, the
    start image, which may lie outside the ball.

    Args:
        network: from pixels in [0, 1] to logits.
        features: of network and images, ``(B, F)``, differentiable.
        score: the detector: of features ``(N, F)`` as an array, scores in [0, 1].
        surrogate: of the detector, from :func:`~odenets.detection.attacks.adaptive.surrogate.distill`.
        start: successful adversarial images that are detected.
        images: the clean images of these, ``(N, C, H, W)``.
        eps: radius of the ball.
        norm: "inf" or 2, of the ball and of the steps.
        steps: for each weight.
        step_size: 2.5 eps / steps if not given.
        weights: of the surrogate.
        confidence: margin of logits beyond which the network counts as fooled and only the detector matters.
        threshold: score above which the detector detects.
        batch_size: images at a time.
        progress: label of a progress bar over batches; none without it.

    Raises:
        TypeError, ValueError: arguments that are not as described.

    References:
        Section 5.4.5 on the choice of a differentiable term for the detector. Tramer, Carlini, Brendel, Madry. On
        adaptive attacks to adversarial example defenses. NeurIPS 2020.
    """
    if norm not in ("inf", 2):
        raise ValueError(f"norm must be 'inf' or 2, got {norm!r}")
    if not eps > 0 or steps < 1 or not weights:
        raise ValueError(f"eps must be positive, steps at least 1 and weights not empty, got {eps}, {steps}, {weights}")
    if norm == "inf" and eps > 1:
        raise ValueError(f"eps must be at most 1, in units of pixels in [0, 1], got {eps}")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    stride = 2.5 * eps / steps if step_size is None else step_size

    def detects(z: Tensor) -> Tensor:
        return torch.from_numpy(scores_of(score, z.detach().cpu().numpy()) > threshold)

    def features_of(x: Tensor) -> Tensor:
        return in_float32(network, lambda x: features(network, x), x).float()

    def of_images(x: Tensor) -> Tensor:
        return detects(features_of(x))

    device = device_of(network)
    with frozen(network) as network:
        logits_of = Logits(network)
        stand_in = copy.deepcopy(surrogate).to(device).eval().requires_grad_(False)
        images = starting_points(network, of_images, start, images, batch_size)
        final = start.images.clone()
        parts = torch.arange(len(start)).split(batch_size)
        for index in tqdm(parts, desc=progress, disable=progress is None, unit="batch", leave=False):
            clean, y = images[index].to(device), start.labels[index].to(device)
            nearest = torch.full((len(index),), torch.inf, device=device)
            best = start.images[index].to(device)
            for weight in weights:
                x = _project(start.images[index].to(device), clean, eps, norm)
                for _ in range(steps + 1):
                    x.requires_grad_()
                    logits, z = logits_of(x), features_of(x)
                    with torch.no_grad():
                        distance = (x - clean).flatten(1).norm(dim=1)
                        fools = (logits.argmax(1) != y) & ~detects(z).to(device) & (distance < nearest)
                        nearest = torch.where(fools, distance, nearest)
                        best = torch.where(fools[:, None, None, None], x, best)
                    margin = logits.gather(1, y[:, None])[:, 0] - _without(logits, y).amax(1)
                    loss = margin.clamp(min=-confidence) + weight * stand_in(z)
                    (gradient,) = torch.autograd.grad(loss.sum(), x)
                    if not gradient.isfinite().all():
                        raise ValueError("features and network must have finite gradients, got NaN or infinity")
                    x = _project(x.detach() - stride * _direction(gradient, norm), clean, eps, norm)
            final[index] = best.cpu()
        return judge(network, of_images, final, start.labels, images, batch_size)


def _without(logits: Tensor, y: Tensor) -> Tensor:
    """Logits with those of the labels at minus infinity."""
    return logits.scatter(1, y[:, None], -torch.inf)


def _direction(gradient: Tensor, norm: str | int) -> Tensor:
    """Of steepest ascent in the norm."""
    if norm == "inf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]


def _project(x: Tensor, clean: Tensor, eps: float, norm: str | int) -> Tensor:
    """Into the ball about the clean images and into [0, 1], which contains them."""
    moved = x - clean
    if norm == "inf":
        moved = moved.clamp(-eps, eps)
    else:
        moved = moved * (eps / moved.flatten(1).norm(dim=1).clamp(min=eps))[:, None, None, None]
    return (clean + moved).clamp(0, 1)
