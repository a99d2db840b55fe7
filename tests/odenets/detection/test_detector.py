"""The detector as an estimator of scikit-learn's kind."""

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Perceptron
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from odenets.detection import Detector
from tests.odenets.detection.victims import FOREST, refused

RNG = np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore:Skipping check:sklearn.exceptions.SkipTestWarning")  # pandas, the array API
@pytest.mark.parametrize("detector", [Detector(FOREST), Detector(LogisticRegression())])
def test_check_estimator(detector):
    check_estimator(detector)


def by_class(n=400):
    """Two predicted classes whose clean and adversarial features are exchanged: no general detector tells them."""
    predicted, y = RNG.integers(2, size=n), RNG.integers(2, size=n)
    X = np.where(predicted == y, -1.0, 1.0)[:, None] + 0.1 * RNG.standard_normal((n, 1))
    return X, y, predicted


def test_the_general_detector_is_the_classifier():
    X, y = RNG.standard_normal((60, 3)), RNG.integers(2, size=60)
    detector = Detector(random_state=3).fit(X, y)
    forest = RandomForestClassifier(random_state=3).fit(X, y)
    np.testing.assert_allclose(detector.predict_proba(X), forest.predict_proba(X))
    np.testing.assert_array_equal(detector.predict(X), forest.predict(X))


def test_the_conditional_detector_knows_what_the_general_one_cannot():
    (X, y, predicted), (X2, y2, predicted2) = by_class(), by_class()
    general = Detector(LogisticRegression()).fit(X, y)
    conditional = Detector(LogisticRegression(), mode="conditional").fit(X, y, predicted)
    assert (general.predict(X2) == y2).mean() < 0.65
    assert (conditional.predict(X2, predicted2) == y2).mean() == 1


def test_the_ensemble_detects_what_either_does():
    X, y, predicted = by_class()
    general, conditional, ensemble = (
        Detector(LogisticRegression(), mode=mode).fit(X, y, predicted).predict(X, predicted)
        for mode in ("general", "conditional", "ensemble")
    )
    np.testing.assert_array_equal(ensemble, general | conditional)


def test_a_class_with_one_side_alone_falls_back_on_the_general_detector():
    X, y, predicted = by_class()
    predicted[predicted == 1] = np.where(y[predicted == 1] == 1, 2, 1)  # class 1 is all clean, class 2 all adversarial
    detector = Detector(LogisticRegression(), mode="conditional").fit(X, y, predicted)
    assert set(detector.conditional_) == {0}
    of = (predicted == 1) | (predicted == 2)
    general = Detector(LogisticRegression()).fit(X, y)
    np.testing.assert_array_equal(detector.predict(X[of], predicted[of]), general.predict(X[of]))
    unseen = np.full(len(X), 7)
    np.testing.assert_array_equal(detector.predict(X, unseen), general.predict(X))


def test_labels_of_any_two_kinds():
    X = np.array([[0.0], [0.1], [1.0], [1.1]])
    detector = Detector(LogisticRegression()).fit(X, ["clean", "clean", "fake", "fake"])
    assert detector.predict([[-3.0], [4.0]]).tolist() == ["clean", "fake"]


def routed(mode):
    detector = Detector(LogisticRegression(), mode=mode)
    detector = detector.set_fit_request(predicted=True).set_score_request(predicted=True)
    return detector.set_predict_request(predicted=True).set_decision_function_request(predicted=True)


