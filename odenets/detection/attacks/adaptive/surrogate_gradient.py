"""A stronger adaptive attack than those of [K24]: gradients through the network and a surrogate of the detector."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odenets.detection.attacks.adaptive.evasion import Evasion, Features, Target, judge, starting_points
from odenets.detection.attacks.adaptive.surrogate import Score, Surrogate, scores_of
from odenets.detection.attacks.generation import Attacked, with_progress
from odenets.detection.isolation import Logits, frozen
from odenets.errors import check_count, check_number
from odenets.modes import device_of

__all__ = ["ProjectedDescent", "surrogate_attack"]


@dataclass(frozen=True, kw_only=True)
class ProjectedDescent:
    """Projected gradient descent in a ball about the clean image, as :func:`surrogate_attack` makes it.

    >>> descent, clean = ProjectedDescent(eps=0.1, steps=10), torch.full((1, 1, 8, 8), 0.5)
    >>> descent.step(clean, gradient=-torch.ones_like(clean), clean=clean).max()  # by 2.5 eps / steps
    tensor(0.5250)

    Attributes:
        eps: radius of the ball, in units of pixels in [0, 1].
        norm: "inf" or 2, of the ball and of the steps.
        steps: for each weight.
        step_size: 2.5 eps / steps if None, in the units of ``eps``.
        weights: of the surrogate, one descent for each.
        confidence: margin of logits beyond which the network counts as fooled and only the detector matters.

    Raises:
        ValueError: numbers out of range.
    """

    eps: float = 0.03
    norm: str | int = "inf"
    steps: int = 100
    step_size: float | None = None
    weights: Sequence[float] = (0.1, 1.0, 10.0)
    confidence: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("inf", 2):
            raise ValueError(f"norm must be 'inf' or 2, got {self.norm!r}")
        check_count("steps", self.steps, 1)
        if not self.eps > 0 or not self.weights:
            raise ValueError(f"eps must be positive and weights not empty, got {self.eps} and {self.weights}")
        if self.norm == "inf" and self.eps > 1:
            raise ValueError(f"eps must be at most 1, in units of pixels in [0, 1], got {self.eps}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")

    def step(self, x: Tensor, gradient: Tensor, clean: Tensor) -> Tensor:
        """One step of steepest descent in the norm from images ``x`` ``(B, C, H, W)``, projected.

        ``gradient`` is of what is to fall, by ``x``; the ball is about the ``clean`` images.
        """
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        if self.norm == "inf":
            direction = gradient.sign()
        else:
            direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        return self.project(x - size * direction, clean)

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        """Images ``x`` ``(B, C, H, W)`` moved into the ball about the ``clean`` ones and into [0, 1]."""
        moved = x - clean
        if self.norm == "inf":
            moved = moved.clamp(-self.eps, self.eps)
        else:
            moved = moved * (self.eps / moved.flatten(1).norm(dim=1).clamp(min=self.eps))[:, None, None, None]
        return (clean + moved).clamp(0, 1)


def surrogate_attack(
    network: nn.Module,
    features: Features,
    score: Score,
    surrogate: Surrogate,
    start: Attacked,
    images: Tensor,
    *,
    descent: ProjectedDescent | None = None,
    threshold: float = 0.5,
    batch_size: int = 128,
    progress: str | None = None,
) -> Evasion:
    """Projected gradient descent end to end on both, in a ball about the clean image.

    With the logits N, the label y, the features D and the surrogate's logit s, it descends::

        max(N_y - max over j != y of N_j, -confidence) + weight * s(D(x*))

    from the start image, projected into the ball, for each of the weights. Every iterate is checked by the real
    detector; the result is, of those that evade it and fool the network, the nearest to the clean image in L2. If there
    is none, it is the start image, which may lie outside the ball.

    Args:
        features: of network and images, ``(B, F)``, differentiable, such as :class:`Trajectory`.
        score: the detector: of features ``(N, F)`` as an array, scores in [0, 1], ``(N,)``.
        surrogate: of the detector, from :func:`distill`.
        network, start, images, progress: as for :func:`black_box`.
        descent: ball, steps and weights; ``ProjectedDescent()`` if not given.
        threshold: score above which the detector detects.
        batch_size: images at a time.

    Returns:
        The final images, in the order of ``start``, and which of them evade network and detector.

    Raises:
        TypeError, ValueError: arguments that are not as described.

    References:
        [K24, section 5.4.5] on the choice of a differentiable term for the detector. Tramer, Carlini, Brendel, Madry.
        On adaptive attacks to adversarial example defenses. NeurIPS 2020.
    """
    descent = ProjectedDescent() if descent is None else descent
    if not isinstance(descent, ProjectedDescent):
        raise TypeError(f"descent must be a ProjectedDescent, got {type(descent).__name__}: ProjectedDescent(eps=0.03)")
    if not isinstance(surrogate, nn.Module):
        raise TypeError(f"surrogate must be a Surrogate, as distill makes it, got {type(surrogate).__name__}")
    if not 0 <= check_number("threshold", threshold) < 1:
        raise ValueError(f"threshold must lie in [0, 1), as scores do, got {threshold}")
    check_count("batch_size", batch_size, 1)

    def detector(z: Tensor) -> Tensor:
        return torch.from_numpy(scores_of(score, z.numpy()) > threshold)

    with frozen(network) as network:
        target, device = Target(network, features, detector), device_of(network)
        images = starting_points(network, target.detects_images, start, images, batch_size)
        frozen_surrogate = copy.deepcopy(surrogate).to(device).eval().requires_grad_(False)
        final = start.images.clone()
        for index in with_progress(torch.arange(len(start)).split(batch_size), progress, "batch"):
            batch = (part[index].to(device) for part in (start.images, images, start.labels))
            final[index] = _descend(target, frozen_surrogate, descent, *batch).cpu()
        return judge(network, target.detects_images, final, start.labels, images, batch_size)


def _descend(
    target: Target, surrogate: Surrogate, descent: ProjectedDescent, start: Tensor, clean: Tensor, y: Tensor
) -> Tensor:
    """For each image the nearest to the clean one that evades, of all iterates; the start image if none does."""
    logits_of = Logits(target.network)
    best, nearest = start, torch.full((len(start),), torch.inf, device=start.device)
    for weight in descent.weights:
        x = descent.project(start, clean)
        for _ in range(descent.steps + 1):
            x.requires_grad_()
            logits, z = logits_of(x), target.features_of(x)
            with torch.no_grad():
                distance = (x - clean).flatten(1).norm(dim=1)
                evades = (logits.argmax(1) != y) & ~target.detects(z).to(x.device) & (distance < nearest)
                nearest = torch.where(evades, distance, nearest)
                best = torch.where(evades[:, None, None, None], x, best)
            others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
            margin = logits.gather(1, y[:, None])[:, 0] - others
            told = surrogate(z)
            if told.shape != (len(z),):
                raise ValueError(
                    f"surrogate must return logits (B,), got shape {tuple(told.shape)} for {len(z)} images"
                )
            loss = margin.clamp(min=-descent.confidence) + weight * told
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            if not gradient.isfinite().all():
                raise ValueError("features and network must have finite gradients, got NaN or infinity")
            x = descent.step(x.detach(), gradient, clean)
    return best
