"""The detectors that are compared on trained networks: features, classifiers, and how they are chosen and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
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
    OneClassGaussian,
    Parts,
    Separation,
    Trajectory,
)

__all__ = ["CONTENDERS", "FEATURES", "FIRST", "Contender", "Fitted", "Sample", "compare", "fit"]

FEATURES: dict[str, Features] = {
    "eq. 34": Trajectory(),
    "all of the path": Trajectory("residue", "cosine", "embedding", "action"),
    "separation": Separation(),
    "Mahalanobis": Mahalanobis(),
    "Mahalanobis, step": Mahalanobis(magnitude=0.001),
    "LID": LID(),
    **{f"density {width:g}": KernelDensity(bandwidth=width) for width in (0.25, 0.5)},
    "squeezing": FeatureSqueezing(),
    "scenes": NaturalSceneStatistics(),
    "Fourier": FourierSpectrum("magnitude"),
}
"""All kinds of features by name. Relative distances, phases and other bandwidths were tried and never chosen."""


def _forest(seed: int) -> Any:
    return RandomForestClassifier(random_state=seed)


def _logistic(strength: float) -> Callable[[int], Any]:
    def make(seed: int) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))

    return make


FOREST = {"forest": _forest}
LOGISTIC = {f"logistic {strength:g}": _logistic(strength) for strength in (0.01, 0.1, 1)}
OUTLIERS: dict[str, Callable[[int], Any]] = {"Gaussian": lambda seed: OneClassGaussian()}


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        features: among which is chosen, by names of :data:`FEATURES`, joined by " + " to be side by side.
        classifiers: among which is chosen, each made of a seed.
        mode: of the :class:`Detector`; "clean" is a detector that is fitted on clean images alone.
    """

    features: Sequence[str]
    classifiers: Mapping[str, Callable[[int], Any]] = field(default_factory=lambda: FOREST | LOGISTIC)
    mode: str = "general"


