"""Scores of foreign images: of the last layer through ``pytorch-ood``, coverage of neurons, of the path, joined."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from ood_coverage import Coverage
from ood_setup import ODIN_SETTINGS, PATHS, TRAIN
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch import Tensor, nn

__all__ = ["COVERAGE", "LAST", "PATH", "PathDistance", "joined", "measured", "scores_of"]

LAST = (
    "MSP", "MaxLogit", "energy", "GEN", "ODIN", "KNN", "ViM", "ReAct", "ASH", "SCALE", "Mahalanobis",
    "relative Mahalanobis",
)  # fmt: skip
"""Scores of logits and of states before the head, in the order of the table."""
COVERAGE = "NAC"
"""A score of the states of all stages, apart from those of the last layer."""
PATH = "trajectory"
ASH: tuple[Literal["ash-b", "ash-s"], ...] = ("ash-b", "ash-s")

Read = Mapping[str, np.ndarray]
Variants = dict[str, dict[str, np.ndarray]]


def scores_of(sets: Mapping[str, Read], y: np.ndarray, head: nn.Linear) -> dict[str, Variants]:
    """Scores of all sets, larger for what is foreign: by name of the score, variant, and set.

    Args:
        sets: by name what :func:`ood_setup.read` reads; all is fitted on that of the training images.
        y: labels of the training images.
        head: from states to logits.
    """
    import pytorch_ood.detector as ood

    fit, others = sets[TRAIN], {name: read for name, read in sets.items() if name != TRAIN}
    labels, z = torch.from_numpy(y), torch.from_numpy(fit["z"])
    of_logits = {
        "MSP": {"": ood.MaxSoftmax.score},
        "MaxLogit": {"": ood.MaxLogit.score},
        "energy": {f"T = {t:g}": lambda logits, t=t: ood.EnergyBased.score(logits, t) for t in (0.5, 1, 2)},
        "GEN": {f"gamma = {g:g}": lambda logits, g=g: ood.GEN.score(logits, gamma=g) for g in (0.01, 0.1, 0.5)},
    }
    pooled_head = nn.Sequential(nn.Flatten(), head)
    maps = z[:, :, None, None]
    of_states = {
        "KNN": {f"k = {k}": ood.KNN(None, k=k).fit_features(z, labels) for k in (1, 10, 50, 100) if k <= len(z)},
        "ViM": {
            f"d = {d}": ood.ViM(None, d=d, w=head.weight.detach(), b=head.bias.detach()).fit_features(z, labels)
            for d in sorted({max(1, round(share * z.shape[1])) for share in (0.25, 0.5, 0.75)})
        },
        "Mahalanobis": {"": ood.Mahalanobis(None).fit_features(z, labels)},
        "relative Mahalanobis": {"": ood.RMD(None).fit_features(z, labels)},
    }
    of_maps = {
        "ReAct": {
            f"{p:g}": ood.ReAct(nn.Identity(), pooled_head, percentile=p).fit_feature_maps(maps, labels)
            for p in (0.85, 0.9, 0.95, 0.99)
        },
        "ASH": {
            f"{variant} {p:g}": ood.ASH(nn.Identity(), pooled_head, percentile=p, variant=variant)
            for variant in ASH
            for p in (0.65, 0.8, 0.9)
        },
        "SCALE": {f"{p:g}": ood.SCALE(nn.Identity(), pooled_head, percentile=p) for p in (0.65, 0.8, 0.9)},
    }
    scores: dict[str, Variants] = {name: {} for name in LAST}
    for set_name, read in others.items():
        logits, states = torch.from_numpy(read["logits"]), torch.from_numpy(read["z"])
        values: dict[tuple[str, str], Tensor | np.ndarray] = {}
        values |= {(name, v): call(logits) for name, of in of_logits.items() for v, call in of.items()}
        values |= {(name, v): each.predict_features(states) for name, of in of_states.items() for v, each in of.items()}
        values |= {
            (name, v): each.predict_feature_maps(states[:, :, None, None])
            for name, of in of_maps.items()
            for v, each in of.items()
        }
        for eps, t in ODIN_SETTINGS:
            values["ODIN", f"eps = {eps:g}, T = {t:g}"] = read[f"ODIN {eps:g} {t:g}"]
        for (name, variant), each in values.items():
            scores[name].setdefault(variant, {})[set_name] = np.asarray(each, dtype=np.float64)
    return scores | {COVERAGE: _of_neurons(fit, others), PATH: _of_paths(fit, others)}


def _of_neurons(fit: Read, others: Mapping[str, Read]) -> Variants:
    """Coverage of the last stages, by how many, by steepness, intervals, and images that cover one."""
    names = sorted((name for name in fit if name.startswith("neurons ")), reverse=True)
    variants: Variants = {}
    for stages, alpha, intervals, least in product(range(1, len(names) + 1), (1, 3, 10), (50, 500), (10, 100)):
        score = Coverage([fit[name] for name in names[:stages]], alpha, intervals, least)
        title = f"last {stages}, alpha = {alpha:g}, M = {intervals}, O = {least}"
        variants[title] = {key: score([read[name] for name in names[:stages]]) for key, read in others.items()}
    return variants


def _of_paths(fit: Read, others: Mapping[str, Read]) -> Variants:
    """Distances from clean paths, by features, by what they are scaled to, and by whether means are of a class."""
    variants: Variants = {}
    for name in PATHS:
        for scale, by_class in ((scale, by) for scale in ("standard", "normal") for by in (False, True)):
            title = f"{name}, {scale}{', by class' if by_class else ''}"
            predicted = fit["logits"].argmax(1) if by_class else np.zeros(len(fit["logits"]), dtype=int)
            score = PathDistance(fit[name], predicted, scale)
            for set_name, read in others.items():
                own = read["logits"].argmax(1) if by_class else np.zeros(len(read["logits"]), dtype=int)
                variants.setdefault(title, {})[set_name] = score(read[name], own)
    return variants


class PathDistance:
    """Logarithm of the squared Mahalanobis distance of features from those of clean images of a class.

    Args:
        X: features of clean images, ``(N, F)``.
        predicted: their classes, ``(N,)``.
        scale: to what features are taken first: "standard", mean 0 and variance 1; "normal", the quantiles of a normal
            distribution, each feature for itself.
    """

    def __init__(self, X: np.ndarray, predicted: np.ndarray, scale: str = "standard") -> None:
        normal: dict[str, Any] = {"output_distribution": "normal", "n_quantiles": min(500, len(X)), "subsample": None}
        self.scaler: Any = (QuantileTransformer(**normal) if scale == "normal" else StandardScaler()).fit(X)
        values = self.scaler.transform(X)
        self.mean = values.mean(0)
        self.means = {c: values[predicted == c].mean(0) for c in np.unique(predicted).tolist()}
        self.covariance = LedoitWolf(assume_centered=True).fit(values - self._centers(predicted))

    def _centers(self, predicted: np.ndarray) -> np.ndarray:
        return np.stack([self.means.get(c, self.mean) for c in predicted.tolist()])

    def __call__(self, X: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Of features ``(N, F)`` of images of predicted classes, ``(N,)``."""
        square = self.covariance.mahalanobis(self.scaler.transform(X) - self._centers(predicted))
        return np.log(np.maximum(square, 1e-12))


def joined(last: np.ndarray, path: np.ndarray, clean: tuple[np.ndarray, np.ndarray], weight: float) -> np.ndarray:
    """``a + weight * b`` of two scores, each over its deviation on clean images and less its mean there.

    Args:
        last, path: the two scores of some images.
        clean: the two of clean images.
        weight: of the second.
    """
    of_last, of_path = clean
    a, b = (last - of_last.mean()) / (of_last.std() or 1.0), (path - of_path.mean()) / (of_path.std() or 1.0)
    return a + weight * b


def measured(clean: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
    """Area under the curve, and how many clean images exceed the threshold that 95 % of the foreign ones do.

    OpenOOD counts so: the foreign images are the positive ones.
    """
    y, scores = np.repeat([0, 1], [len(clean), len(foreign)]), np.concatenate([clean, foreign])
    false, true, _ = roc_curve(y, scores, drop_intermediate=False)
    return {"auroc": float(roc_auc_score(y, scores)), "fpr95": float(false[np.argmax(true >= 0.95)])}
