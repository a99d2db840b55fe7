"""Start and result of an attack on a network and its detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odenets.detection.attacks.generation import Attacked
from odenets.detection.features.base import check_images, in_batches
from odenets.detection.isolation import Logits, in_float32
from odenets.printing import shown

__all__ = ["Evasion", "Features", "Target", "checked_pool", "detected_by", "judge", "starting_points"]

TO_8_BITS = 1 / 255
"""What attacked images may have moved beyond what their attack says, where they were rounded afterwards."""

Features = Callable[[Any, Tensor], Tensor]
"""Of a network and images ``(B, C, H, W)``, ``(B, F)``: such as :class:`odenets.detection.Features`."""


@dataclass(frozen=True, slots=True)
class Evasion:
    """Result of an attack on a network and its detector, on the CPU; :func:`black_box` and the others make it.

    Attributes:
        images: ``(N, C, H, W)`` float32; the start image where no image evades.
        wrong: whether the network misclassifies them, ``(N,)`` bool.
        detected: whether the detector detects them, ``(N,)`` bool.
        l2: norm of their difference from the clean images, ``(N,)`` float32.
    """

    images: Tensor
    wrong: Tensor
    detected: Tensor
    l2: Tensor

    __repr__ = shown

    @property
    def evaded(self) -> Tensor:
        """Misclassified and not detected, ``(N,)`` bool."""
        return self.wrong & ~self.detected

    @property
    def share(self) -> float:
        """Share of the start images that evade."""
        return self.evaded.double().mean().item()


@dataclass(frozen=True, slots=True)
class Target:
    """A network, features of its inputs and a detector of features ``(B, F)`` on the CPU."""

    network: nn.Module
    features: Features
    detector: Callable[[Tensor], Any]

    def __post_init__(self) -> None:
        if isinstance(self.features, type):
            raise TypeError(f"features must be an instance, got the class {self.features.__name__}: call it")
        if not callable(self.features):
            kind = type(self.features).__name__
            raise TypeError(f"features must be a function of network and images, such as Trajectory(), got {kind}")

    def features_of(self, x: Tensor) -> Tensor:
        """Features of a batch of images, ``(B, F)`` float32."""
        return in_float32(self.network, lambda x: self.features(self.network, x), x).float()

    def detects(self, z: Tensor) -> Tensor:
        """Whether features are detected, ``(B,)`` bool on the CPU."""
        return detected_by(self.detector, z.detach().cpu())

    def detects_images(self, x: Tensor) -> Tensor:
        """Whether images are detected, ``(B,)`` bool on the CPU."""
        return self.detects(self.features_of(x))


def starting_points(
    network: nn.Module, detector: Callable[[Tensor], Any], start: Attacked, images: Tensor, batch_size: int
) -> Tensor:
    """The clean images, float32 on the CPU, if an attack can begin at the start images.

    Raises:
        TypeError, ValueError: a start that is no :class:`Attacked`, clean images outside [0, 1] or others than those of
            the start images, or start images that do not fool the network or are not detected.
    """
    if not isinstance(start, Attacked):
        raise TypeError(f"start must be Attacked, as run_attack returns them, got {type(start).__name__}")
    if not len(start):
        raise ValueError("start must hold successful adversarial images that are detected, got none")
    images = check_images(images).detach().float().cpu()
    if images.shape != start.images.shape:
        shape, other = tuple(start.images.shape), tuple(images.shape)
        raise ValueError(f"images must be the clean ones of start, {shape}, got shape {other}")
    moved = (start.images - images).flatten(1).abs().amax(1)
    if far := int((moved > start.linf + TO_8_BITS).sum()):
        rule = "images must be the clean ones of start, in its order"
        raise ValueError(f"{rule}, got {far} of {len(start)} farther from theirs than the attack went: clean[index]")
    if others := int((~start.success).sum()):
        remedy = "start.subset(start.success), and the clean images likewise"
        raise ValueError(f"start must hold successful adversarial images, got {others} others: {remedy}")
    before = judge(network, detector, start.images, start.labels, images, batch_size)
    if right := int((~before.wrong).sum()):
        raise ValueError(f"start must hold images that fool this network, got {right} that it has right")
    if evading := int(before.evaded.sum()):
        remedy = "start.subset(detected), and the clean images likewise"
        raise ValueError(f"start must hold detected images, got {evading} that the detector does not tell: {remedy}")
    return images


def judge(
    network: nn.Module, detector: Callable[[Tensor], Any], final: Tensor, labels: Tensor, clean: Tensor, batch_size: int
) -> Evasion:
    """The verdict of network and detector on the final images."""
    predicted = in_batches(Logits(network).predict, network, final, batch_size)
    detected = in_batches(lambda x: detected_by(detector, x), network, final, batch_size)
    return Evasion(final, predicted != labels, detected, (final - clean).flatten(1).norm(dim=1))


def checked_pool(pool: Tensor, start: Attacked) -> Tensor:
    """Further images, float32 on the CPU, if they are in [0, 1] and of the shape of the start images."""
    pool = check_images(pool, "pool").detach().float().cpu()
    if pool.shape[1:] != start.images.shape[1:]:
        raise ValueError(f"pool must hold images {tuple(start.images.shape[1:])}, got shape {tuple(pool.shape)}")
    return pool


def detected_by(detector: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The answer of a detector for a batch, ``(B,)`` bool, if it is one 0 or 1 for each."""
    if not callable(detector):
        raise TypeError(f"detector must be a function, such as pipeline.predict, got a {type(detector).__name__}")
    with torch.no_grad():
        answer = torch.as_tensor(detector(x))
    if answer.shape != (len(x),) or not ((answer == 0) | (answer == 1)).all():
        values = f" and values such as {answer.flatten()[0].item()}" if answer.numel() else ""
        got = f"shape {tuple(answer.shape)}{values}"
        raise ValueError(f"detector must say 0 or 1 of each of {len(x)} samples, got {got}")
    return answer.bool()
