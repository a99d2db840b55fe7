"""Adversarial images of a network, computed once and cached."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.checkpoints import fingerprint
from odenets.detection.attacks.art import (
    BY_CROSS_ENTROPY,
    CLASSES,
    DECISION_BASED,
    check_squares,
    decision_attack,
    gradient_attack,
    load_art,
)
from odenets.detection.attacks.caching import BatchFolder, key_of
from odenets.detection.attacks.presets import Attack, checked, preset
from odenets.detection.features.base import check_images
from odenets.detection.isolation import Logits, frozen, seeded
from odenets.errors import check_count, needs
from odenets.modes import device_of
from odenets.printing import shown

__all__ = ["Attacked", "check_labels", "run_attack", "with_progress"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Attacked:
    """Adversarial images and the predictions of the network, on the CPU; :func:`run_attack` makes them.

    Attributes:
        images: adversarial, ``(N, C, H, W)`` float32 in [0, 1].
        labels: true ones, ``(N,)`` int64.
        clean: predictions on the clean images, ``(N,)`` int64.
        predicted: predictions on the adversarial ones, ``(N,)`` int64.
        linf: largest change of a pixel, ``(N,)`` float32.
        l2: Euclidean norm of the change, ``(N,)`` float32.
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    predicted: Tensor
    linf: Tensor
    l2: Tensor

    __repr__ = shown

    def __len__(self) -> int:
        return len(self.images)

    @property
    def success(self) -> Tensor:
        """Where a right prediction became a wrong one, ``(N,)`` bool; images misclassified before are no successes."""
        return (self.clean == self.labels) & (self.predicted != self.labels)

    @property
    def success_rate(self) -> float:
        """Share of the images classified correctly before that are successes; NaN if there are none."""
        right = int((self.clean == self.labels).sum())
        return int(self.success.sum()) / right if right else nan

    def subset(self, index: Tensor) -> Attacked:
        """The samples at ``index``, numbers or a mask."""
        return Attacked(*(getattr(self, name)[index] for name in self.__slots__))


