"""Drift: whether conformal p-values, in the order in which they came, are still those of clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from odenets.detection.conformal import check_rate
from odenets.detection.vectors import vector
from odenets.errors import check_count, needs
from odenets.printing import shown

__all__ = ["Drift", "drift_test"]


@dataclass(frozen=True)
class Drift:
    """Tests of consecutive windows of p-values; :func:`drift_test` makes it.

    >>> drift_test(np.full(100, 0.01), np.linspace(0.01, 1, 100), window=50).first
    0

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
        TypeError, ValueError: a window below 2, a level outside (0, 1), or p-values that are none.

    >>> from odenets.detection import conformal_p_values
    >>> numbers = np.random.default_rng(0)
    >>> calibration, clean, moved = numbers.normal(size=500), numbers.normal(size=400), numbers.normal(1, size=400)
    >>> p = conformal_p_values(np.concatenate([clean, moved]), calibration)
    >>> drift_test(p, conformal_p_values(calibration, calibration)).first
    2
    """
    check_count("window", window, 2)
    check_rate(level, "level")
    p_values, calibration = _p_values("p_values", p_values), _p_values("calibration", calibration)
    if not len(calibration):
        raise ValueError("calibration must hold at least one p-value, got none")
    with needs("detection"):
        from scipy.stats import ks_2samp
    count = len(p_values) // window
    tests: list[Any] = [ks_2samp(part, calibration) for part in p_values[: count * window].reshape(count, window)]
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


def _p_values(name: str, values: Any) -> np.ndarray:
    p_values = vector(name, values, "p-values as of monitor.p_values(images)")
    if not ((p_values > 0) & (p_values <= 1)).all():
        raise ValueError(f"{name} must hold p-values (N,) in (0, 1], got shape {p_values.shape}")
    return p_values
