"""The detector as an estimator of scikit-learn's kind."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Perceptron
from sklearn.utils.estimator_checks import check_estimator

from odenets.detection import Detector

RNG = np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore:Skipping check:sklearn.exceptions.SkipTestWarning")  # pandas, the array API
@pytest.mark.parametrize("detector", [Detector(), Detector(LogisticRegression())])
def test_check_estimator(detector):
    check_estimator(detector)


def by_class(n=400):
    """Two predicted classes whose clean and adversarial features are exchanged: no general detector tells them."""
    predicted, y = RNG.integers(2, size=n), RNG.integers(2, size=n)
    X = np.where(predicted == y, -1.0, 1.0)[:, None] + 0.1 * RNG.standard_normal((n, 1))
    return X, y, predicted


def test_the_general_detector_is_the_classifier():
    X, y = RNG.standard_normal((60, 3)), RNG.integers(2, size=60)
    found = Detector(random_state=3).fit(X, y)
    forest = RandomForestClassifier(random_state=3).fit(X, y)
    np.testing.assert_allclose(found.predict_proba(X), forest.predict_proba(X))
    np.testing.assert_array_equal(found.predict(X), forest.predict(X))


def test_the_conditional_detector_knows_what_the_general_one_cannot():
    (X, y, predicted), (X2, y2, predicted2) = by_class(), by_class()
    general = Detector(LogisticRegression()).fit(X, y)
    conditional = Detector(LogisticRegression(), mode="conditional").fit(X, y, predicted)
    assert (general.predict(X2) == y2).mean() < 0.65
    assert (conditional.predict(X2, predicted2) == y2).mean() == 1


def test_the_ensemble_detects_what_either_does():
    X, y, predicted = by_class()
    parts = {
        mode: Detector(LogisticRegression(), mode=mode).fit(X, y, predicted) for mode in ("general", "conditional")
    }
    ensemble = Detector(LogisticRegression(), mode="ensemble").fit(X, y, predicted)
    found = {mode: detector.predict(X, predicted) for mode, detector in parts.items()}
    np.testing.assert_array_equal(ensemble.predict(X, predicted), found["general"] | found["conditional"])


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
    found = Detector(LogisticRegression()).fit(X, ["clean", "clean", "fake", "fake"])
    assert found.predict([[-3.0], [4.0]]).tolist() == ["clean", "fake"]


def test_errors():
    X, y, predicted = by_class(20)
    with pytest.raises(ValueError, match="one class only"):
        Detector().fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="mode must be"):
        Detector(mode="either").fit(X, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="predicted must hold the predicted class"):
        Detector(mode="ensemble").fit(X, y)
    with pytest.raises(ValueError, match=r"predicted must hold one class per sample, \(20,\), got \(3,\)"):
        Detector(mode="ensemble").fit(X, y, predicted[:3])
    with pytest.raises(ValueError, match="must have predict_proba, got Perceptron"):
        Detector(Perceptron()).fit(X, y)
    with pytest.raises(ValueError, match="NaN"):
        Detector().fit(np.full((20, 1), np.nan), y)
