"""Conformal p-values: scores among those of clean images that nothing was fitted to, and what follows from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from odenets.detection.vectors import vector
from odenets.errors import check_count, check_number, needs

__all__ = ["check_rate", "conformal_p_values", "conformal_threshold", "false_positive_interval"]


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
        TypeError, ValueError: scores that are NaN or no vector, or no calibration score.

    References:
        Vovk, Gammerman, Shafer. Algorithmic learning in a random world. 2005. Bates, Candès, Lei, Romano, Sesia.
        Testing for outliers with conformal p-values. Annals of Statistics 51, 2023, arXiv:2104.08279.

    >>> conformal_p_values([0.5, 2.5, 9.0], calibration=[1.0, 2.0, 3.0])
    array([1.  , 0.5 , 0.25])
    """
    scores, calibration = _scores("scores", scores), np.sort(_scores("calibration", calibration))
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

    ``k = floor(rate (n + 1))`` for the scores of n images in ``calibration``.

    Raises:
        TypeError, ValueError: scores that are none; a rate outside (0, 1), or below ``1 / (n + 1)``, as no p-value is.

    >>> conformal_threshold(range(99), 0.05)
    94.0
    """
    calibration = np.sort(_scores("calibration", calibration))
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
    check_rate(confidence, "confidence")
    k = _rank(n, false_positive_rate)
    with needs("detection"):
        from scipy.stats import beta
    low, high = beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], k, n + 1 - k)
    return float(low), float(high)


def check_rate(rate: Any, name: str = "false_positive_rate") -> float:
    """A ``rate``, in (0, 1); errors call it by ``name``.

    Raises:
        TypeError, ValueError: it is no number there.
    """
    if not 0 < check_number(name, rate) < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {rate}")
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


def _scores(name: str, values: Any) -> np.ndarray:
    scores = vector(name, values)
    if np.isnan(scores).any():
        raise ValueError(f"{name} must hold scores (N,), none of them NaN, got NaN")
    return scores
