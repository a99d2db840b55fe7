"""Conformal p-values: scores among those of clean images that nothing was fitted to, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from odenets.errors import check_count, check_number, needs
from odenets.printing import shown

__all__ = [
    "Drift", "check_rate", "conformal_p_values", "conformal_threshold", "drift_test", "false_positive_interval",
]  # fmt: skip


def conformal_p_values(scores: Any, calibration: Any, *, ties: int | None = None) -> np.ndarray:
    """The share of calibration scores that are as large as each score, it itself counted::

        p = (1 + #{calibration scores >= s}) / (n + 1)

    Where a new score and the n calibration scores are exchangeable, as those of independent clean images are,
    ``P(p <= a) <= a`` for every a, over the draw of both; without ties p is uniform on ``1/(n+1), ..., 1``. With ties,
    as of scores that take few values, p is too large; drawn at random among the equal ones it is uniform again, on
    [0, 1]::

        p = (#{calibration scores > s} + u (1 + #{calibration scores = s})) / (n + 1),   u uniform in (0, 1]

    p-values of several new scores depend on each other, as they share the calibration scores, but positively: the
    procedure of Benjamini and Hochberg holds its rate of false discoveries (Bates et al., theorem 2).

    Args:
        scores: larger for what is foreign, ``(N,)``.
        calibration: scores of clean images that the score was not fitted to, ``(n,)``.
        ties: seed of the draws; equal scores count as larger if not given.

    Returns:
        p-values, ``(N,)`` float64 in (0, 1].

    Raises:
        ValueError: scores that are NaN or no vector, or no calibration score.

    References:
        Vovk, Gammerman, Shafer. Algorithmic learning in a random world. 2005. Bates, Candès, Lei, Romano, Sesia.
        Testing for outliers with conformal p-values. Annals of Statistics 51, 2023, arXiv:2104.08279.

    >>> conformal_p_values([0.5, 2.5, 9.0], calibration=[1.0, 2.0, 3.0])
    array([1.  , 0.5 , 0.25])
    """
    scores, calibration = _vector("scores", scores), np.sort(_vector("calibration", calibration))
    n = len(calibration)
    if n == 0:
        raise ValueError("calibration must hold at least one score, got none")
    as_large = n - np.searchsorted(calibration, scores, side="left")
    if ties is None:
        return (1 + as_large) / (n + 1)
    check_count("ties", ties, 0)
    larger = n - np.searchsorted(calibration, scores, side="right")
    u = 1 - np.random.default_rng(ties).random(len(scores))
    return (larger + u * (1 + as_large - larger)) / (n + 1)


def conformal_threshold(calibration: Any, false_positive_rate: float) -> float:
    """The score above which p-values are at most a ``false_positive_rate``: the k-th largest calibration score.

    ``k = floor(rate (n + 1))`` for n calibration scores.

    Raises:
        ValueError: a rate outside (0, 1), or below ``1 / (n + 1)``, which no p-value is.

    >>> conformal_threshold(range(99), 0.05)
    94.0
    """
    calibration = np.sort(_vector("calibration", calibration))
    return float(calibration[-_rank(len(calibration), false_positive_rate)])


def false_positive_interval(n: int, false_positive_rate: float, confidence: float = 0.9) -> tuple[float, float]:
    """Where the share of false alarms lies that a detector has, once its n calibration images are drawn.

    The chosen rate holds in the mean over the draws of calibration images. Of one detector the share of new clean
    images that it flags follows a beta distribution with ``k = floor(rate (n + 1))`` and ``n + 1 - k``, where scores
    have no ties (Vovk 2012, proposition 2).

    Args:
        n: calibration images.
        false_positive_rate: that was chosen.
        confidence: probability of the interval, in (0, 1), half of the rest on each side.

    Returns:
        Its ends.

    Raises:
        ValueError: a rate or a confidence outside (0, 1), or a rate below ``1 / (n + 1)``.

    References:
        Vovk. Conditional validity of inductive conformal predictors. ACML 2012, arXiv:1209.2673.

    >>> low, high = false_positive_interval(1000, 0.05)
    >>> round(low, 3), round(high, 3)
    (0.039, 0.062)
    """
    check_count("n", n, 1)
    if not 0 < check_number("confidence", confidence) < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    k = _rank(n, false_positive_rate)
    with needs("detection"):
        from scipy.stats import beta
    low, high = beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], k, n + 1 - k)
    return float(low), float(high)


@dataclass(frozen=True)
class Drift:
    """Tests of consecutive windows of p-values; :func:`drift_test` makes it.

    Attributes:
        window: p-values in each.
        statistics: the largest difference of the distributions, ``(windows,)`` in [0, 1].
        directions: -1 where p-values are too small, so that images are more foreign than clean ones, and 1 where they
            are too large, ``(windows,)``.
        p_values: of the test of each window alone, ``(windows,)``.
        corrected: for all windows together, up to each and whatever their number, ``(windows,)``.
        level: at which they are tested.
    """

    window: int
    statistics: np.ndarray
    directions: np.ndarray
    p_values: np.ndarray
    corrected: np.ndarray
    level: float

    __repr__ = shown

    @property
    def first(self) -> int | None:
        """The first window that has drifted, from 0; None if none has."""
        drifted = np.flatnonzero(self.corrected <= self.level)
        return int(drifted[0]) if len(drifted) else None

    def __bool__(self) -> bool:
        """Whether a window has drifted."""
        return self.first is not None

    def __str__(self) -> str:
        windows = f"{len(self.p_values)} windows of {self.window} images"
        if not len(self.p_values):
            return f"too few images for a window of {self.window}: drift was not tested"
        if self.first is None:
            return f"no drift in {windows} (smallest corrected p {self.corrected.min():.2g}, level {self.level:g})"
        more = "more foreign than" if self.directions[self.first] < 0 else "nearer to the middle than"
        begin = self.first * self.window
        where = f"images {begin} to {begin + self.window - 1} are {more} the clean ones"
        return f"drift: {where} (corrected p {self.corrected[self.first]:.2g}, level {self.level:g}; {windows})"


def drift_test(p_values: Any, calibration: Any, *, window: int = 200, level: float = 0.01) -> Drift:
    """Whether p-values, in the order in which they came, are still those of clean images.

    Each window of p-values is compared with those of the calibration images by the test of Kolmogorov and Smirnov for
    two samples. A test against the uniform distribution would be wrong: p-values share their calibration images, and
    are uniform over the draws of these, not for those that were drawn.

    The k-th window, from 1, is tested at ``level / (k (k + 1))``, which sum to the level however many windows come: the
    probability that a stream of clean images ever drifts is at most the level, and a later window changes nothing in
    what was said of earlier ones. p-values of a last window that is not full are left out.

    Args:
        p_values: conformal p-values without random ties, ``(N,)``.
        calibration: of the calibration images, in the same formula: ``conformal_p_values(scores, scores)``.
        window: p-values in a window.
        level: the probability of a false alarm, in (0, 1).

    Returns:
        The test of each window.

    Raises:
        ValueError: a window below 2, a level outside (0, 1), or p-values that are none.

    >>> numbers = np.random.default_rng(0)
    >>> calibration, clean, moved = numbers.normal(size=500), numbers.normal(size=400), numbers.normal(1, size=400)
    >>> p = conformal_p_values(np.concatenate([clean, moved]), calibration)
    >>> drift_test(p, conformal_p_values(calibration, calibration)).first
    2
    """
    check_count("window", window, 2)
    if not 0 < check_number("level", level) < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    p_values, calibration = _p_values("p_values", p_values), _p_values("calibration", calibration)
    if not len(calibration):
        raise ValueError("calibration must hold at least one p-value, got none")
    with needs("detection"):
        from scipy.stats import ks_2samp
    count = len(p_values) // window
    tests = [ks_2samp(part, calibration) for part in p_values[: count * window].reshape(count, window)]
    alone = np.array([test.pvalue for test in tests], dtype=float)
    k = np.arange(1, count + 1)
    return Drift(
        window,
        statistics=np.array([test.statistic for test in tests], dtype=float),
        directions=np.array([-int(test.statistic_sign) for test in tests], dtype=int),
        p_values=alone,
        corrected=np.minimum(alone * k * (k + 1), 1),
        level=float(level),
    )


def check_rate(false_positive_rate: Any) -> float:
    """The rate of false positives, in (0, 1).

    Raises:
        TypeError, ValueError: it is no number there.
    """
    rate = check_number("false_positive_rate", false_positive_rate)
    if not 0 < rate < 1:
        raise ValueError(f"false_positive_rate must lie in (0, 1), got {rate}")
    return float(rate)


def _rank(n: int, false_positive_rate: float) -> int:
    rate = check_rate(false_positive_rate)
    k = int(rate * (n + 1) + 1e-9)
    if k < 1:
        raise ValueError(
            f"false_positive_rate must be at least 1 / (n + 1) = {1 / (n + 1):.3g} with n = {n} calibration images, "
            f"got {rate:g}: {int(np.ceil(1 / rate - 1e-9)) - 1} of them have it"
        )
    return k


def _vector(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"{name} must hold scores (N,), none of them NaN, got shape {values.shape}")
    return values


def _p_values(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"{name} must hold p-values (N,) in (0, 1], got shape {values.shape}")
    return values