def run_attack(
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
    """Attack a network, batch by batch, on its own device, by the Adversarial Robustness Toolbox (ART).

    The network is attacked in eval mode and with gradients enabled, whatever the caller's mode; afterwards its modes
    and gradients and the random states are restored. Whatever the network's precision, the attack computes in float32:
    images are cast on the way in and logits on the way out. Batch i draws from ``(seed, i)`` alone, so that a resumed
    attack ends with the images of an uninterrupted one. Attacks move away from the true labels (DeepFool, HopSkipJump
    and the boundary attack from the predictions instead), those by cross-entropy in the exact direction of its
    gradient, which ART's own loses in single precision where the network is sure of an image (``exact=False``).

    Args:
        network: from pixels in [0, 1] to logits, one tensor ``(B, classes)``; it normalizes inside, as
            :class:`~odenets.models.Normalize`.
        attack: a name of :data:`PRESETS`, such as "FGM", or an :class:`Attack`, such as ``preset("FGM", eps=0.1)``.
        images: clean, ``(N, C, H, W)`` in [0, 1], of any floating precision and on any device.
        labels: ``(N,)`` of integers.
        cache: folder to which batches are written when they are done, each combination of weights, attack, settings,
            images, labels, seed, batch size and version of ART in a folder of its own. Batches that are there are read;
            damaged ones are computed again.
        batch_size: images at a time.
        seed: of random starts and draws.
        progress: label of a progress bar over batches; none without it.

    Returns:
        The adversarial images, in the order of ``images``, and in ``success`` which of them fool the network.

    Raises:
        TypeError, ValueError: arguments out of range, images outside [0, 1], a network that returns no finite logits of
            two classes or more, or AutoAttack on fewer than 3 classes or on images too small or narrow for its squares.
        ModuleNotFoundError: ART is not installed: ``pip install 'odenets[detection]'``.

    Warns:
        UserWarning: the network seems to return probabilities, on which attacks by gradients are weak; or "FGM" or
            "BIM" leaves images as they are, of which it fails to find a gradient; or
            two passes of the network differ, so that success is that of one draw.

    >>> from odenets.models import small_network
    >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    >>> attacked = run_attack(small_network(depth=2), "FGM", images, labels)
    >>> attacked.images.shape, bool((attacked.linf <= 0.03 + 1e-6).all())
    (torch.Size([4, 1, 8, 8]), True)
    """
    attack = checked(preset(attack) if isinstance(attack, str) else attack)
    images = check_images(images).detach().float().cpu().contiguous()
    labels = check_labels(labels, len(images))
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    store = _batch_folder(cache, network, attack, images, labels, batch_size, seed)
    parts = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    batches = {i: batch for i, batch in store.read(len(parts)).items() if _fits(batch, parts[i][0])}
    missing = [i for i in range(len(parts)) if i not in batches]
    with frozen(network) as victim:
        logits = Logits(victim)
        classes = _classes(logits, attack, images, labels) if missing else 0
        for i in with_progress(missing, progress, "batch", done=len(batches)):
            x, y = parts[i]
            with seeded(seed, i, device=device_of(victim)):
                batches[i] = _attack_batch(logits, attack, x, y, classes)
            store.write(i, batches[i])
    names = ("images", "clean", "predicted")
    joined = {name: torch.cat([batches[i][name] for i in range(len(parts))]) for name in names}
    moved = (joined["images"] - images).flatten(1)
    attacked = Attacked(labels=labels, linf=moved.abs().amax(1), l2=moved.norm(dim=1), **joined)
    _check_moved(attack, attacked)
    return attacked


def with_progress(items: Sequence[Any], label: str | None, unit: str, *, done: int = 0) -> Iterable[Any]:
    """The items, with a bar that counts them after those already done; without a label the items alone."""
    if label is None:
        return items
    with needs("detection"):
        from tqdm import tqdm
    return tqdm(items, label, total=done + len(items), initial=done, unit=unit, leave=False)


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Labels ``(count,)`` int64 on the CPU, if they are as many integers, not negative."""
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor, got {kind}")
    if labels.shape != (count,):
        raise ValueError(f"labels must have one entry for each of {count} images, got shape {tuple(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    return labels.detach().long().cpu()


def _batch_folder(
    cache: Path | str | None, network: nn.Module, attack: Attack, x: Tensor, y: Tensor, batch_size: int, seed: int
) -> BatchFolder:
    """The folder of an attack, whose name depends on everything that its images depend on."""
    about = {
        "attack": attack.name,
        "class": CLASSES[attack.name],
        "settings": {setting: value for setting, value in attack.settings if setting != "exact"},
        "art": load_art().__version__,
        "seed": seed,
        "batch_size": batch_size,
        "weights": fingerprint(network),
    }
    if attack.name in BY_CROSS_ENTROPY and dict(attack.settings).get("exact", True):
        about["loss"] = "log-odds"  # images that were made otherwise are others
    more = {"attributes": _attributes(network), "images": x, "labels": y} | _unsaved(network)
    kind = device_of(network).type
    if torch.is_autocast_enabled(kind):
        more["autocast"] = str(torch.get_autocast_dtype(kind))
    key = key_of(about | more)
    about |= {"network": type(network).__name__, "images": list(x.shape), "key": key}
    return BatchFolder(Path(cache) / f"{attack.name}-{key[:24]}" if cache is not None else None, about)


def _attributes(network: nn.Module) -> list[list[Any]]:
    """Plain values of modules beside their weights that may change what they compute, such as a temperature."""
    plain = (bool, int, float, complex, str, torch.dtype)
    return [
        [name, attribute, repr(value)]
        for name, module in network.named_modules()
        for attribute, value in sorted(vars(module).items())
        if attribute != "training"
        and (isinstance(value, plain) or (isinstance(value, list | tuple) and all(isinstance(v, plain) for v in value)))
    ]


def _unsaved(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of modules that are in no state dictionary."""
    saved = set(network.state_dict())
    buffers = {f"buffer {name}": buffer for name, buffer in network.named_buffers() if name not in saved}
    return buffers | {
        f"attribute {name}.{attribute}": value
        for name, module in network.named_modules()
        for attribute, value in sorted(vars(module).items())
        if isinstance(value, Tensor)
    }


def _fits(batch: dict[str, Tensor], x: Tensor) -> bool:
    """Whether a batch from the disk holds adversarial images of these."""
    if set(batch) != {"images", "clean", "predicted"}:
        return False
    images, *classes = batch["images"], batch["clean"], batch["predicted"]
    if images.shape != x.shape or images.dtype != torch.float32 or not ((images >= 0) & (images <= 1)).all():
        return False
    return all(each.shape == (len(x),) and each.dtype == torch.int64 for each in classes)


def _classes(logits: Logits, attack: Attack, images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        first, again = logits(images[:1]), logits(images[:1])
    classes = first.shape[1]
    if not torch.allclose(first, again, rtol=1e-3, atol=1e-5, equal_nan=True):
        warnings.warn(
            "network seems to draw random numbers in eval mode, so that success is that of one draw and others are "
            "fooled in the next pass: switch off what is random",
            stacklevel=3,
        )
    if attack.name not in DECISION_BASED and bool((first >= 0).all()) and abs(first.sum().item() - 1) < 1e-4:
        warnings.warn(
            f"network seems to return probabilities, which {attack.name} takes for logits, so that its gradients are "
            "weak: leave the softmax out",
            stacklevel=3,
        )
    if (largest := int(labels.max())) >= classes:
        rule = "labels must lie in [0, classes) of the network's logits (B, classes)"
        raise ValueError(f"{rule}, got {largest} and logits of shape {(1, classes)}")
    if attack.name == "AA" and classes < 3:
        raise ValueError(f"AA compares three logits of a network, got one with {classes}: choose another attack")
    if attack.name == "AA":
        check_squares(dict(attack.settings), *images.shape[2:])
    return classes


def _check_moved(attack: Attack, attacked: Attacked) -> None:
    """Warn of images that an attack of one step or several leaves as they are: it tells nothing of the network there.

    Others begin at random, or leave images where they fail.
    """
    if attack.name not in ("FGM", "BIM") or dict(attack.settings).get("eps") == 0:
        return
    right = attacked.clean == attacked.labels
    if left := int((right & (attacked.linf == 0)).sum()):
        warnings.warn(
            f"{attack.name} leaves {left} of {int(right.sum())} images as they are, as the network's gradient is 0 "
            "there or leads out of [0, 1]: where it rounds or is cut off, an attack by predictions says more, "
            '"HSJ" or "BA"',
            stacklevel=3,
        )


def _attack_batch(logits: Logits, attack: Attack, x: Tensor, y: Tensor, classes: int) -> dict[str, Tensor]:
    clean = logits.predict(x)
    if attack.name in DECISION_BASED:
        points = np.stack([_decide(logits, attack, image, int(k)) for image, k in zip(x, clean, strict=True)])
    else:
        points = gradient_attack(logits, attack.name, dict(attack.settings), x.numpy(), y.numpy(), classes)
    adversarial = torch.from_numpy(points).float().clamp(0, 1)
    if lost := int((~adversarial.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"{attack.name} must make finite images, got NaN in {lost} of {len(x)}: choose other settings")
    return {"images": adversarial, "clean": clean, "predicted": logits.predict(adversarial)}


def _decide(logits: Logits, attack: Attack, image: Tensor, prediction: int) -> np.ndarray:
    """Attack one image by its predictions alone, from the first uniform noise of another class, as ART does."""

    def adversarial(points: np.ndarray) -> np.ndarray:
        return (logits.predict(torch.from_numpy(points)) != prediction).numpy()

    settings = dict(attack.settings)
    noise = (torch.rand(image.shape, dtype=torch.float32).numpy() for _ in range(int(settings.get("init_size", 100))))
    closest = decision_attack(attack.name, settings, adversarial, image.numpy(), noise)
    return image.numpy() if closest is None else closest
