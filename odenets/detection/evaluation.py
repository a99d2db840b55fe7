"""How detectors are compared: parts of the data that have nothing in common, and what is scored on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

__all__ = ["FALSE_POSITIVE_RATES", "Parts", "Scores", "detection_rates", "score", "split"]

FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""At which :func:`detection_rates` reads a curve."""


@dataclass(frozen=True)
class Parts:
    """Indices of samples, each part sorted, no two with an index in common.

    Attributes:
        train: of the network.
        fit: of the detector (B1 without its validation part).
        validation: where a detector, its features and their settings are chosen (in B1).
        test: where the chosen one is scored, once (B2).
    """

    train: Tensor
    fit: Tensor
    validation: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        parts = {name: set(index.tolist()) for name, index in vars(self).items()}
        for name, index in vars(self).items():
            if index.dtype == torch.bool or len(parts[name]) != len(index) or min(parts[name], default=0) < 0:
                raise ValueError(f"{name} must hold indices 0, 1, ..., none of them twice and no mask")
        for (one, a), (other, b) in combinations(parts.items(), 2):
            if shared := a & b:
                raise ValueError(f"{one} and {other} must be disjoint, they share {len(shared)} indices")
        for name, index in vars(self).items():
            if name != "train" and not len(index):
                raise ValueError(f"{name} must hold at least one index")


def split(samples: int, *, train: int = 0, test: float = 0.1, validation: float = 0.2, seed: int = 0) -> Parts:
    """Cut samples once, by index: the first ``train`` for the network, the rest at random by the seed.

    Args:
        samples: how many there are.
        train: how many of the first the network was trained on; 0 where it was trained on other data.
        test: share of the rest for B2; 0.1 in the thesis.
        validation: share of B1 for choosing.
        seed: decides which.

    Raises:
        ValueError: shares outside (0, 1), or a part that would be empty.

    >>> parts = split(100, test=0.1, validation=0.2)
    >>> len(parts.fit), len(parts.validation), len(parts.test)
    (72, 18, 10)
    """
    if not (0 < test < 1 and 0 < validation < 1):
        raise ValueError(f"test and validation must be shares in (0, 1), got {test} and {validation}")
    if not 0 <= train < samples:
        raise ValueError(f"train must be between 0 and the number of samples, {samples}, got {train}")
    rest = train + torch.randperm(samples - train, generator=torch.Generator().manual_seed(seed))
    b2 = round(test * len(rest))
    chosen = round(validation * (len(rest) - b2))
    sizes = [len(rest) - b2 - chosen, chosen, b2]
    fit, held, kept = (part.sort().values for part in rest.split(sizes))
    return Parts(torch.arange(train), fit, held, kept)


@dataclass(frozen=True)
class Scores:
    """What a detector reaches on data that it was neither fitted nor chosen on.

    Attributes:
        accuracy: share of right answers, clean and adversarial samples together.
        auroc: area under the receiver operating characteristic.
        fpr95: false-positive rate where 95 % of the adversarial samples are detected.
        detected: share of the adversarial samples that are.
        detected_successful: share of those that fool the network which are; NaN if there is none.
        false_positives: share of the clean samples that are taken for adversarial.
    """

    accuracy: float
    auroc: float
    fpr95: float
    detected: float
    detected_successful: float
    false_positives: float

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def score(
    clean: np.ndarray, adversarial: np.ndarray, *, threshold: float = 0.0, successful: np.ndarray | None = None
) -> Scores:
    """Score a detector by what it says of clean and of adversarial samples.

    Args:
        clean, adversarial: its scores, ``(N,)`` and ``(M,)``, larger for the adversarial.
        threshold: above which it detects.
        successful: which of the adversarial samples fool the network, ``(M,)`` of bool; all if not given.

    Raises:
        ValueError: no samples of either kind, scores that are not finite, or another number of ``successful``.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    clean, adversarial = np.asarray(clean, dtype=float), np.asarray(adversarial, dtype=float)
    for name, values in (("clean", clean), ("adversarial", adversarial)):
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"{name} must hold finite scores (N,), at least one, got shape {values.shape}")
    fooled = np.ones(len(adversarial), dtype=bool) if successful is None else np.asarray(successful)
    if not np.isin(fooled, (0, 1)).all():
        raise ValueError(f"successful must hold True or False, no indices, got {fooled.dtype} up to {fooled.max()}")
    fooled = fooled.astype(bool)
    if fooled.shape != adversarial.shape:
        raise ValueError(f"successful must hold one per adversarial sample, {adversarial.shape}, got {fooled.shape}")
    if not np.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    y, scores = np.repeat([0, 1], [len(clean), len(adversarial)]), np.concatenate([clean, adversarial])
    rates = roc_curve(y, scores, drop_intermediate=False)
    return Scores(
        accuracy=float(((scores > threshold) == y).mean()),
        auroc=float(roc_auc_score(y, scores)),
        fpr95=float(rates[0][np.argmax(rates[1] >= 0.95)]),
        detected=float((adversarial > threshold).mean()),
        detected_successful=float((adversarial[fooled] > threshold).mean()) if fooled.any() else float("nan"),
        false_positives=float((clean > threshold).mean()),
    )


def detection_rates(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """The receiver operating characteristic at :data:`FALSE_POSITIVE_RATES`, ``(101,)``, for averages of curves.

    Args:
        clean, adversarial: a detector's scores, ``(N,)`` and ``(M,)``, larger for the adversarial.
    """
    from sklearn.metrics import roc_curve

    y, scores = np.repeat([0, 1], [len(clean), len(adversarial)]), np.concatenate([clean, adversarial])
    false, true, _ = roc_curve(y, scores)
    return np.interp(FALSE_POSITIVE_RATES, false, true)
