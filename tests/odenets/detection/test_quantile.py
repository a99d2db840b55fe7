"""The test on the action alone."""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from odenets.detection import QuantileTest
from tests.odenets.detection.victims import refused

RNG = np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore:Skipping check:sklearn.exceptions.SkipTestWarning")  # pandas, the array API
@pytest.mark.filterwarnings("ignore:X holds")  # which some of its checks mean to
@pytest.mark.parametrize("side", ["upper", "lower", "both"])
def test_check_estimator(side):
    check_estimator(QuantileTest(side=side))


@pytest.mark.parametrize("side", ["upper", "lower", "both"])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_the_level_is_the_false_positive_rate(side, level):
    clean, new = RNG.standard_normal((2, 20_000, 3))
    test = QuantileTest(level, side=side).fit(clean)
    assert (test.predict(clean) == -1).mean() <= level
    assert (test.predict(new) == -1).mean() == pytest.approx(level, rel=0.15)


def test_thresholds_are_quantiles_of_the_sum():
    clean = RNG.standard_normal((999, 2))
    test = QuantileTest(0.1).fit(clean)
    sums = np.linspace(-3, 3, 500)
    outlying = test.predict(np.stack([sums, np.zeros(500)], 1)) == -1
    np.testing.assert_allclose(sums[outlying].min(), np.quantile(clean.sum(1), 0.9), atol=0.05)
    assert np.diff(outlying.astype(int)).min() >= 0  # once outlying, always


def test_what_is_farther_out_scores_lower():
    test = QuantileTest().fit(np.arange(100.0)[:, None])
    scores = test.score_samples([[98.0], [99.0], [100.0], [150.0], [1e6]])
    assert (np.diff(scores) < 0).all()


def test_too_few_samples_for_a_level_give_a_warning():
    with pytest.warns(UserWarning, match=r"X holds 20 samples, fewer than the 50 that level 0.04 asks for"):
        QuantileTest(0.04, side="both").fit(np.arange(20.0)[:, None])


def test_errors():
    with np.errstate(over="ignore"):
        refused("X must have finite sums", QuantileTest(0.5).fit, np.full((4, 2), 1.5e308))
    refused(r"level must lie in \(0, 1\), got 1.5", QuantileTest(1.5).fit, [[0.0], [1.0]])
    refused("side must be", QuantileTest(side="left").fit, [[0.0], [1.0]])


@pytest.mark.parametrize("value", [0.0, 1e-300, 5.0, -5.0, 1e300])
def test_equal_sums_have_finite_scores(value):
    test = QuantileTest().fit(np.full((40, 1), value))
    with np.errstate(all="raise"):
        scores = test.decision_function(value + np.array([[0.0], [1.0], [2.0]]) * (abs(value) or 1.0))
    assert np.isfinite(scores).all()
    assert scores[0] >= 0 > scores[1] > scores[2]
