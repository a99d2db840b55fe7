"""Disjoint parts, scores beside scikit-learn's and counts by hand, choices on validation samples."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score

from odenets.detection import Detector, Parts, Samples, choose_and_score, detection_rates, score, split
from tests.odenets.detection.victims import FOREST, refused

RNG = np.random.default_rng(0)


@given(
    samples=st.integers(60, 400),
    train=st.integers(0, 20),
    test=st.floats(0.1, 0.8),
    validation=st.floats(0.1, 0.8),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_and_all_there(samples, train, test, validation, seed):
    parts = split(samples, train=train, test=test, validation=validation, seed=seed)
    together = torch.cat([parts.train, parts.fit, parts.validation, parts.test])
    assert torch.equal(together.sort().values, torch.arange(samples))
    again = split(samples, train=train, test=test, validation=validation, seed=seed)
    assert torch.equal(parts.test, again.test)


def test_parts_that_overlap_are_refused():
    one = torch.arange(3)
    refused("fit and test must be disjoint, they share 2 indices", Parts, one + 10, one, torch.tensor([5]), one + 1)
    refused("validation must hold at least one", Parts, one, one + 3, torch.tensor([], dtype=torch.long), one + 6)
    refused(r"shares in \(0, 1\)", split, 10, test=1.0)
    refused("train must be between", split, 10, train=10)
    for wrong in (torch.tensor([7, 7]), torch.tensor([-1]), torch.tensor([False])):
        message = r"fit must hold indices 0, 1, \.\.\., none of them twice and no mask"
        refused(message, Parts, one, wrong, one + 3, one + 10)
    refused("fit must hold at least one", split, 40, test=0.9, validation=0.9)


def test_scores():
    clean, adversarial = RNG.standard_normal(300), RNG.standard_normal(200) + 1.5
    successful = RNG.random(200) < 0.5
    scores = score(clean, adversarial, successful=successful)
    y, all_scores = np.repeat([0, 1], [300, 200]), np.concatenate([clean, adversarial])
    assert scores.accuracy == pytest.approx(accuracy_score(y, all_scores > 0))
    assert scores.auroc == pytest.approx(roc_auc_score(y, all_scores))
    assert scores.detected == (adversarial > 0).mean()
    assert scores.detected_successful == (adversarial[successful] > 0).mean()
    assert scores.false_positives == (clean > 0).mean()
    assert np.isnan(score(clean, adversarial, successful=np.zeros(200, bool)).detected_successful)
    ninety_five = np.sort(adversarial)[::-1][189]  # 190 of 200 lie at or above it
    assert scores.fpr95 == pytest.approx((clean >= ninety_five).mean())
    even = np.arange(100)  # tied in pairs, so that the curve is a straight line
    assert score(even, even).fpr95 == pytest.approx(0.95)


@pytest.mark.parametrize("call", [score, detection_rates])
def test_scores_of_both_kinds_are_needed(call):
    """Of one kind scikit-learn's curve is NaN."""
    refused("clean must hold finite scores", call, [np.nan], [1, 1])
    refused("clean must hold finite scores", call, [], [1, 1])
    refused("adversarial must hold finite scores", call, [0, 0], [])
    refused("adversarial must hold scores .* got list .complex", call, [0, 0], [1, 1j], error=TypeError)
    with_gradients = torch.ones(2, requires_grad=True)
    refused("clean must hold scores .* got Tensor", call, with_gradients, [1, 1], error=TypeError)
    refused(r"clean must hold scores \(N,\), got shape \(1, 2\)", call, [[0, 0]], [1, 1])


def test_scores_are_checked():
    refused("successful must hold one per", score, [0, 0], [1, 1], successful=[True] * 3)
    refused("successful must hold True or False, no indices", score, [0, 0], [1, 1], successful=[3, 5])
    refused("threshold must be finite, got nan", score, [0, 0], [1, 1], threshold=np.nan)


N = 300
PARTS = split(N, test=0.3, validation=0.3)


def samples(shift, seed, candidates=("poor", "good")):
    rng = np.random.default_rng(seed)
    scale = {"poor": 0.1, "good": 1.0}
    X = {name: rng.standard_normal((N, 2)) + scale[name] * shift for name in candidates}
    return Samples(X, rng.integers(3, size=N), PARTS, rng.random(N) < 0.5)


