"""Choices on validation, scores on test."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from odenets.detection import Detector, Samples, choose_and_score, split

N = 300
PARTS = split(N, test=0.3, validation=0.3)


def samples(shift, seed, candidates=("poor", "good")):
    rng = np.random.default_rng(seed)
    scale = {"poor": 0.1, "good": 1.0}
    X = {name: rng.standard_normal((N, 2)) + scale[name] * shift for name in candidates}
    return Samples(X, rng.integers(3, size=N), PARTS, rng.random(N) < 0.5)


def test_the_better_candidate_is_chosen_and_scored_on_test_samples_alone():
    clean, seen, unseen = samples(0, 0), samples(3, 1), samples(1.5, 2)
    found = choose_and_score(clean, seen, {"seen": seen, "unseen": unseen}, estimator=LogisticRegression())
    assert found.candidate == "good"
    assert found.scores["seen"].auroc > found.scores["unseen"].auroc > 0.8
    assert found.curves["seen"].shape == (101,)
    assert np.trapezoid(found.curves["unseen"], dx=0.01) == pytest.approx(found.scores["unseen"].auroc, abs=0.02)
    changed = {name: x.copy() for name, x in seen.X.items()}
    for x in changed.values():
        x[PARTS.test.numpy()] = -9  # what is done to the test samples changes no choice
    again = choose_and_score(clean, replace(seen, X=changed), {"seen": seen}, estimator=LogisticRegression())
    assert (again.candidate, again.mode, again.validation) == (found.candidate, found.mode, found.validation)
    assert again.scores["seen"] == found.scores["seen"]


def test_scores_are_those_of_a_classifier_fitted_by_hand():
    clean, seen = samples(0, 0, ("good",)), samples(1, 1, ("good",))
    found = choose_and_score(clean, seen, {"": seen}, modes=["general"], estimator=LogisticRegression())
    fit, test = PARTS.fit.numpy(), PARTS.test.numpy()
    X = np.concatenate([clean.X["good"][fit], seen.X["good"][fit]])
    y = np.repeat([0, 1], len(fit))
    said = (
        LogisticRegression().fit(X, y).decision_function(np.concatenate([clean.X["good"][test], seen.X["good"][test]]))
    )
    truth = np.repeat([0, 1], len(test))
    assert found.scores[""].auroc == found.agnostic[""] == pytest.approx(roc_auc_score(truth, said))
    assert found.scores[""].accuracy == pytest.approx(((said > 0) == truth).mean())
    assert seen.successful is not None
    on_successful = said[len(test) :][seen.successful[test]]
    assert found.scores[""].detected_successful == pytest.approx((on_successful > 0).mean())


def test_noisy_samples_count_as_clean():
    """They lie where attacks would be looked for, were it not for their second feature."""
    clean, seen, noisy = (samples(shift, i, ("good",)) for i, shift in enumerate(np.array([[0, 0], [4, 0], [4, 4]])))
    told = choose_and_score(clean, seen, {"": seen}, noisy=noisy)
    plain = choose_and_score(clean, seen, {"noisy": noisy, "": seen})
    assert plain.noisy is None
    assert plain.scores["noisy"].detected > 0.9
    assert told.noisy is not None
    assert told.noisy < 0.1
    assert told.scores[""].detected > 0.9


@pytest.mark.parametrize("mode", ["general", "conditional", "ensemble"])
def test_every_mode_scores_as_a_detector_of_that_mode(mode):
    clean, seen = samples(0, 0, ("good",)), samples(1, 1, ("good",))
    found = choose_and_score(clean, seen, {"": seen}, modes=[mode], seed=5)
    fit, test = ([sample.of("good", part) for sample in (clean, seen)] for part in (PARTS.fit, PARTS.test))
    y = np.repeat([0, 1], len(PARTS.fit))
    detector = Detector(mode=mode, random_state=5).fit(
        np.concatenate([X for X, _ in fit]), y, np.concatenate([predicted for _, predicted in fit])
    )
    said = np.concatenate([detector.decision_function(*part) for part in test])
    assert found.mode == mode
    assert found.scores[""].auroc == roc_auc_score(np.repeat([0, 1], len(PARTS.test)), said)


def test_the_ensemble_is_fitted_once_for_all_modes(monkeypatch):
    clean, seen = samples(0, 0), samples(1, 1)
    fits = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *args: fits.append(1) or fit(self, *args))
    choose_and_score(clean, seen, {"": seen}, estimator=LogisticRegression())
    assert len(fits) == 2 * (1 + 3)  # for each candidate a general classifier, and one for each class


def test_errors():
    clean = samples(0, 0)
    with pytest.raises(ValueError, match=r"and no others, got \('general', 'special'\)"):
        choose_and_score(clean, clean, {}, modes=("general", "special"))
    with pytest.raises(ValueError, match="modes must hold"):
        choose_and_score(clean, clean, {}, modes=())
    with pytest.raises(ValueError, match="seen must have the features of the clean samples, it lacks poor"):
        choose_and_score(clean, samples(1, 1, ("good",)), {})
    with pytest.raises(ValueError, match="noisy must have the features"):
        choose_and_score(clean, clean, {}, noisy=samples(1, 1, ("good",)))
    with pytest.raises(ValueError, match="X must hold the features of at least one candidate"):
        replace(clean, X={})
    with pytest.raises(ValueError, match=r"X\['good'\] must hold one row for each of 300 predicted classes, got 299"):
        replace(clean, X={"good": clean.X["good"][1:]})
    with pytest.raises(ValueError, match="successful must hold one row for each"):
        replace(clean, successful=np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="parts must be of the 300 samples, got index 309"):
        replace(clean, parts=split(310, test=0.3, validation=0.3))


def test_copies_of_the_clean_samples_are_cut_as_these():
    """Otherwise a detector would be tested on images that it was fitted on."""
    clean, seen = samples(0, 0), samples(1, 1)
    other = replace(seen, parts=split(N, test=0.3, validation=0.3, seed=1))
    with pytest.raises(ValueError, match="seen must have the parts of the clean samples"):
        choose_and_score(clean, other, {"": other})
    fewer = Samples({name: x[:200] for name, x in seen.X.items()}, seen.predicted[:200], split(200, seed=1))
    assert choose_and_score(clean, seen, {"": fewer}).scores[""].auroc > 0.5
