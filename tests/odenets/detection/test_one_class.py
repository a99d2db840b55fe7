"""A Gaussian of clean features, beside the formula and scikit-learn's parts."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.utils.estimator_checks import check_estimator

from odenets.detection import OneClassGaussian
from tests.odenets.detection.victims import refused

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(60, 4)) @ NUMBERS.normal(size=(4, 4)) + NUMBERS.normal(size=4)
CLASSES = NUMBERS.integers(0, 3, 60) * 10
NEW = NUMBERS.normal(size=(7, 4))


@pytest.mark.filterwarnings("ignore:Skipping check:sklearn.exceptions.SkipTestWarning")  # pandas, the array API
def test_check_estimator():
    check_estimator(OneClassGaussian(conditional=False))


def test_the_score_is_the_formula():
    low, middle, high = np.percentile(X, [25, 50, 75], axis=0)
    z, new = (X - middle) / (high - low), (NEW - middle) / (high - low)
    plain = OneClassGaussian(conditional=False).fit(X)
    inverse = np.linalg.inv(LedoitWolf().fit(z).covariance_)
    expected = [-(row - z.mean(0)) @ inverse @ (row - z.mean(0)) for row in new]
    np.testing.assert_allclose(plain.score_samples(NEW), expected)

    means = {c: (z[c == CLASSES].sum(0) + 5 * z.mean(0)) / ((c == CLASSES).sum() + 5) for c in (0, 10, 20)}
    means[7] = z.mean(0)  # of a class that was never predicted
    centered = z - np.stack([means[c] for c in CLASSES])
    inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centered).covariance_)
    predicted = np.array([0, 10, 20, 7, 0, 10, 20])
    expected = [-(x - means[c]) @ inverse @ (x - means[c]) for x, c in zip(new, predicted, strict=True)]
    conditional = OneClassGaussian().fit(X, predicted=CLASSES)
    np.testing.assert_allclose(conditional.score_samples(NEW, predicted), expected)


def test_the_score_does_not_hang_on_the_units_of_features():
    units = np.array([1e-6, 1.0, 1e4, 3.0])
    a, b = (OneClassGaussian(conditional=False).fit(X * unit) for unit in (1.0, units))
    np.testing.assert_allclose(a.score_samples(NEW), b.score_samples(NEW * units), rtol=1e-6)


def test_a_feature_that_never_varies_tells_what_departs_from_it():
    constant = np.column_stack([X, np.full(60, 0.3)])
    gaussian = OneClassGaussian(conditional=False).fit(constant)
    same, other = (np.column_stack([X[:5], np.full(5, value)]) for value in (0.3, 1.3))
    assert np.isfinite(gaussian.score_samples(same)).all()
    assert (gaussian.score_samples(other) < gaussian.score_samples(same)).all()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_a_feature_that_rarely_varies_counts_in_its_own_units(unit):
    """Its quartiles are one: taken as it is, it would drown the others or go under, by its unit."""
    rare = np.where(np.arange(60) % 10, 0, np.linspace(-1, 1, 60))
    gaussian = OneClassGaussian(conditional=False).fit(np.column_stack([X, unit * rare]))
    expected = OneClassGaussian(conditional=False).fit(np.column_stack([X, rare]))
    new = np.column_stack([NEW, np.linspace(-2, 2, len(NEW))])
    units = np.append(np.ones(X.shape[1]), unit)
    np.testing.assert_allclose(gaussian.score_samples(new * units), expected.score_samples(new), rtol=1e-6)


def test_features_that_never_vary_are_refused():
    """Their covariance is 0 and so is its pseudo-inverse, by which nothing would be foreign."""
    constant = OneClassGaussian(conditional=False)
    refused("features that vary, got 60 samples that are all at the mean$", constant.fit, np.full((60, 2), 0.3))
    match = "features that vary, got 60 samples that are all at the mean of its predicted class$"
    refused(match, OneClassGaussian(prior=0).fit, CLASSES[:, None] / 3, predicted=CLASSES)
    rounded = np.random.default_rng(0).normal(size=(CLASSES.max() + 1, 4))[
        CLASSES
    ]  # their means are other numbers in the last digit
    refused(match, OneClassGaussian(prior=0).fit, rounded, predicted=CLASSES)


def test_errors():
    refused("predicted must hold the predicted class of each sample, got none", OneClassGaussian().fit, X)
    refused("a whole number for each sample", OneClassGaussian().fit, X, predicted=CLASSES[:3])
    refused("got float64", OneClassGaussian().fit, X, predicted=CLASSES / 2)
    refused("prior must not be negative, got -1", OneClassGaussian(prior=-1).fit, X, predicted=CLASSES)
    refused(r"level must lie in \(0, 1\), got 1", OneClassGaussian(level=1).fit, X, predicted=CLASSES)
    refused("NaN", OneClassGaussian(conditional=False).fit, np.full((5, 2), np.nan))
