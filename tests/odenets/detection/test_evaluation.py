"""Parts that share nothing, and scores beside scikit-learn's and counts by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score

from odenets.detection import Parts, score, split

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
    with pytest.raises(ValueError, match="fit and test must be disjoint, they share 2 indices"):
        Parts(torch.arange(10, 12), one, torch.tensor([5]), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="validation must hold at least one"):
        Parts(one, one + 3, torch.tensor([], dtype=torch.long), one + 6)
    with pytest.raises(ValueError, match=r"shares in \(0, 1\)"):
        split(10, test=1.0)
    with pytest.raises(ValueError, match="train must be between"):
        split(10, train=10)
    for wrong in (torch.tensor([7, 7]), torch.tensor([-1]), torch.tensor([False])):
        with pytest.raises(ValueError, match=r"fit must hold indices 0, 1, \.\.\., none of them twice and no mask"):
            Parts(one, wrong, one + 3, one + 10)
    with pytest.raises(ValueError, match="fit must hold at least one"):
        split(40, test=0.9, validation=0.9)


def test_scores():
    clean, adversarial = RNG.standard_normal(300), RNG.standard_normal(200) + 1.5
    successful = RNG.random(200) < 0.5
    found = score(clean, adversarial, successful=successful)
    y, all_scores = np.repeat([0, 1], [300, 200]), np.concatenate([clean, adversarial])
    assert found.accuracy == pytest.approx(accuracy_score(y, all_scores > 0))
    assert found.auroc == pytest.approx(roc_auc_score(y, all_scores))
    assert found.detected == (adversarial > 0).mean()
    assert found.detected_successful == (adversarial[successful] > 0).mean()
    assert found.false_positives == (clean > 0).mean()
    ninety_five = np.sort(adversarial)[::-1][189]  # 190 of 200 lie at or above it
    assert found.fpr95 == pytest.approx((clean >= ninety_five).mean())
    even = np.arange(100)  # tied in pairs, so that the curve is a straight line
    assert score(even, even).fpr95 == pytest.approx(0.95)


def test_without_successful_attacks_there_is_no_rate():
    assert np.isnan(score(np.zeros(3), np.ones(2), successful=np.zeros(2, bool)).detected_successful)


def test_scores_are_checked():
    with pytest.raises(ValueError, match="clean must hold finite scores"):
        score(np.array([np.nan]), np.ones(2))
    with pytest.raises(ValueError, match="adversarial must hold finite scores"):
        score(np.zeros(2), np.array([]))
    with pytest.raises(ValueError, match="successful must hold one per"):
        score(np.zeros(2), np.ones(2), successful=np.ones(3, bool))


def test_indices_are_no_mask_and_a_threshold_is_a_number():
    with pytest.raises(ValueError, match="successful must hold True or False, no indices"):
        score(np.zeros(3), np.ones(2), successful=np.array([3, 5]))
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        score(np.zeros(3), np.ones(2), threshold=float("nan"))
