"""The first adaptive attack: network and detector as one black box that answers a class or "detected"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from odenets.detection.attacks.adaptive.evasion import Evasion, detected_by, judge, matching, starting_points
from odenets.detection.attacks.art import decision_attack
from odenets.detection.attacks.generation import Attacked
from odenets.detection.attacks.presets import checked, preset
from odenets.detection.isolation import Logits, frozen, seeded
from odenets.modes import device_of

__all__ = ["black_box"]


def black_box(
    network: nn.Module,
    detector: Callable[[Tensor], Any],
    start: Attacked,
    images: Tensor,
    *,
    pool: Tensor | None = None,
    trials: int = 100,
    seed: int = 0,
    batch_size: int = 256,
    progress: str | None = None,
    **settings: int,
) -> Evasion:
    """HopSkipJump on an answer out of classes + 1: the class that the network predicts or, if detected, "detected".

    As in the thesis the image attacked is the detected adversarial image, and the target is the wrong class that the
    network predicts for it, so that the network stays fooled and the detector falls silent. HopSkipJump must begin at
    an image with the target answer, which the attacked image does not have. ART draws uniform noise until one has it,
    which noise hardly ever does. Here the candidates are the attacked image blended with noise, from little noise to
    noise alone, and the images of ``pool``, the nearest first; where none has the target answer, the start image is
    left as it is.

    Args:
        network: from pixels in [0, 1] to logits, which the attacker asks only for classes here.
        detector: of images ``(B, C, H, W)`` on the network's device, 1 or True where detected, ``(B,)``.
        start: successful adversarial images that are detected.
        images: the clean images of these, ``(N, C, H, W)``.
        pool: further images, ``(K, C, H, W)`` in [0, 1], such as clean ones of all classes.
        trials: blends with noise.
        seed: of the noise and of HopSkipJump; image i draws from ``(seed, i)``.
        batch_size: questions at a time.
        progress: label of a progress bar over images; none without it.
        settings: of HopSkipJump: 50 iterations (``max_iter``) and for each direction at most 10000 questions
            (``max_eval``), 100 at first (``init_eval``), if not given.

    Raises:
        TypeError, ValueError: arguments that are not as described.
        ModuleNotFoundError: ART is not installed.

    References:
        Section 5.4.5, first attack. Chen, Jordan, Wainwright. HopSkipJumpAttack: a query-efficient decision-based
        attack. IEEE S&P 2020.
    """
    chosen = dict(checked(preset("HSJ", **settings)).settings)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    more = start.images[:0] if pool is None else matching(pool, start)
    device = device_of(network)

    @torch.no_grad()
    def undetected_as(target: int, points: np.ndarray) -> np.ndarray:
        answer = []
        for x in torch.from_numpy(points).split(batch_size):
            x = x.to(device)
            fooled = logits.predict(x).to(device) == target
            if fooled.any():
                fooled[fooled.clone()] = ~detected_by(detector, x[fooled]).to(device)
            answer.append(fooled.cpu())
        return torch.cat(answer).numpy()

    with frozen(network) as network:
        logits = Logits(network)
        images = starting_points(network, detector, start, images, batch_size)
        final = start.images.clone()
        for i in tqdm(range(len(start)), desc=progress, disable=progress is None, unit="image", leave=False):
            x, target = start.images[i], int(start.predicted[i])
            with seeded(seed, i, device=device):
                share = torch.arange(1, trials + 1, dtype=torch.float32).reshape(-1, 1, 1, 1) / trials
                candidates = torch.cat(
                    [(1 - share) * x + share * torch.rand(trials, *x.shape, dtype=torch.float32), more]
                )
                candidates = candidates[(candidates - x).flatten(1).norm(dim=1).argsort()].numpy()
                first = candidates[undetected_as(target, candidates)]
                found = decision_attack(
                    "HSJ", chosen, lambda points, k=target: undetected_as(k, points), x.numpy(), first
                )
            if found is not None:
                final[i] = torch.from_numpy(found)
        return judge(network, detector, final, start.labels, images, batch_size)
