"""Calibration: an outlier detector fitted to a part of clean features, and the scores of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from odenets.detection.estimators import clone, is_outlier_detector
from odenets.detection.one_class import OneClassGaussian

__all__ = ["check_outlier_detector", "fit_and_calibrate", "score_features"]


def fit_and_calibrate(
    detector: Any, X: np.ndarray, predicted: np.ndarray, *, share: float, false_positive_rate: float, seed: int
) -> tuple[Any, np.ndarray]:
    """A copy of a detector that is fitted to a part of clean features, and its scores of the others.

    Args:
        detector: of outliers, which stays as it is.
        X: clean features, ``(N, F)``.
        predicted: classes that the network predicts, ``(N,)``.
        share: of the samples that calibrate, in (0, 1).
        false_positive_rate: that these are to allow.
        seed: decides which do.

    Returns:
        The fitted copy, and sorted scores, ``(n,)``.

    Raises:
        ValueError: too few samples for the features or for the rate, or scores that are not finite.

    >>> detector = OneClassGaussian(conditional=False)
    >>> X, predicted = np.random.default_rng(0).normal(size=(100, 3)), np.zeros(100, int)
    >>> fitted, scores = fit_and_calibrate(detector, X, predicted, share=0.4, false_positive_rate=0.05, seed=0)
    >>> scores.shape
    (40,)
    """
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed)).numpy()
    calibrating, fitting = np.split(order, [round(share * len(X))])
    width = X.shape[1] if _takes_classes(detector) else 0  # other detectors may have a use for fewer images
    _check_counts(len(fitting), len(calibrating), width, false_positive_rate)
    fitted: Any = clone(detector)
    fitted.fit(X[fitting], **_classes(fitted, predicted[fitting]))
    return fitted, np.sort(score_features(fitted, X[calibrating], predicted[calibrating]))


def score_features(detector: Any, X: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Scores of features ``X`` ``(N, F)`` and ``predicted`` classes, ``(N,)``, larger for what is foreign.

    Raises:
        ValueError: a ``detector`` whose scores are not finite.
    """
    scores = -np.asarray(detector.score_samples(X, **_classes(detector, predicted)), dtype=float)
    if not np.isfinite(scores).all():
        raise ValueError(f"{_kind(detector)} must give finite scores, got NaN or infinity")
    return scores


def check_outlier_detector(detector: Any) -> None:
    """That a ``detector`` is one of outliers, whose samples have scores.

    Raises:
        TypeError: it is not.
    """
    rule, kind = "detector must be an outlier detector with score_samples, such as IsolationForest()", _kind(detector)
    if not (hasattr(detector, "__sklearn_tags__") and is_outlier_detector(detector)):
        raise TypeError(f"{rule}, got {kind}: a Detector of clean and attacked images is for Pipeline")
    if not hasattr(detector, "score_samples"):
        raise TypeError(f"{rule}, got {detector!r}, which has none: LocalOutlierFactor has with novelty=True")


def _kind(value: Any) -> str:
    return type(value).__name__


def _takes_classes(detector: Any) -> bool:
    return isinstance(detector, OneClassGaussian)


def _classes(detector: Any, predicted: np.ndarray) -> dict[str, np.ndarray]:
    return {"predicted": predicted} if _takes_classes(detector) else {}


def _check_counts(fitting: int, calibrating: int, features: int, false_positive_rate: float) -> None:
    """That clean images are enough for the features that are fitted to some, and the rate that others calibrate."""
    images = fitting + calibrating
    if calibrating < (least := int(np.ceil(1 / false_positive_rate - 1e-9)) - 1):
        raise ValueError(
            f"clean must hold more images: {calibrating} of {images} calibrate, and a false_positive_rate of "
            f"{false_positive_rate:g} needs {least}; the smallest that they have is {1 / (calibrating + 1):.3g}"
        )
    if fitting <= features:
        many = f", and there are {features} features, which need {features + 1}"
        why = many if features else ": calibration is to be less"
        raise ValueError(f"clean must hold more images: {fitting} of {images} fit the detector{why}")
