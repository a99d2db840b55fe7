"""Adversarial images of a network, made once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from odenets.checkpoints import fingerprint
from odenets.detection.caching import BatchFolder, key_of
from odenets.detection.features import check_images
from odenets.detection.isolation import device_of, frozen, seeded
from odenets.detection.presets import PRESETS, Attack, checked, preset
from odenets.detection.toolbox import CLASSES, DECISION_BASED, decision_attack, gradient_attack, toolbox

__all__ = ["PRESETS", "Attack", "Attacked", "attack", "check_labels", "preset"]


@dataclass(frozen=True, slots=True)
class Attacked:
    """Adversarial images and what the network made of them, on the CPU.

    Attributes:
        images: adversarial, ``(N, C, H, W)`` float32 in [0, 1].
        labels: true ones, ``(N,)`` int64.
        clean: predictions on the clean images, ``(N,)`` int64.
        predicted: predictions on the adversarial ones, ``(N,)`` int64.
        linf, l2: norms of the perturbations, ``(N,)`` float32.
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    predicted: Tensor
    linf: Tensor
    l2: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def clean_accuracy(self) -> float:
        """Share of the clean images that are classified rightly."""
        return (self.clean == self.labels).double().mean().item()

    @property
    def success(self) -> Tensor:
        """Where a right prediction became a wrong one, ``(N,)`` bool.

        An image that was misclassified before is no success; most attacks return it unchanged.
        """
        return (self.clean == self.labels) & (self.predicted != self.labels)

    @property
    def success_rate(self) -> float:
        """Share of the rightly classified images that are successes; NaN if none was."""
        right = int((self.clean == self.labels).sum())
        return int(self.success.sum()) / right if right else nan

    def subset(self, index: Tensor) -> Attacked:
        """The samples at ``index``, numbers or a mask."""
        fields = (self.images, self.labels, self.clean, self.predicted, self.linf, self.l2)
        return Attacked(*(field[index] for field in fields))


def attack(
    network: nn.Module,
    attack: Attack | str,
    images: Tensor,
    labels: Tensor,
    *,
    cache: Path | str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: str | None = None,
) -> Attacked:
    """Attack a network, batch by batch, on its own device.

    The network is attacked in eval mode; afterwards its modes and gradients are as they were, and so are the random
    states. Batch i draws from ``(seed, i)`` alone, so that a resumed attack ends with the images of an uninterrupted
    one. The true labels are given to the attacks (DeepFool, HopSkipJump and the boundary attack go by the prediction
    instead).

    Args:
        network: from pixels in [0, 1] to logits ``(B, classes)``; it normalises inside, as :class:`models.Normalize`.
        attack: a name of :data:`PRESETS` or an :class:`Attack`.
        images: clean, ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        cache: folder in which batches are kept as they are done, in a folder of their own for each weights of the
            network, attack, settings, images, labels, seed, batch size and version of ART. What is there is taken up;
            what is damaged is made anew.
        batch_size: images at a time.
        seed: of random starts and draws.
        progress: label of a progress bar over batches; none without it.

    Raises:
        TypeError, ValueError: arguments out of range, images outside [0, 1], or AutoAttack on fewer than 3 classes.
        ModuleNotFoundError: ART is not installed.
    """
    chosen = checked(preset(attack) if isinstance(attack, str) else attack)
    images = check_images(images).detach().float().cpu()
    labels = check_labels(labels, len(images))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    about = {
        "attack": chosen.name,
        "class": CLASSES[chosen.name],
        "settings": dict(chosen.settings),
        "art": toolbox().__version__,
        "seed": seed,
        "batch_size": batch_size,
        "weights": fingerprint(network),
    }
    key = key_of(about | {"images": images, "labels": labels})
    said = about | {"network": type(network).__name__, "images": list(images.shape), "key": key}
    store = BatchFolder(Path(cache) / f"{chosen.name}-{key[:24]}" if cache is not None else None, said)
    parts = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    done = {i: batch for i, batch in store.read(len(parts)).items() if _fits(batch, parts[i][0])}
    bar = tqdm(total=len(parts), initial=len(done), desc=progress, disable=progress is None, unit="batch", leave=False)
    with bar, frozen(network):
        missing = [i for i in range(len(parts)) if i not in done]
        classes = _classes(network, chosen, images, labels) if missing else 0
        for i in missing:
            with seeded(seed, i, device=device_of(network)):
                done[i] = _attack_batch(network, chosen, *parts[i], classes)
            store.write(i, done[i])
            bar.update()
    found = {name: torch.cat([done[i][name] for i in range(len(parts))]) for name in ("images", "clean", "predicted")}
    moved = (found["images"] - images).flatten(1)
    return Attacked(labels=labels, linf=moved.abs().amax(1), l2=moved.norm(dim=1), **found)


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Labels ``(count,)`` int64, not negative, on the CPU.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.long:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {kind}")
    if labels.shape != (count,):
        raise ValueError(f"labels must have one entry for each of {count} images, got shape {tuple(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    return labels.cpu()


def _fits(batch: dict[str, Tensor], x: Tensor) -> bool:
    """Whether a batch from the disk is one of adversarial images of these."""
    if set(batch) != {"images", "clean", "predicted"}:
        return False
    found, *classes = batch["images"], batch["clean"], batch["predicted"]
    if found.shape != x.shape or found.dtype != torch.float32 or not ((found >= 0) & (found <= 1)).all():
        return False
    return all(each.shape == (len(x),) and each.dtype == torch.int64 for each in classes)


def _classes(network: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> int:
    logits = _logits(network, images[:1])
    if logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must lie in [0, classes) of the network's logits (B, classes), got {int(labels.max())} "
            f"and logits of shape {tuple(logits.shape)}"
        )
    if attack.name == "AA" and logits.shape[1] < 3:
        raise ValueError(
            f"AA compares three logits of a network, got one with {logits.shape[1]}: choose another attack"
        )
    return logits.shape[1]


def _attack_batch(network: nn.Module, attack: Attack, x: Tensor, y: Tensor, classes: int) -> dict[str, Tensor]:
    clean = _logits(network, x).argmax(1)
    if attack.name in DECISION_BASED:
        found = np.stack([_decide(network, attack, image, int(k)) for image, k in zip(x, clean, strict=True)])
    else:
        found = gradient_attack(network, attack.name, dict(attack.settings), x.numpy(), y.numpy(), classes)
    adversarial = torch.from_numpy(found).float().clamp(0, 1)
    return {"images": adversarial, "clean": clean, "predicted": _logits(network, adversarial).argmax(1)}


def _decide(network: nn.Module, attack: Attack, image: Tensor, prediction: int) -> np.ndarray:
    """One image by its predictions alone, from the first uniform noise that is predicted otherwise, as ART does."""

    def adversarial(points: np.ndarray) -> np.ndarray:
        return (_logits(network, torch.from_numpy(points)).argmax(1) != prediction).numpy()

    settings = dict(attack.settings)
    noise = (torch.rand(image.shape).numpy() for _ in range(int(settings.get("init_size", 100))))
    found = decision_attack(attack.name, settings, adversarial, image.numpy(), noise)
    return image.numpy() if found is None else found


@torch.no_grad()
def _logits(network: nn.Module, x: Tensor) -> Tensor:
    return network(x.to(device_of(network))).cpu()
