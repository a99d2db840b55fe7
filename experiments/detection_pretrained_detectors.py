"""The detectors that are compared on trained networks: features, classifiers, and how they are chosen and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from odenets.detection import (
    LID,
    Detector,
    Features,
    FeatureSqueezing,
    FourierSpectrum,
    KernelDensity,
    Mahalanobis,
    NaturalSceneStatistics,
    Parts,
    Separation,
    Trajectory,
)

__all__ = ["CONTENDERS", "FEATURES", "FIRST", "Contender", "GaussianOutliers", "Sample", "compare"]

FEATURES: dict[str, Features] = {
    "eq. 34": Trajectory(),
    "all of the path": Trajectory("residue", "cosine", "embedding", "action"),
    "separation": Separation(),
    "Mahalanobis": Mahalanobis(),
    "Mahalanobis, step": Mahalanobis(magnitude=0.001),
    "Mahalanobis, relative": Mahalanobis(relative=True),
    "LID": LID(),
    **{f"density {width:g}": KernelDensity(bandwidth=width) for width in (0.1, 0.25, 0.5, 1)},
    "squeezing": FeatureSqueezing(),
    "scenes": NaturalSceneStatistics(),
    "Fourier magnitude": FourierSpectrum("magnitude"),
    "Fourier phase": FourierSpectrum("phase"),
}
"""All kinds of features by name."""


class GaussianOutliers(OutlierMixin, BaseEstimator):
    """Outliers are far from clean samples, by the Mahalanobis distance with a covariance of Ledoit and Wolf (2004)."""

    def fit(self, X: np.ndarray, y: object = None) -> GaussianOutliers:
        """Of standardized clean features ``(N, F)``."""
        self.scaler_ = StandardScaler().fit(X)
        self.covariance_ = LedoitWolf(assume_centered=True).fit(self.scaler_.transform(X))
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Minus the squared distance."""
        return -self.covariance_.mahalanobis(self.scaler_.transform(X))


def _forest(seed: int) -> Any:
    return RandomForestClassifier(random_state=seed)


def _logistic(strength: float) -> Callable[[int], Any]:
    def make(seed: int) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))

    return make


FOREST = {"forest": _forest}
LOGISTIC = {f"logistic {strength:g}": _logistic(strength) for strength in (0.01, 0.1, 1)}
OUTLIERS: dict[str, Callable[[int], Any]] = {"Gaussian": lambda seed: GaussianOutliers()}


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        features: among which is chosen, by names of :data:`FEATURES`.
        classifiers: among which is chosen, each made of a seed.
        mode: of the :class:`Detector`; "clean" is a detector that is fitted on clean images alone.
    """

    features: Sequence[str]
    classifiers: Mapping[str, Callable[[int], Any]] = field(default_factory=lambda: FOREST | LOGISTIC)
    mode: str = "general"


FIRST = "eq. 34, forest"
_DENSITIES = tuple(name for name in FEATURES if name.startswith("density"))
_MAHALANOBIS = tuple(name for name in FEATURES if name.startswith("Mahalanobis"))
CONTENDERS: dict[str, Contender] = {
    FIRST: Contender(("eq. 34",), FOREST),
    "eq. 34, forest by class": Contender(("eq. 34",), FOREST, "conditional"),
    "eq. 34, ensemble": Contender(("eq. 34",), FOREST, "ensemble"),
    "eq. 34, logistic": Contender(("eq. 34",), LOGISTIC),
    "eq. 34, embeddings, action": Contender(("all of the path",)),
    "separation, forest": Contender(("separation",), FOREST),
    "separation": Contender(("separation",)),
    "eq. 34, clean only": Contender(("eq. 34",), OUTLIERS, "clean"),
    "separation, clean only": Contender(("separation",), OUTLIERS, "clean"),
    "Mahalanobis": Contender(_MAHALANOBIS),
    "LID": Contender(("LID",)),
    "kernel density": Contender(_DENSITIES),
    "feature squeezing": Contender(("squeezing",)),
    "scenes": Contender(("scenes",)),
    "Fourier": Contender(("Fourier magnitude", "Fourier phase"), FOREST),  # thousands of numbers
}
"""The rows, the first is that to which all others are compared."""


@dataclass(frozen=True)
class Sample:
    """Images as detectors see them: of the pool's first ones, in its order.

    Attributes:
        X: features by name, ``(N, F)``.
        predicted: classes, ``(N,)``.
        successful: which fool the network, ``(N,)`` of bool; all where there is no attack.
        changed: which an attack has changed, ``(N,)`` of bool, all where there is none; the others do not count.
    """

    X: Mapping[str, np.ndarray]
    predicted: np.ndarray
    successful: np.ndarray
    changed: np.ndarray

    def among(self, index: np.ndarray) -> np.ndarray:
        """Those of some indices of the pool that are here and count."""
        index = index[index < len(self.predicted)]
        return index[self.changed[index]]

    def part(self, name: str, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features and predicted classes of those of some indices of the pool."""
        index = self.among(index)
        return self.X[name][index], self.predicted[index]


