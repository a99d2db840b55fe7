"""The first adaptive attack: network and detector as one black box that answers a class or "detected"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.detection.attacks.adaptive.evasion import Evasion, checked_pool, detected_by, judge, starting_points
from odenets.detection.attacks.art import decision_attack
from odenets.detection.attacks.generation import Attacked, with_progress
from odenets.detection.attacks.presets import preset
from odenets.detection.isolation import Logits, frozen, seeded
from odenets.errors import check_count
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

    As in [K24] the attacked image is the detected adversarial image, and the target is the wrong class that the network
    predicts for it, so that the network stays fooled and the detector no longer detects. HopSkipJump must begin at an
    image with the target answer, which the attacked image does not have. ART draws uniform noise until an image has it,
    which noise hardly ever does. Here the candidates are the attacked image blended with noise, from little noise to
    noise alone, and the images of ``pool``, the nearest first; if none has the target answer, the start image remains.

    Args:
        network: from pixels in [0, 1] to logits, of which the attack uses the predicted classes alone.
        detector: of images ``(B, C, H, W)`` on the network's device, 1 or True where detected, ``(B,)``.
        start: successful adversarial images that are detected.
        images: the clean images of these, ``(N, C, H, W)``.
        pool: further images, ``(K, C, H, W)`` in [0, 1], such as clean ones of all classes.
        trials: blends with noise.
        seed: of the noise and of HopSkipJump; image i draws from ``(seed, i)``.
        batch_size: queries at a time.
        progress: label of a progress bar over images; none without it.
        settings: of HopSkipJump; by default 50 iterations (``max_iter``) and for each direction at most 10000 queries
            (``max_eval``), 100 at first (``init_eval``).

    Returns:
        The final images, in the order of ``start``, and which of them evade network and detector.

    Raises:
        TypeError, ValueError: arguments that are not as described.
        ModuleNotFoundError: ART is not installed: ``pip install 'odenets[detection]'``.

    References:
        [K24, section 5.4.5], first attack. Chen, Jordan, Wainwright. HopSkipJumpAttack: a query-efficient
        decision-based attack. IEEE S&P 2020.
    """
    hop_skip_jump = dict(preset("HSJ", **settings).settings)
    check_count("trials", trials, 1)
    device = device_of(network)
    with frozen(network) as network:
        logits = Logits(network)

        @torch.no_grad()
        def undetected_as(target: int, points: np.ndarray) -> np.ndarray:
            answers = []
            for x in torch.from_numpy(points).split(batch_size):
                x = x.to(device)
                answer = logits.predict(x).to(device) == target
                if answer.any():
                    answer[answer.clone()] = ~detected_by(detector, x[answer]).to(device)
                answers.append(answer.cpu())
            return torch.cat(answers).numpy()

        images = starting_points(network, detector, start, images, batch_size)
        more = start.images[:0] if pool is None else checked_pool(pool, start)
        final = start.images.clone()
        for i in with_progress(range(len(start)), progress, "image"):
            x, adversarial = start.images[i], partial(undetected_as, int(start.predicted[i]))
            with seeded(seed, i, device=device):
                share = torch.arange(1, trials + 1, dtype=torch.float32).reshape(-1, 1, 1, 1) / trials
                blends = (1 - share) * x + share * torch.rand(trials, *x.shape, dtype=torch.float32)
                candidates = torch.cat([blends, more])
                candidates = candidates[(candidates - x).flatten(1).norm(dim=1).argsort()].numpy()
                first = candidates[adversarial(candidates)]
                point = decision_attack("HSJ", hop_skip_jump, adversarial, x.numpy(), first)
            if point is not None:
                final[i] = torch.from_numpy(point)
        return judge(network, detector, final, start.labels, images, batch_size)
