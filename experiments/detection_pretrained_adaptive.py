"""Attacks on trained networks that know of the detector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detection_pretrained_detectors import CONTENDERS, FEATURES, Sample, fit
from detection_pretrained_setup import Config, rounded
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.detection import Attacked, Parts, ProjectedDescent, distill, in_batches, surrogate_attack
from odenets.training.data import TensorData

__all__ = ["ADAPTIVE", "evade"]

ADAPTIVE = ("eq. 34, logistic", "separation", "separation, clean only")
"""The detectors that are attacked."""
WEIGHTS = (1.0, 10.0)
"""Of the detector beside the network, one descent for each."""
SURELY = 1e-3
"""Images count as detected before where their score is above 1/2 by this."""


def evade(
    config: Config,
    network: nn.Module,
    name: str,
    eps: float,
    sets: tuple[Sample, Sample, Sample],
    pool: TensorData,
    moved: Tensor,
    parts: Parts,
    seed: int,
) -> dict[str, float]:
    """Projected descent on the network and a detector at once, from attacked test images that it detects.

    The detector is fitted on clean images, noise and the attack, and detects what 5 % of the validation images that
    count as clean exceed. The descent sees it through a network that was taught its scores, and it judges every step
    itself.

    Args:
        config: of the study.
        network: records its steps.
        name: of the contender.
        eps: radius of the ball about the clean image, in the maximum norm.
        sets: clean images, noise, and the attack.
        pool: the clean images and their labels.
        moved: the attacked ones.
        parts: of the pool.
        seed: of detector and surrogate.

    Returns:
        Shares in [0, 1]: of the successful attacks on test images that are detected; of ``starts`` of these that evade
        network and detector, and that still do at 8 bits; and the mean L2 norm of the changes of those that evade.
    """
    attack = sets[-1]
    fitted = fit(CONTENDERS[name], sets[:-1], attack, parts, seed)
    kind: Any = FEATURES[fitted.features]

    def features(network: nn.Module, x: Tensor) -> Tensor:
        """With the predicted class, one column each: detectors by class ask for it."""
        logits, values = kind.output_and_features(network, x)
        return torch.cat([values, F.one_hot(logits.argmax(1), pool.classes).to(values)], 1)

    def score(X: np.ndarray) -> np.ndarray:
        values, classes = X[:, : -pool.classes], X[:, -pool.classes :].argmax(1)
        return expit((fitted.score(values, classes) - fitted.threshold) / fitted.spread)

    def read(x: Tensor) -> np.ndarray:
        return in_batches(lambda part: features(network, part), network, x, 100).numpy()

    change = (moved - pool.x).flatten(1)
    before, after = (torch.from_numpy(each.predicted) for each in (sets[0], attack))
    all_of = Attacked(moved, pool.y, before, after, change.abs().amax(1), change.norm(dim=1))
    successful = parts.test[all_of.success[parts.test]]
    detected = torch.from_numpy(score(read(moved[successful])) > 0.5 + SURELY)
    result = {"detected": detected.float().mean().item() if len(successful) else float("nan")}
    starts = successful[detected][: config.starts]
    if not len(starts):
        return result | {"starts": 0}
    known = np.concatenate([read(x[parts.fit]) for x in (pool.x, moved)])
    evasion = surrogate_attack(
        network, features, score, distill(score, known, seed=seed), all_of.subset(starts), pool.x[starts],
        descent=ProjectedDescent(eps=eps, steps=config.steps, weights=WEIGHTS),
    )  # fmt: skip
    as_files = rounded(evasion.images)
    wrong = (
        in_batches(lambda x: kind.output_and_features(network, x)[0], network, as_files, 100).argmax(1)
        != pool.y[starts]
    )
    still = wrong.numpy() & (score(read(as_files)) <= 0.5)
    l2 = evasion.l2[evasion.evaded]
    return result | {
        "starts": len(starts),
        "evaded": evasion.share,
        "evaded_rounded": float(still.mean()),
        "l2": l2.mean().item() if len(l2) else float("nan"),
    }