FIRST = "eq. 34, forest"
_DENSITIES = tuple(name for name in FEATURES if name.startswith("density"))
_MAHALANOBIS = tuple(name for name in FEATURES if name.startswith("Mahalanobis"))
_RIVALS = ("Mahalanobis", "squeezing", "density 0.25")
_JOINED = (*(f"separation + {name}" for name in _RIVALS), " + ".join(("separation", *_RIVALS)))
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
    "separation and others": Contender(_JOINED, LOGISTIC),
    "separation and others, clean only": Contender(_JOINED[-1:], OUTLIERS, "clean"),
    "Mahalanobis": Contender(_MAHALANOBIS),
    "LID": Contender(("LID",)),
    "kernel density": Contender(_DENSITIES),
    "feature squeezing": Contender(("squeezing",)),
    "scenes": Contender(("scenes",)),
    "Fourier": Contender(("Fourier",), FOREST),  # thousands of numbers
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
        X = np.concatenate([self.X[each][index] for each in name.split(" + ")], axis=1)
        return X, self.predicted[index]


Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of features ``(N, F)`` and predicted classes ``(N,)``, larger for what is more like an attack."""


@dataclass(frozen=True)
class Fitted:
    """What was chosen of a contender on validation images.

    Attributes:
        features, classifier: by name.
        score: of features of that name.
        threshold: which 5 % of the validation images that count as clean exceed.
        spread: standard deviation of their scores.
    """

    features: str
    classifier: str
    score: Scorer
    threshold: float
    spread: float

    def of(self, samples: Sequence[Sample], index: np.ndarray) -> np.ndarray:
        """Scores of those of some indices of the pool, of all sets one after the other."""
        return np.concatenate([self.score(*sample.part(self.features, index)) for sample in samples])


def fit(contender: Contender, negatives: Sequence[Sample], seen: Sample, parts: Parts, seed: int) -> Fitted:
    """Fit a contender with all its features and classifiers; that with the largest area on validation images is it.

    Args:
        contender: whose features and classifiers are tried.
        negatives: sets that count as clean.
        seen: the attack that it is fitted on.
        parts: of the pool.
        seed: of the forests.

    Raises:
        ValueError: no area can be had, as there are no images that count among those for validation.
    """
    validation = parts.validation.numpy()
    best, chosen = -1.0, None
    for features in contender.features:
        for classifier, make in contender.classifiers.items():
            score = _fitted(contender.mode, make(seed), features, negatives, seen, parts.fit.numpy(), seed)
            of = Fitted(features, classifier, score, 0.0, 0.0)
            clean = of.of(negatives, validation)
            area = _auroc(clean, of.of([seen], validation))
            if area > best:
                best, chosen = area, replace(of, threshold=float(np.quantile(clean, 0.95)), spread=float(clean.std()))
    if chosen is None:
        raise ValueError("seen must hold attacked images among those for validation, got none: more images")
    return chosen


def compare(
    contender: Contender,
    clean: Sample,
    noise: Sample | None,
    seen: Sample,
    tested: Mapping[str, tuple[Sample, Sample, Sample | None]],
    parts: Parts,
    seed: int,
) -> tuple[str, dict[str, dict[str, float]]]:
    """Fit a contender, choose on validation images what there is to choose, and score it on test images.

    Args:
        contender, seen, parts, seed: as for :func:`fit`.
        clean: the pool.
        noise: noisy images that count as clean where it is fitted, chosen and tested, of the size of what is seen; None
            to leave them out.
        tested: by name attacks, noise of their size, and their changes of other images; None to leave these out.

    Returns:
        What was chosen, and for each attack measures in [0, 1]: the area under the curve against what counts as clean,
        of successful attacks too, against noise alone, against the changes of other images, and of noise against clean
        images; above the threshold, how many of the attacks, of the successful ones, of clean images, of noise and of
        the changes of other images.
    """
    fitted, test = fit(contender, [clean] if noise is None else [clean, noise], seen, parts, seed), parts.test.numpy()
    measures = {}
    for other, (attack, as_large, exchanged) in tested.items():
        of_clean, of_attack, of_noise = (fitted.of([each], test) for each in (clean, attack, as_large))
        negative = of_clean if noise is None else np.concatenate([of_clean, of_noise])
        fooled = of_attack[attack.successful[attack.among(test)]]
        detected = {"detected": of_attack, "detected_successful": fooled}
        detected |= {"false_positives": of_clean, "noise_detected": of_noise}
        measures[other] = {
            "auroc": _auroc(negative, of_attack),
            "auroc_successful": _auroc(negative, fooled),
            "auroc_noise": _auroc(of_noise, of_attack),
            "noise_auroc": _auroc(of_clean, of_noise),
        }
        if exchanged is not None:
            detected["exchanged_detected"] = fitted.of([exchanged], test)
            measures[other]["auroc_exchanged"] = _auroc(detected["exchanged_detected"], of_attack)
        for name, of in detected.items():
            measures[other][name] = float((of > fitted.threshold).mean()) if len(of) else math.nan
    return f"{fitted.features}, {fitted.classifier}", measures


def _fitted(
    mode: str, classifier: Any, features: str, negatives: Sequence[Sample], seen: Sample, index: np.ndarray, seed: int
) -> Scorer:
    if mode == "clean":
        X, predicted = negatives[0].part(features, index)
        outliers = classifier.fit(X, predicted=predicted)
        return lambda X, predicted: -outliers.decision_function(X, predicted)
    sets = [sample.part(features, index) for sample in (*negatives, seen)]
    X, predicted = (np.concatenate(arrays) for arrays in zip(*sets, strict=True))
    y = np.repeat([0, 1], [len(X) - len(sets[-1][1]), len(sets[-1][1])])
    detector = Detector(classifier, mode=mode, random_state=seed).fit(X, y, predicted)  # type: ignore[arg-type]
    return detector.decision_function


def _auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """NaN where there are none of one kind."""
    if not (len(negative) and len(positive)):
        return float("nan")
    y = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(y, np.concatenate([negative, positive])))
