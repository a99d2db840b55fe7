"""Evaluation: disjoint parts of the data, scores of detectors, and the choice among features on validation samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odenets.detection.detector import MODES, Detector
from odenets.detection.estimators import roc_auc_score, roc_curve
from odenets.detection.vectors import vector
from odenets.printing import shown

__all__ = [
    "FALSE_POSITIVE_RATES",
    "Choice",
    "Parts",
    "Samples",
    "Scores",
    "choose_and_score",
    "detection_rates",
    "score",
    "split",
]

FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""The false-positive rates, 0 to 1 in steps of 0.01, at which the curves of a :class:`Choice` hold detection rates."""

_OF_DETECTORS = ("fit", "validation", "test")  # the parts of detectors; the other one is the network's


@dataclass(frozen=True)
class Parts:
    """Indices of samples, each part sorted, no two with an index in common; :func:`split` makes them.

    Attributes:
        train: what the network was trained on.
        fit: what the detector is fitted to (B1 of [K24] without its validation part).
        validation: where a detector, its features and their settings are chosen (in B1).
        test: where the chosen one is scored, once (B2).

    Raises:
        ValueError: a mask, negative numbers, or an index twice; a part without any, but for ``train``.
    """

    train: Tensor
    fit: Tensor
    validation: Tensor
    test: Tensor

    __repr__ = shown

    def __post_init__(self) -> None:
        parts = {name: set(index.tolist()) for name, index in vars(self).items()}
        for name, index in vars(self).items():
            if index.dtype == torch.bool or len(parts[name]) != len(index) or min(parts[name], default=0) < 0:
                raise ValueError(f"{name} must hold indices 0, 1, ..., none of them twice and no mask")
            if name != "train" and not len(index):
                raise ValueError(f"{name} must hold at least one index")
        for (one, a), (other, b) in combinations(parts.items(), 2):
            if shared := a & b:
                raise ValueError(f"{one} and {other} must be disjoint, they share {len(shared)} indices")


def split(samples: int, *, train: int = 0, test: float = 0.1, validation: float = 0.2, seed: int = 0) -> Parts:
    """Split samples once, by index: the first ``train`` for the network, the rest at random by the seed.

    Args:
        samples: how many there are.
        train: how many of the first the network was trained on; 0 where it was trained on other data.
        test: share of the rest for B2; 0.1 in [K24].
        validation: share of B1 for choosing.
        seed: decides which.

    Returns:
        The indices of each part.

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
    return Parts(torch.arange(train), *(part.sort().values for part in rest.split(sizes)))


@dataclass(frozen=True)
class Scores:
    """Scores of a detector on data that it was neither fitted nor chosen on; :func:`score` makes them. All in [0, 1].

    Attributes:
        accuracy: share of right answers, clean and adversarial samples together.
        auroc: area under the receiver operating characteristic.
        fpr95: false-positive rate where 95 % of the adversarial samples are detected.
        detected: share of the adversarial samples that are.
        detected_successful: share of those that fool the network which are; NaN if there is none.
        false_positives: share of the clean samples that are called adversarial.
    """

    accuracy: float
    auroc: float
    fpr95: float
    detected: float
    detected_successful: float
    false_positives: float


def score(
    clean: np.ndarray, adversarial: np.ndarray, *, threshold: float = 0.0, successful: np.ndarray | None = None
) -> Scores:
    """Score a detector by its scores of clean and of adversarial samples.

    Args:
        clean, adversarial: ``(N,)`` and ``(M,)``, larger for the adversarial.
        threshold: above which it detects.
        successful: which of the adversarial samples fool the network, ``(M,)`` of bool; all if not given.

    Returns:
        Accuracy, area under the curve, and rates.

    Raises:
        ValueError: no samples of either kind, scores that are not finite, or another number of ``successful``.

    >>> scores = score(np.array([-0.5, -0.2, 0.1, -0.4]), np.array([0.3, 0.4, -0.3, 0.2]))
    >>> scores.accuracy, scores.auroc, scores.detected, scores.false_positives
    (0.75, 0.875, 0.75, 0.25)
    """
    clean, adversarial = _finite("clean", clean), _finite("adversarial", adversarial)
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

    :func:`odenets.plotting.operating_characteristics` draws it.

    Args:
        clean, adversarial: scores ``(N,)`` and ``(M,)``, larger for the adversarial.

    Returns:
        The detection rate at each false-positive rate.

    Raises:
        ValueError: no samples of either kind, of which there is no curve, or scores that are not finite.

    >>> rates = detection_rates(np.array([-0.5, -0.2, 0.1, -0.4]), np.array([0.3, 0.4, -0.3, 0.2]))
    >>> rates.shape, float(rates[25]), float(rates[50])  # at 0.25 and 0.5
    ((101,), 0.75, 1.0)
    """
    clean, adversarial = _finite("clean", clean), _finite("adversarial", adversarial)
    y, scores = np.repeat([0, 1], [len(clean), len(adversarial)]), np.concatenate([clean, adversarial])
    false, true, _ = roc_curve(y, scores)
    return np.interp(FALSE_POSITIVE_RATES, false, true)


