"""What an attack on network and detector starts from, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odenets.detection.attacks.generation import Attacked
from odenets.detection.features.trajectory import check_images, in_batches
from odenets.detection.isolation import Logits

__all__ = ["Evasion", "detected_by", "judge", "matching", "starting_points"]


@dataclass(frozen=True, slots=True)
class Evasion:
    """Images that were to fool a network and its detector, on the CPU.

    Attributes:
        images: final ones, ``(N, C, H, W)`` float32; the start where nothing better was found.
        wrong: whether the network still misclassifies them, ``(N,)`` bool.
        detected: whether the detector tells them, ``(N,)`` bool.
        l2: norm of what separates them from the clean images, ``(N,)`` float32.
    """

    images: Tensor
    wrong: Tensor
    detected: Tensor
    l2: Tensor

    @property
    def evaded(self) -> Tensor:
        """Misclassified and not detected, ``(N,)`` bool."""
        return self.wrong & ~self.detected

    @property
    def share(self) -> float:
        """Share of the detected successful images that were turned into undetected successful ones."""
        return self.evaded.double().mean().item()


def starting_points(
    network: nn.Module, detector: Callable[[Tensor], Any], start: Attacked, images: Tensor, batch_size: int
) -> Tensor:
    """The clean images, once they and the start images have been looked at.

    Args:
        network: attacked.
        detector: of images ``(B, C, H, W)``.
        start: detected successful adversarial images.
        images: the clean ones, in the same order.
        batch_size: images at a time.

    Raises:
        TypeError, ValueError: clean images outside [0, 1] or not as many as start images, or start images that do not
            fool the network or are not detected.
    """
    images = check_images(images).detach().float().cpu()
    if images.shape != start.images.shape:
        raise ValueError(
            f"images must be the clean ones of start, {tuple(start.images.shape)}, got shape {tuple(images.shape)}"
        )
    if not start.success.all():
        raise ValueError(
            f"start must hold successful adversarial images, got {int((~start.success).sum())} others: "
            "start.subset(start.success), and the clean images likewise"
        )
    found = judge(network, detector, start.images, start.labels, images, batch_size)
    if not found.wrong.all():
        raise ValueError(
            f"start must hold images that fool this network, got {int((~found.wrong).sum())} that it has right"
        )
    if found.evaded.any():
        raise ValueError(
            f"start must hold detected images, got {int(found.evaded.sum())} that the detector does not tell"
        )
    return images


def judge(
    network: nn.Module,
    detector: Callable[[Tensor], Any],
    final: Tensor,
    labels: Tensor,
    clean: Tensor,
    batch_size: int,
) -> Evasion:
    """What network and detector say of the final images."""
    predicted = in_batches(Logits(network).predict, network, final, batch_size)
    detected = in_batches(lambda x: detected_by(detector, x), network, final, batch_size)
    return Evasion(final, predicted != labels, detected, (final - clean).flatten(1).norm(dim=1))


def matching(pool: Tensor, start: Attacked) -> Tensor:
    """Further images, float32 on the CPU.

    Raises:
        TypeError, ValueError: they are outside [0, 1] or not of the shape of the start images.
    """
    pool = check_images(pool, "pool").detach().float().cpu()
    if pool.shape[1:] != start.images.shape[1:]:
        raise ValueError(f"pool must hold images {tuple(start.images.shape[1:])}, got shape {tuple(pool.shape)}")
    return pool


def detected_by(detector: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """What a detector says of a batch, ``(B,)`` bool.

    Raises:
        ValueError: it does not say one 0 or 1 of each.
    """
    with torch.no_grad():
        said = torch.as_tensor(detector(x))
    if said.shape != (len(x),) or not ((said == 0) | (said == 1)).all():
        raise ValueError(
            f"detector must say 0 or 1 of each of {len(x)} samples, got shape {tuple(said.shape)}"
            + (f" and values such as {said.flatten()[0].item()}" if said.numel() else "")
        )
    return said.bool()
