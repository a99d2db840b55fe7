"""Statistics over seeds: means with Student-t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Interval", "correlation", "mean_interval", "paired", "paired_p_value", "percent"]


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval.

    A single value has no interval: its half-width is NaN, and it excludes nothing. Nor does the mean of values that are
    not all finite.

    Attributes:
        mean, half_width, n: of n values.
        values: one per seed, where they are known, so that the interval can be computed again.

    >>> f"{Interval(0.5, 0.25, 3):.2f}", f"{100 * Interval(0.5, 0.25, 3):.0f}"
    ('0.50 ± 0.25', '50 ± 25')
    """

    mean: float
    half_width: float
    n: int
    values: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def __format__(self, spec: str) -> str:
        """The mean and the half-width; the mean alone where there is one value."""
        return f"{self.mean:{spec}}" + (f" ± {self.half_width:{spec}}" if self.n > 1 else "")

    def __rmul__(self, factor: float) -> Interval:
        values = tuple(factor * v for v in self.values)
        return Interval(factor * self.mean, abs(factor) * self.half_width, self.n, values)

    def __contains__(self, value: float) -> bool:
        return not abs(value - self.mean) > self.half_width

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0; 0 where it holds 0, or where one value has none.

        >>> [Interval(mean, 1.0, 3).sign for mean in (-2, 0.5, 2)], Interval(2, math.nan, 1).sign
        ([-1, 0, 1], 0)
        """
        return (self.mean > self.half_width) - (self.mean < -self.half_width)

    def meets(self, other: Interval) -> bool:
        """Whether the two intervals have a point in common, or may have where one of them is unknown."""
        return not abs(self.mean - other.mean) > self.half_width + other.half_width


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student-t interval, ``mean +- t_{n-1} s / sqrt(n)``; NaN where values are not all finite.

    Args:
        values: one per seed, also an array or a tensor.

    Raises:
        ValueError: no values.
    """
    each = tuple(map(float, values))
    if not each:
        raise ValueError("values must hold at least one number")
    n = len(each)
    if n == 1:
        return Interval(each[0], math.nan, 1, each)
    if not all(map(math.isfinite, each)):
        return Interval(math.nan, math.nan, n, each)
    from scipy.stats import t

    quantile = float(t.ppf(0.975, n - 1))
    return Interval(statistics.fmean(each), quantile * statistics.stdev(each) / math.sqrt(n), n, each)


def paired_p_value(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test; 1 where all pairs are equal.

    Args:
        one, other: values of the same seeds, in the same order.

    Raises:
        ValueError: fewer than two pairs, or lists of two lengths.
    """
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(f"one and other must hold the same seeds, at least two, got {len(one)} and {len(other)}")
    from scipy.stats import ttest_rel

    if all(a == b for a, b in zip(one, other, strict=True)):
        return 1.0
    return float(ttest_rel(one, other).pvalue)  # type: ignore[attr-defined] - SciPy has no types for it


def correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Pearson's correlation and its two-sided p-value; 0 and 1 where either does not vary.

    Args:
        x, y: pairs, at least three.

    Raises:
        ValueError: fewer than three pairs, or lists of two lengths.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"x and y must hold the same number of values, at least three, got {len(x)} and {len(y)}")
    from scipy.stats import pearsonr

    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0, 1.0
    result = pearsonr(x, y)
    return float(result.statistic), float(result.pvalue)  # type: ignore[attr-defined] - SciPy has no types for it


def percent(values: Iterable[float]) -> Interval:
    """Mean and interval in percent of values that are shares."""
    return mean_interval([100 * value for value in values])


def paired(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Mean and interval of the differences of values of the same seeds."""
    return mean_interval([a - b for a, b in zip(one, other, strict=True)])