def test_the_better_candidate_is_chosen_and_scored_on_test_samples_alone():
    clean, seen, unseen = samples(0, 0), samples(3, 1), samples(1.5, 2)
    choice = choose_and_score(clean, seen, {"seen": seen, "unseen": unseen}, estimator=LogisticRegression())
    assert choice.candidate == "good"
    assert choice.scores["seen"].auroc > choice.scores["unseen"].auroc > 0.8
    assert choice.curves["seen"].shape == (101,)
    assert np.trapezoid(choice.curves["unseen"], dx=0.01) == pytest.approx(choice.scores["unseen"].auroc, abs=0.02)
    changed = {name: x.copy() for name, x in seen.X.items()}
    for x in changed.values():
        x[PARTS.test.numpy()] = -9  # what is done to the test samples changes no choice
    again = choose_and_score(clean, replace(seen, X=changed), {"seen": seen}, estimator=LogisticRegression())
    assert (again.candidate, again.mode, again.validation) == (choice.candidate, choice.mode, choice.validation)
    assert again.scores["seen"] == choice.scores["seen"]


def test_noisy_samples_count_as_clean():
    """They lie where attacks would be looked for, were it not for their second feature."""
    clean, seen, noisy = (samples(shift, i, ("good",)) for i, shift in enumerate(np.array([[0, 0], [4, 0], [4, 4]])))
    noise_aware = choose_and_score(clean, seen, {"": seen}, noisy=noisy)
    plain = choose_and_score(clean, seen, {"noisy": noisy, "": seen})
    assert plain.noisy is None
    assert plain.scores["noisy"].detected > 0.9
    assert noise_aware.noisy is not None
    assert noise_aware.noisy < 0.1
    assert noise_aware.scores[""].detected > 0.9


@pytest.mark.parametrize("mode", ["general", "conditional", "ensemble"])
def test_every_mode_scores_as_a_detector_of_that_mode(mode):
    clean, seen = samples(0, 0, ("good",)), samples(1, 1, ("good",))
    choice = choose_and_score(clean, seen, {"": seen}, modes=[mode], estimator=FOREST)
    fit, test = ([sample.part("good", part) for sample in (clean, seen)] for part in ("fit", "test"))
    X, predicted = (np.concatenate(arrays) for arrays in zip(*fit, strict=True))
    detector = Detector(FOREST, mode=mode).fit(X, np.repeat([0, 1], len(PARTS.fit)), predicted)
    scores = score(*(detector.decision_function(*part) for part in test), successful=seen.successful_part("test"))
    general = score(*(detector.set_params(mode="general").decision_function(*part) for part in test))
    assert (choice.mode, choice.scores[""], choice.agnostic[""]) == (mode, scores, general.auroc)


def test_the_ensemble_is_fitted_once_for_all_modes(monkeypatch):
    clean, seen = samples(0, 0), samples(1, 1)
    fits = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *args: fits.append(1) or fit(self, *args))
    choose_and_score(clean, seen, {"": seen}, estimator=LogisticRegression())
    assert len(fits) == 2 * (1 + 3)  # for each candidate a general classifier, and one for each class


def test_sets_that_do_not_fit_are_refused():
    clean, good, choose = samples(0, 0), samples(1, 1, ("good",)), partial(choose_and_score, tested={})
    refused(r"and no others, got \('general', 'special'\)", choose, clean, clean, modes=("general", "special"))
    refused("modes must hold", choose, clean, clean, modes=())
    refused("seen must have the features of the clean samples, it lacks poor", choose, clean, good)
    refused("noisy must have the features", choose, clean, clean, noisy=good)
    refused("X must hold the features of at least one candidate", replace, clean, X={})
    X = {"good": clean.X["good"][1:]}
    refused(r"X\['good'\] must hold one row for each of 300 predicted classes, got 299", replace, clean, X=X)
    refused("successful must hold one row for each", replace, clean, successful=np.ones(3, dtype=bool))
    parts = split(310, test=0.3, validation=0.3)
    refused("parts must be of the 300 samples, got index 309", replace, clean, parts=parts)


def test_copies_of_the_clean_samples_are_cut_as_these():
    """Otherwise a detector would be tested on images that it was fitted on."""
    clean, seen = samples(0, 0), samples(1, 1)
    other = replace(seen, parts=split(N, test=0.3, validation=0.3, seed=1))
    refused("seen must have the parts of the clean samples", choose_and_score, clean, other, {"": other})
    fewer = Samples({name: x[:200] for name, x in seen.X.items()}, seen.predicted[:200], split(200, seed=1))
    assert choose_and_score(clean, seen, {"": fewer}, estimator=LogisticRegression()).scores[""].auroc > 0.5
