"""Conformal p-values: uniform under exchangeability, thresholds, and the test of drift."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from odenets.detection import (
    Assessment,
    conformal_p_values,
    conformal_threshold,
    drift_test,
    false_positive_interval,
)
from tests.odenets.detection.victims import refused

NUMBERS = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(scores=NUMBERS, calibration=NUMBERS)
def test_p_values_are_the_formula_and_fall_with_the_score(scores, calibration):
    n, p = len(calibration), conformal_p_values(scores, calibration)
    assert p.tolist() == [(1 + sum(c >= s for c in calibration)) / (n + 1) for s in scores]
    assert (1 / (n + 1) <= p).all()
    assert (p <= 1).all()
    assert (np.diff(p[np.argsort(scores)]) <= 0).all()
    random = conformal_p_values(scores, calibration, ties=0)
    assert (random > 0).all()
    assert (random <= p).all()


@given(calibration=NUMBERS, rate=st.floats(0.01, 0.99), scores=NUMBERS)
def test_what_is_above_the_threshold_has_a_p_value_of_at_most_the_rate(calibration, rate, scores):
    n = len(calibration)
    if rate * (n + 1) < 1:
        refused(r"must be at least 1 / \(n \+ 1\)", conformal_threshold, calibration, rate)
        return
    flags = np.array(scores) > conformal_threshold(calibration, rate)
    assert (flags == (conformal_p_values(scores, calibration) <= rate + 1e-9)).all()


@given(scores=st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_every_rank_is_as_probable_as_another_under_exchangeability(scores):
    """Of all choices of the new one among exchangeable scores, at most a share a has a p-value of at most a."""
    scores = np.array(scores, dtype=float)
    p = np.array([conformal_p_values(scores[[i]], np.delete(scores, i))[0] for i in range(len(scores))])
    for a in np.unique(p):
        assert (p <= a).mean() <= a + 1e-12


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "with ties"])
def test_ten_splits_pooled_are_uniform(discrete):
    numbers, pooled = np.random.default_rng(0), []
    for seed in range(10):
        scores = numbers.chisquare(5, size=1000)
        scores = np.floor(scores) if discrete else scores
        pooled.append(conformal_p_values(scores[900:], scores[:900], ties=seed if discrete else None))
    assert stats.kstest(np.concatenate(pooled), "uniform").pvalue > 0.01
    if discrete:
        plain = conformal_p_values(scores[900:], scores[:900])
        assert plain.mean() > 0.53  # too large, never too small


def test_the_share_of_false_alarms_of_one_detector_lies_in_its_interval():
    numbers, n, rate = np.random.default_rng(0), 100, 0.1
    shares = []
    for _ in range(2000):
        threshold = conformal_threshold(numbers.random(n), rate)
        shares.append(1 - threshold)  # of uniform scores, exactly
    low, high = false_positive_interval(n, rate, 0.9)
    assert np.mean(shares) == pytest.approx(10 / 101, abs=0.003)
    assert np.mean((np.array(shares) >= low) & (np.array(shares) <= high)) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "with ties"])
def test_a_stream_of_clean_images_drifts_no_more_often_than_the_level(discrete):
    """As many images in a window as calibrate: a test against the uniform distribution would be far off."""
    numbers, alarms, naive, level = np.random.default_rng(0), [], [], 0.1
    for _ in range(300):
        scores = numbers.normal(size=500)
        scores = np.round(scores) if discrete else scores
        calibration = scores[:100]
        p = conformal_p_values(scores[100:], calibration)
        alarms.append(bool(drift_test(p, conformal_p_values(calibration, calibration), window=100, level=level)))
        naive.append(stats.kstest(p[:100], "uniform").pvalue <= level)
    assert np.mean(alarms) <= level + 0.05
    if not discrete:
        assert np.mean(naive) > 2 * level


def test_a_shift_is_told_with_its_window_and_direction():
    numbers = np.random.default_rng(0)
    calibration = numbers.normal(size=400)
    reference = conformal_p_values(calibration, calibration)
    for moved, direction in ((0.8, -1), (-0.8, 1)):
        scores = np.concatenate([numbers.normal(size=400), numbers.normal(moved, 1, size=250)])
        drift = drift_test(conformal_p_values(scores, calibration), reference, window=100)
        assert (drift.first, len(drift.p_values)) == (4, 6)  # what does not fill a window is left out
        assert drift.directions[4] == direction
        assert f"images 400 to 499 are {'more foreign' if direction < 0 else 'nearer'}" in str(drift)
    k = np.arange(1, 7)
    np.testing.assert_allclose(drift.corrected, np.minimum(drift.p_values * k * (k + 1), 1))
    still = drift_test(conformal_p_values(scores[:400], calibration), reference, window=100)
    assert not still
    assert str(still).startswith("no drift in 4 windows of 100 images")
    assert "too few images" in str(drift_test([0.5], reference, window=100))


def test_later_windows_change_nothing_in_what_was_said_of_earlier_ones():
    p, reference = np.random.default_rng(0).random(300), np.linspace(0.01, 1, 100)
    early, late = (drift_test(p[:end], reference, window=50) for end in (150, 300))
    np.testing.assert_array_equal(early.corrected, late.corrected[:3])


def test_discoveries_hold_their_rate():
    numbers, shares = np.random.default_rng(0), []
    for _ in range(200):
        scores = np.concatenate([numbers.normal(size=180), numbers.normal(4, 1, size=20)])
        p = conformal_p_values(scores, numbers.normal(size=1000))
        one = Assessment(np.arange(200), scores, p, p <= 0.05, np.zeros(200, int))
        called = one.discoveries(0.2)
        shares.append(called[:180].sum() / max(1, called.sum()))
        assert called[180:].mean() > 0.5
    assert np.mean(shares) <= 0.2


def test_discoveries_at_the_rate_itself_count_as_flags_do():
    p = np.array([1 / 20, 1.0])
    one = Assessment(np.arange(2), p, p, p < 1, np.zeros(2, int))
    assert one.discoveries(1 - 0.9).tolist() == [True, False]  # a little less than 0.1
    assert conformal_threshold(range(19), 1 - 0.9) == conformal_threshold(range(19), 0.1)


def test_errors():
    one = Assessment(*(np.ones(1) for _ in range(5)))
    refused(r"^rate must lie in \(0, 1\), got 2", one.discoveries, 2)
    refused("scores must hold scores .* got Assessment", conformal_p_values, one, [1.0], error=TypeError)
    refused("scores must hold scores", conformal_p_values, [np.nan], [1.0])
    with_gradients = torch.ones(1, requires_grad=True)
    refused("one array of numbers, got Tensor .*detach", conformal_p_values, with_gradients, [1.0], error=TypeError)
    refused("p_values must hold p-values .* got Tensor", drift_test, with_gradients, [1.0], error=TypeError)
    refused("got list .complex", conformal_p_values, [1.0], [1j], error=TypeError)
    refused("calibration must hold p-values .* got list .complex", drift_test, [1.0], [1j], error=TypeError)
    refused("calibration must hold at least one score, got none", conformal_p_values, [1.0], [])
    refused("with n = 9 calibration images, got 0.05: 19 of them have it", conformal_threshold, range(9), 0.05)
    refused(r"false_positive_rate must lie in \(0, 1\), got 1.5", conformal_threshold, range(9), 1.5)
    refused(r"confidence must lie in \(0, 1\), got 1", false_positive_interval, 100, 0.05, 1)
    refused("window must be at least 2, got 1", drift_test, [0.5], [0.5], window=1)
    refused(r"level must lie in \(0, 1\)", drift_test, [0.5], [0.5], level=0)
    refused(r"p_values must hold p-values \(N,\) in \(0, 1\]", drift_test, [0.0], [0.5])
    refused("calibration must hold at least one p-value", drift_test, [0.5], [])