def compare(
    contender: Contender,
    clean: Sample,
    noise: Sample | None,
    seen: Sample,
    tested: Mapping[str, tuple[Sample, Sample]],
    parts: Parts,
    seed: int,
) -> tuple[str, dict[str, dict[str, float]]]:
    """Fit a contender, choose on validation images what there is to choose, and score it on test images.

    Args:
        contender: whose features and classifiers are tried.
        clean: the pool.
        noise: noisy images that count as clean where it is fitted, chosen and tested, of the size of what is seen; None
            to leave them out.
        seen: the attack that it is fitted on.
        tested: by name attacks and noise of their size.
        parts: of the pool.
        seed: of the forests.

    Returns:
        What was chosen, and for each attack measures in [0, 1]: the area under the curve against what counts as clean,
        of successful attacks too, against noise alone, and of noise against clean images; at the threshold that 5 % of
        the validation images that count as clean exceed, how much is detected of attacks, of successful ones, of clean
        images and of noise.
    """
    fit, validation, test = (getattr(parts, part).numpy() for part in ("fit", "validation", "test"))
    negatives = [clean] if noise is None else [clean, noise]
    best, name, score = -1.0, "", None
    for features in contender.features:
        for classifier, make in contender.classifiers.items():
            scorer = _fitted(contender.mode, make(seed), features, negatives, seen, fit, seed)
            area = _auroc(_of(scorer, features, negatives, validation), scorer(*seen.part(features, validation)))
            if area > best:
                best, name, score = area, f"{features}, {classifier}", (scorer, features)
    assert score is not None
    scorer, features = score
    threshold = np.quantile(_of(scorer, features, negatives, validation), 0.95)
    measures = {}
    for other, (attack, as_large) in tested.items():
        of_clean, of_attack, of_noise = (scorer(*each.part(features, test)) for each in (clean, attack, as_large))
        negative = of_clean if noise is None else np.concatenate([of_clean, of_noise])
        fooled = of_attack[attack.successful[attack.among(test)]]
        measures[other] = {
            "auroc": _auroc(negative, of_attack),
            "auroc_successful": _auroc(negative, fooled),
            "auroc_noise": _auroc(of_noise, of_attack),
            "noise_auroc": _auroc(of_clean, of_noise),
            "detected": float((of_attack > threshold).mean()),
            "detected_successful": float((fooled > threshold).mean()) if len(fooled) else float("nan"),
            "false_positives": float((of_clean > threshold).mean()),
            "noise_detected": float((of_noise > threshold).mean()),
        }
    return name, measures


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _fitted(
    mode: str, classifier: Any, features: str, negatives: Sequence[Sample], seen: Sample, fit: np.ndarray, seed: int
) -> Scorer:
    """Larger for what is more like the attack."""
    if mode == "clean":
        outliers = classifier.fit(negatives[0].part(features, fit)[0])
        return lambda X, predicted: -outliers.decision_function(X)
    sets = [sample.part(features, fit) for sample in (*negatives, seen)]
    X, predicted = (np.concatenate(arrays) for arrays in zip(*sets, strict=True))
    y = np.repeat([0, 1], [len(X) - len(sets[-1][1]), len(sets[-1][1])])
    detector = Detector(classifier, mode=mode, random_state=seed).fit(X, y, predicted)  # type: ignore[arg-type]
    return detector.decision_function


def _of(scorer: Scorer, features: str, samples: Sequence[Sample], index: np.ndarray) -> np.ndarray:
    return np.concatenate([scorer(*sample.part(features, index)) for sample in samples])


def _auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """NaN where there are none of one kind."""
    if not (len(negative) and len(positive)):
        return float("nan")
    y = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(y, np.concatenate([negative, positive])))
