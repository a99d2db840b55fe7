"""A Gaussian of clean features: how far an input's features lie from those of clean ones, told by these alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from odenets.detection.estimators import BaseEstimator, LedoitWolf, OutlierMixin, check_is_fitted, validate_data
from odenets.errors import check_number

__all__ = ["OneClassGaussian"]

SPREAD = 1e-10
"""Values that differ by less than this part of the largest are those of a constant."""


class OneClassGaussian(OutlierMixin, BaseEstimator):
    """Outliers are the samples whose features are far from the mean of clean ones, in units of their covariance.

    With z the features less their medians, over the distance of their quartiles (or over their standard deviation
    where more than half of the samples have one value), the score is the square of the Mahalanobis distance::

        d^2 = (z - mu_c)^T S^-1 (z - mu_c)

    where ``mu_c`` is the mean of the clean samples that the network predicts as the class c of this one, and S the
    covariance of all about these, shrunk towards a multiple of the identity as far as Ledoit and Wolf (2004) reckon
    that it lowers the error. Means of classes are drawn to that of all, as if ``prior`` samples of each had been
    there: that of a class that was never predicted is the mean of all.

    Args:
        conditional: whether each predicted class has a mean of its own; ``fit`` and the scores need the classes then.
        prior: how many samples the mean of all counts for in that of a class.
        level: share of the fitted samples that :meth:`predict` calls outliers, in (0, 1).

    Attributes:
        center_: median of each feature, ``(F,)``.
        scale_: distance of its quartiles, or its standard deviation where they are one; 1 of a constant; ``(F,)``.
        classes_: the predicted classes, sorted; empty unless conditional.
        means_: of each class, and last that of all, ``(classes + 1, F)``.
        precision_: the inverse of S, ``(F, F)``.
        shrinkage_: the weight of the identity in S, in [0, 1].
        offset_: the score below which a sample is an outlier.

    References:
        Ledoit, Wolf. A well-conditioned estimator for large-dimensional covariance matrices. Journal of Multivariate
        Analysis 88, 2004. Lee, Lee, Lee, Shin. A simple unified framework for detecting out-of-distribution samples
        and adversarial attacks. NeurIPS 2018, arXiv:1807.03888 (one covariance of all classes).

    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> gaussian = OneClassGaussian(conditional=False).fit(X)
    >>> gaussian.predict([[0.0, 0.0], [9.0, 9.0]])
    array([ 1, -1])
    """

    def __init__(self, *, conditional: bool = True, prior: float = 5.0, level: float = 0.05) -> None:
        self.conditional = conditional
        self.prior = prior
        self.level = level

    def fit(self, X: Any, y: Any = None, predicted: Any = None) -> OneClassGaussian:
        """Take the statistics of clean features.

        Args:
            X: features, ``(N, F)``.
            y: ignored.
            predicted: classes that the network predicts, whole numbers ``(N,)``; needed where it is conditional.

        Returns:
            Itself.

        Raises:
            ValueError: no predicted classes where they are needed, a negative prior, a level outside (0, 1), or
                features that are not finite or do not vary.
        """
        if not check_number("prior", self.prior) >= 0:
            raise ValueError(f"prior must not be negative, got {self.prior}")
        if not 0 < check_number("level", self.level) < 1:
            raise ValueError(f"level must lie in (0, 1), got {self.level}")
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        classes = self._checked(predicted, len(X))
        low, self.center_, high = np.quantile(X, [0.25, 0.5, 0.75], axis=0)
        rounding, spread = SPREAD * np.abs(X).max(0), X.std(0)
        self.scale_ = np.where(high - low > rounding, high - low, np.where(spread > rounding, spread, 1.0))
        z = self._scaled(X)
        self.classes_ = np.unique(classes)
        own = [z[classes == c] for c in self.classes_]
        mean = z.mean(0)
        self.means_ = np.stack([*((each.sum(0) + self.prior * mean) / (len(each) + self.prior) for each in own), mean])
        centered = z - self._means_of(classes, len(z))
        if np.abs(centered).max() <= SPREAD * np.abs(z).max():
            about = " of its predicted class" if self.conditional else ""
            raise ValueError(f"X must hold features that vary, got {len(X)} samples that are all at the mean{about}")
        covariance = LedoitWolf(assume_centered=True).fit(centered)
        self.precision_: np.ndarray = np.asarray(covariance.precision_)
        self.shrinkage_ = float(covariance.shrinkage_)
        self.offset_ = float(np.quantile(self._score(z, classes), self.level))
        return self

    def score_samples(self, X: Any, predicted: Any = None) -> np.ndarray:
        """Minus the squared distance of each of ``X`` ``(N, F)``, ``(N,)``; ``predicted`` is as for :meth:`fit`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self._score(self._scaled(X), self._checked(predicted, len(X)))

    def decision_function(self, X: Any, predicted: Any = None) -> np.ndarray:
        """:meth:`score_samples` of ``X`` minus the offset, ``(N,)``; negative for outliers.

        ``predicted`` is as for :meth:`fit`.
        """
        return self.score_samples(X, predicted) - self.offset_

    def predict(self, X: Any, predicted: Any = None) -> np.ndarray:
        """1 for inliers and -1 for outliers among ``X``, ``(N,)``; ``predicted`` is as for :meth:`fit`."""
        return np.where(self.decision_function(X, predicted) < 0, -1, 1)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        return (X - self.center_) / self.scale_

    def _score(self, z: np.ndarray, classes: np.ndarray) -> np.ndarray:
        centered = z - self._means_of(classes, len(z))
        return -(centered @ self.precision_ * centered).sum(1)

    def _means_of(self, classes: np.ndarray, samples: int) -> np.ndarray:
        """The mean for each sample, ``(N, F)``, that of all where its class was not fitted."""
        last = len(self.classes_)
        if not last:
            return np.broadcast_to(self.means_[-1], (samples, self.means_.shape[1]))
        place = np.searchsorted(self.classes_, classes).clip(max=last - 1)
        return self.means_[np.where(self.classes_[place] == classes, place, last)]

    def _checked(self, predicted: Any, samples: int) -> np.ndarray:
        """Predicted classes ``(N,)``; none where it is not conditional."""
        if not self.conditional:
            return np.empty(0, dtype=np.int64)
        if predicted is None:
            rule = "predicted must hold the predicted class of each sample, got none"
            raise ValueError(f"{rule}: OneClassGaussian(conditional=False) needs none")
        predicted = np.asarray(predicted)
        if predicted.shape != (samples,) or predicted.dtype.kind not in "iu":
            rule = f"predicted must hold a whole number for each sample, ({samples},)"
            raise ValueError(f"{rule}, got {predicted.dtype} of shape {predicted.shape}")
        return predicted