@pytest.mark.parametrize("mode", ["conditional", "ensemble"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_cross_validation_hands_on_the_predicted_classes(mode, kind):
    X, y, predicted = by_class(90)
    folds = list(KFold(3).split(X))
    expected = []
    for fit, test in folds:
        detector = Detector(LogisticRegression(), mode=mode).fit(X[fit], y[fit], predicted[fit])
        expected.append((detector.predict(X[test], predicted[test]) == y[test]).mean())
    with config_context(enable_metadata_routing=True):
        params = {"predicted": kind(predicted)}
        scores = cross_validate(clone(routed(mode)), X, y, cv=folds, params=params, return_train_score=True)
    np.testing.assert_allclose(scores["test_score"], expected)
    assert np.isfinite(scores["train_score"]).all()


def test_a_search_over_modes_finds_the_conditional_one():
    X, y, predicted = by_class(120)
    with config_context(enable_metadata_routing=True):
        search = GridSearchCV(routed("general"), {"mode": ["general", "conditional"]}, cv=3)
        search.fit(X, y, predicted=predicted)
        assert search.best_params_ == {"mode": "conditional"}
        assert search.best_score_ == search.score(X, y, predicted=predicted) == 1


def test_a_pipeline_hands_on_the_predicted_classes():
    X, y, predicted = by_class(90)
    with config_context(enable_metadata_routing=True):
        steps = make_pipeline(StandardScaler(), routed("conditional")).fit(X, y, predicted=predicted)
        assert steps.score(X, y, predicted=predicted) == 1
        np.testing.assert_array_equal(steps.predict(X, predicted=predicted), y)
        assert steps.decision_function(X, predicted=predicted).shape == (90,)


def test_cross_validation_without_the_predicted_classes_names_the_remedy():
    X, y, _ = by_class(30)
    match, detector = (
        "predicted must hold.*enable_metadata_routing=True.*set_score_request",
        Detector(mode="conditional"),
    )
    refused(match, cross_val_score, detector, X, y, cv=3, error_score="raise")


def test_the_score_is_the_weighted_accuracy():
    X, y, predicted = by_class(40)
    detector = Detector(LogisticRegression(), mode="conditional").fit(X, y, predicted)
    weights = RNG.random(40)
    right = detector.predict(X, 1 - predicted) == y
    assert detector.score(X, y, 1 - predicted) == pytest.approx(right.mean())
    weighted = detector.score(X, y, predicted=1 - predicted, sample_weight=weights)
    assert weighted == pytest.approx((right * weights).sum() / weights.sum())


def test_a_mode_that_it_was_not_fitted_for_is_refused():
    X, y, predicted = by_class(40)
    detector = Detector(LogisticRegression()).fit(X, y)
    conditional = clone(detector).fit(X, y).set_params(mode="conditional")
    refused("mode is 'conditional' and was 'general' when fitted: fit it again", conditional.predict, X, predicted)
    ensemble = Detector(LogisticRegression(), mode="ensemble").fit(X, y, predicted)
    np.testing.assert_array_equal(ensemble.set_params(mode="general").predict(X), detector.predict(X))


@pytest.mark.parametrize("mode", ["general", "conditional"])
def test_probabilities_that_are_not_finite_are_refused(mode):
    """Of a feature without variance naive Bayes gives NaN, which is above no threshold: all would pass for clean."""
    X, y, predicted = by_class(40)
    detector = Detector(GaussianNB(var_smoothing=0), mode=mode)
    with np.errstate(all="ignore"):

        def fit_and_predict():
            detector.fit(X * 0, y, predicted).predict(X, predicted)

        refused("estimator must give finite probabilities, got NaN from GaussianNB", fit_and_predict)


def test_a_class_that_is_too_small_for_the_estimator_is_named_when_it_is_fitted():
    X, y, predicted = by_class(40)
    predicted[[np.argmax(y == 0), np.argmax(y == 1)]] = 7
    match = "the 2 samples of predicted class 7: choose another or mode='general' .*n_neighbors"
    refused(match, Detector(KNeighborsClassifier(5), mode="conditional").fit, X, y, predicted)


def test_errors():
    X, y, predicted = by_class(20)
    refused("one class only", Detector().fit, X, np.zeros(20))
    refused("mode must be", Detector(mode="either").fit, X, y)
    refused("predicted must hold the predicted class", Detector(mode="ensemble").fit, X, y)
    match = r"predicted must hold one class per sample, \(20,\), got \(3,\)"
    refused(match, Detector(mode="ensemble").fit, X, y, predicted[:3])
    for classes in (["a"] * 20, np.full(20, 0.5), np.full(20, np.nan)):
        refused("predicted must hold classes as whole numbers", Detector(mode="conditional").fit, X, y, classes)
    refused("must have predict_proba, got Perceptron", Detector(Perceptron()).fit, X, y)
    refused("NaN", Detector().fit, np.full((20, 1), np.nan), y)
