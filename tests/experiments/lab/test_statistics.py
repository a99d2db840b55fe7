import math

import numpy as np
import pytest
import torch
from scipy import stats

from lab.statistics import Interval, correlation, mean_interval, paired_p_value


def test_the_interval_is_scipys():
    values = [0.91, 0.94, 0.97, 0.90]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert 0.93 in found
    assert 0.99 not in found


def test_an_interval_holds_what_it_was_computed_from():
    found = mean_interval([0.91, 0.94, 0.97])
    assert found.values == (0.91, 0.94, 0.97)
    percent = 100 * found
    again = mean_interval(percent.values)
    assert (again.mean, again.half_width) == pytest.approx((percent.mean, percent.half_width))
    assert mean_interval([0.5]).values == (0.5,)
    assert Interval(0.5, 0.1, 3).values == ()  # of others' figures no values are known


def test_meeting_intervals():
    assert Interval(0.5, 0.1, 3).meets(Interval(0.65, 0.06, 3))
    assert not Interval(0.5, 0.1, 3).meets(Interval(0.65, 0.04, 3))


def test_one_value_has_no_interval():
    one = mean_interval([0.5])
    assert math.isnan(one.half_width)
    assert one.sign == 0
    assert 7.0 in one, "it excludes nothing"
    assert one.meets(Interval(7.0, 0.1, 3))
    assert Interval(7.0, 0.1, 3).meets(one)
    with pytest.raises(ValueError, match="at least one number"):
        mean_interval([])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_interval(bad):
    broken = mean_interval([1.0, bad, 2.0])
    assert math.isnan(broken.mean)
    assert math.isnan(broken.half_width)
    assert (broken.n, broken.sign, f"{broken:.1f}") == (3, 0, "nan ± nan")


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_values_may_be_arrays(kind):
    assert mean_interval(kind([1.0, 2.0, 4.0])) == mean_interval([1.0, 2.0, 4.0])


def test_the_paired_test_is_scipys():
    one, other = [1.0, 2.0, 4.0, 3.0], [1.5, 1.0, 3.0, 2.5]
    assert paired_p_value(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    differences = mean_interval([a - b for a, b in zip(one, other, strict=True)])
    assert (paired_p_value(one, other) < 0.05) == (0 not in differences)
    assert paired_p_value(one, one) == 1
    with pytest.raises(ValueError, match="at least two"):
        paired_p_value([1.0], [2.0])


def test_correlation_is_numpys():
    x, y = [1.0, 2.0, 4.0, 3.0], [1.5, 1.0, 3.0, 2.5]
    r, p = correlation(x, y)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert 0 < p < 1
    assert correlation(x, [1.0] * 4) == (0, 1)
    with pytest.raises(ValueError, match="at least three"):
        correlation([1.0, 2.0], [1.0, 2.0])
