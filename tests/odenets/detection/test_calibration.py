"""Calibration: what is fitted does not calibrate, and the detector that is given stays as it is."""

import numpy as np
import pytest
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

from odenets.detection import OneClassGaussian
from odenets.detection.calibration import check_outlier_detector, fit_and_calibrate, score_features
from tests.odenets.detection.victims import refused

X, PREDICTED = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 3


@pytest.mark.parametrize("detector", [OneClassGaussian(), IsolationForest(random_state=0), OneClassSVM()], ids=repr)
def test_a_part_fits_and_the_others_calibrate(detector):
    fitted, scores = fit_and_calibrate(detector, X, PREDICTED, share=0.4, false_positive_rate=0.05, seed=1)
    assert scores.shape == (24,)
    assert not hasattr(detector, "offset_")
    all_scores = score_features(fitted, X, PREDICTED)
    calibrating = np.isin(all_scores, scores)
    assert calibrating.sum() == 24
    again = type(detector)(**detector.get_params())
    shuffled = X.copy()
    shuffled[calibrating] += 100  # which the fit has not seen
    moved, _ = fit_and_calibrate(again, shuffled, PREDICTED, share=0.4, false_positive_rate=0.05, seed=1)
    np.testing.assert_array_equal(score_features(moved, X, PREDICTED), all_scores)


def test_another_seed_calibrates_with_others():
    one, other = (
        fit_and_calibrate(OneClassGaussian(), X, PREDICTED, share=0.4, false_positive_rate=0.05, seed=seed)[1]
        for seed in range(2)
    )
    assert not np.array_equal(one, other)


def test_a_detector_that_scores_no_new_samples_is_refused():
    check_outlier_detector(LocalOutlierFactor(novelty=True))
    refused(
        "which has none: LocalOutlierFactor has with", check_outlier_detector, LocalOutlierFactor(), error=TypeError
    )
    refused("got object: a Detector", check_outlier_detector, object(), error=TypeError)