def _finite(name: str, scores: Any) -> np.ndarray:
    values = vector(name, scores)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{name} must hold finite scores (N,), at least one, got shape {values.shape}")
    return values


@dataclass(frozen=True)
class Samples:
    """Features and predictions of some samples, in the order of the indices of their parts.

    >>> samples = Samples({"residue": np.zeros((100, 4))}, np.zeros(100, int), split(100))
    >>> [array.shape for array in samples.part("residue", "test")]
    [(10, 4), (10,)]

    Attributes:
        X: features by candidate, each ``(N, F)``: kinds of features, or settings of one kind, to choose from.
        predicted: classes that the network predicts, ``(N,)``.
        parts: which samples are for fitting, choosing and testing.
        successful: which fool the network, ``(N,)`` of bool; all if None.

    Raises:
        ValueError: no candidate, or arrays and parts that are not of one number of samples.
    """

    X: Mapping[str, np.ndarray]
    predicted: np.ndarray
    parts: Parts
    successful: np.ndarray | None = None

    __repr__ = shown

    def __post_init__(self) -> None:
        if not self.X:
            raise ValueError("X must hold the features of at least one candidate")
        n = len(self.predicted)
        counts = {f"X[{name!r}]": len(x) for name, x in self.X.items()}
        if self.successful is not None:
            counts["successful"] = len(self.successful)
        for name, count in counts.items():
            if count != n:
                raise ValueError(f"{name} must hold one row for each of {n} predicted classes, got {count}")
        last = max(int(getattr(self.parts, part).max()) for part in _OF_DETECTORS)
        if last >= n:
            raise ValueError(f"parts must be of the {n} samples, got index {last}")

    def part(self, candidate: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of a ``candidate`` and predicted classes in the part ``name``, "fit", "validation" or "test"."""
        index = getattr(self.parts, name).numpy()
        return self.X[candidate][index], self.predicted[index]

    def successful_part(self, name: str) -> np.ndarray | None:
        """Which samples of the part ``name`` fool the network; None if all do."""
        return None if self.successful is None else self.successful[getattr(self.parts, name).numpy()]


@dataclass(frozen=True)
class Choice:
    """The chosen features and mode, and their scores; :func:`choose_and_score` makes it.

    Attributes:
        candidate: name of the chosen features.
        mode: of the detector, as :class:`Detector` has them.
        validation: its accuracy on validation samples.
        scores: on the test samples of each set, by its name.
        agnostic: area under the curve of the general detector on the same features and sets, as in [K24].
        curves: detection rates on the same sets at each of :data:`FALSE_POSITIVE_RATES`, ``(101,)``.
        noisy: share of the noisy test samples that are called adversarial; None without noisy samples.
    """

    candidate: str
    mode: str
    validation: float
    scores: dict[str, Scores]
    agnostic: dict[str, float]
    curves: dict[str, np.ndarray]
    noisy: float | None = None

    __repr__ = shown


def choose_and_score(
    clean: Samples,
    seen: Samples,
    tested: Mapping[str, Samples],
    *,
    modes: Sequence[str] = MODES,
    estimator: Any = None,
    noisy: Samples | None = None,
    seed: int = 0,
) -> Choice:
    """Fit a detector for every candidate and mode, choose the most accurate one on validation, score it on test.

    Args:
        clean: clean samples.
        seen: those that the detector is fitted on beside them, and chosen on.
        tested: sets that it is scored on, by name, each beside the clean test samples.
        modes: of the :class:`Detector`, to choose from: "general", "conditional" and "ensemble", or some of them.
        estimator: its classifier; a random forest if not given.
        noisy: samples that count as clean where it is fitted.
        seed: of the forest.

    Returns:
        The chosen candidate and mode, and their scores.

    Raises:
        ValueError: no modes or unknown ones, sets without the candidates of the clean samples, or sets as large as the
            clean ones, such as their adversarial copies, that are split otherwise, so that the detector would be tested
            on samples that it was fitted on.

    >>> parts, draws = split(100), np.random.default_rng(0)
    >>> X, predicted = draws.normal(0, 1, (100, 2)), np.zeros(100, int)
    >>> clean, seen = (Samples({"x": X + moved}, predicted, parts) for moved in (0, 9))
    >>> choice = choose_and_score(clean, seen, {"seen": seen}, modes=["general"])
    >>> choice.candidate, choice.mode, choice.scores["seen"].auroc
    ('x', 'general', 1.0)
    """
    if not modes or set(modes) - set(MODES):
        raise ValueError(f"modes must hold at least one of {', '.join(MODES)} and no others, got {tuple(modes)}")
    for name, samples in ({"seen": seen, **tested} | ({} if noisy is None else {"noisy": noisy})).items():
        alike = all(torch.equal(getattr(samples.parts, part), getattr(clean.parts, part)) for part in _OF_DETECTORS)
        if len(samples.predicted) == len(clean.predicted) and not alike:
            raise ValueError(f"{name} must have the parts of the clean samples, as many as it")
        if missing := set(clean.X) - set(samples.X):
            raise ValueError(f"{name} must have the features of the clean samples, it lacks {', '.join(missing)}")
    richest = "general" if set(modes) == {"general"} else "ensemble"  # it has the classifiers of all modes
    detectors, accuracies = {}, {}
    for candidate in clean.X:
        detectors[candidate] = Detector(estimator, mode=richest, random_state=seed)
        _fit(detectors[candidate], candidate, [clean] if noisy is None else [clean, noisy], seen)
        for mode in dict.fromkeys(each for each in ("general", *modes) if each in modes):
            scores = _scores(_in_mode(detectors[candidate], mode), candidate, [clean, seen], "validation")
            accuracies[candidate, mode] = score(*scores, successful=seen.successful_part("validation")).accuracy
    candidate, mode = max(accuracies, key=lambda key: accuracies[key])  # the first of equal ones
    detector, sets = _in_mode(detectors[candidate], mode), [clean, *tested.values()]
    of_clean, *of_tested = scores = _scores(detector, candidate, sets, "test")
    if mode != "general":
        scores = _scores(_in_mode(detector, "general"), candidate, sets, "test")
    return Choice(
        candidate,
        mode,
        accuracies[candidate, mode],
        scores={
            name: score(of_clean, x, successful=tested[name].successful_part("test"))
            for name, x in zip(tested, of_tested, strict=True)
        },
        agnostic={name: score(scores[0], x).auroc for name, x in zip(tested, scores[1:], strict=True)},
        curves={name: detection_rates(of_clean, x) for name, x in zip(tested, of_tested, strict=True)},
        noisy=None if noisy is None else float((_scores(detector, candidate, [noisy], "test")[0] > 0).mean()),
    )


def _fit(detector: Detector, candidate: str, clean: Sequence[Samples], seen: Samples) -> None:
    parts = [samples.part(candidate, "fit") for samples in (*clean, seen)]
    X, predicted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    adversarial = len(parts[-1][1])
    detector.fit(X, np.repeat([0, 1], [len(X) - adversarial, adversarial]), predicted)


def _in_mode(detector: Detector, mode: str) -> Detector:
    """The fitted detector in a mode that its classifiers allow."""
    return copy.copy(detector).set_params(mode=mode)


def _scores(detector: Detector, candidate: str, sets: Sequence[Samples], part: str) -> list[np.ndarray]:
    """The detector's scores of a part of each set, in one call: a forest takes longer to begin than to score."""
    parts = [samples.part(candidate, part) for samples in sets]
    X, predicted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return np.split(detector.decision_function(X, predicted), np.cumsum([len(x) for x, _ in parts])[:-1])
