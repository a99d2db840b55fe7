"""A test on the action that needs no adversarial data: quantiles of clean inputs [K24, fig. 21]."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np

from odenets.detection.estimators import BaseEstimator, OutlierMixin, check_is_fitted, validate_data

__all__ = ["QuantileTest"]


class QuantileTest(OutlierMixin, BaseEstimator):
    """Outliers are the samples whose sum of features lies outside quantiles of the samples it was fitted on.

    With the features of ``Trajectory("action")`` the sum is the action of the whole network.

    Args:
        level: share of the fitted samples that are called outliers, in (0, 1): the false-positive rate.
        side: "upper", sums that are too large; "lower"; or "both", half of the level on each side.

    Attributes:
        sums_: sorted sums of the samples it was fitted on.
        offset_: score below which a sample is an outlier.

    >>> import numpy as np
    >>> QuantileTest(0.1).fit(np.arange(100.0)[:, None]).predict([[50.0], [200.0]])
    array([ 1, -1])
    """

    def __init__(self, level: float = 0.05, *, side: Literal["upper", "lower", "both"] = "upper") -> None:
        self.level = level
        self.side = side

    def fit(self, X: Any, y: Any = None) -> QuantileTest:
        """Take the quantiles of clean features ``X`` ``(N, F)``; labels ``y`` are ignored.

        Fewer than ``1 / level`` samples, or ``2 / level`` for both sides, have no such quantile: a warning says so.

        Raises:
            ValueError: level outside (0, 1), an unknown side, or features that are not finite.
        """
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie in (0, 1), got {self.level}")
        if self.side not in ("upper", "lower", "both"):
            raise ValueError(f"side must be 'upper', 'lower' or 'both', got {self.side!r}")
        self.sums_ = np.sort(self._sums(X, reset=True))
        fewest = (1 + (self.side == "both")) / self.level
        if len(self.sums_) < fewest:
            warnings.warn(
                f"X holds {len(self.sums_)} samples, fewer than the {fewest:.0f} that level {self.level} asks for: of "
                "clean samples more will be called outliers",
                stacklevel=2,
            )
        self.offset_ = float(np.quantile(self._score(self.sums_), self.level, method="lower"))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Share of fitted samples that are as far out as each of ``X`` or farther, ``(N,)``.

        It would be 0 for every sample beyond the last fitted one: there the score is the negative excess over it.
        """
        check_is_fitted(self)
        return self._score(self._sums(X, reset=False))

    def decision_function(self, X: Any) -> np.ndarray:
        """:meth:`score_samples` of ``X`` minus the offset, ``(N,)``; negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """1 for inliers and -1 for outliers among ``X``, ``(N,)``."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _sums(self, X: Any, *, reset: bool) -> np.ndarray:
        sums = np.asarray(validate_data(self, X, dtype=np.float64, reset=reset)).sum(1)
        if not np.isfinite(sums).all():
            raise ValueError("X must have finite sums of features, got an overflow")
        return sums

    def _score(self, sums: np.ndarray) -> np.ndarray:
        if self.side == "upper":
            return self._tail(sums, self.sums_)
        if self.side == "lower":
            return self._tail(-sums, -self.sums_[::-1])
        return np.minimum(self._tail(sums, self.sums_), self._tail(-sums, -self.sums_[::-1]))

    @staticmethod
    def _tail(sums: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """Share of the sorted fitted sums at or above each; beyond the largest, minus the excess over their range.

        Equal ones have no range: their size, or 1, takes its place.
        """
        share = 1 - np.searchsorted(fitted, sums, side="left") / len(fitted)
        width = (fitted[-1] - fitted[0]) or abs(fitted[-1]) or 1.0
        return share - np.maximum(sums - fitted[-1], 0) / width
