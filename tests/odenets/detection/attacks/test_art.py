"""Attacks of ART."""

import numpy as np
import pytest
import torch
from torch import nn

from odenets.detection import Attack, preset, run_attack
from odenets.detection.attacks import art
from tests.odenets.detection.victims import refused, victim


def test_hop_skip_jump_ends_where_rounding_lets_no_step_succeed():
    """The first point is adversarial until ART has taken it, and then nothing is: ART would halve without end."""
    first = np.ones((1, 2, 2), dtype=np.float32)
    queries = []

    def adversarial(points):
        queries.append(1)
        return np.full(len(points), len(queries) <= 3 and np.array_equal(points[0], first))

    settings = {"max_iter": 2, "max_eval": 10, "init_eval": 10}
    point = art.decision_attack("HSJ", settings, adversarial, np.zeros_like(first), [first])
    assert np.array_equal(point, first)


def test_without_a_first_adversarial_point_there_is_no_result():
    x = np.zeros((1, 2, 2))
    assert art.decision_attack("BA", {}, lambda points: points[:, 0, 0, 0] > 1, x, [x + 1]) is None


def test_art_and_the_preset_agree_on_what_autoattack_is_made_of(batch):
    """As the docstring says: two Auto-PGDs without targets, DeepFool in L2 in the place of FAB, Square."""
    library = art.load_art()
    options = {"input_shape": (1, 8, 8), "nb_classes": 10, "clip_values": (0, 1), "device_type": "cpu"}
    estimator = library.estimators.classification.PyTorchClassifier(victim(), loss=nn.CrossEntropyLoss(), **options)
    parts = library.attacks.evasion.AutoAttack(estimator).attacks
    names = [type(part).__name__ for part in parts]
    assert names == ["AutoProjectedGradientDescent", "AutoProjectedGradientDescent", "DeepFool", "SquareAttack"]
    assert [part.loss_type for part in parts[:2]] == ["cross_entropy", "difference_logits_ratio"]
    assert [(part.targeted, part.nb_random_init, part.max_iter) for part in parts[:2]] == [(False, 5, 100)] * 2
    assert (parts[2].epsilon, parts[3].nb_restarts, parts[3].p_init) == (1e-3, 5, 0.8)


@pytest.mark.parametrize("size", [(8, 8), (5, 5), (4, 4), (2, 9), (6, 7), (9, 24)])
def test_autoattack_is_refused_where_squares_do_not_fit_into_the_images(size):
    """ART's Square draws their place from an empty range there."""
    squares = art.load_art().attacks.evasion.SquareAttack(box(size), max_iter=1, nb_restarts=1, verbose=False)
    images = np.random.default_rng(0).random((2, 1, *size)).astype(np.float32)
    try:
        squares.generate(images, np.eye(3, dtype=np.float32)[[0, 0]])
    except ValueError:
        refused(r"AA moves squares of \d+ pixels about in images, got images of", art.check_squares, {}, *size)
    else:
        art.check_squares({}, *size)
    refused("squares of 9 pixels .* pad them to squares of 14 pixels", art.check_squares, {"norm": 2}, 9, 9)
    art.check_squares({"norm": 2}, 14, 14)
    art.check_squares({}, 6, 6)
    refused("squares of 5 pixels", art.check_squares, {"norm": 2}, 5, 5)  # its sides are odd


def box(size):
    """Answers class 0 whatever comes, so that no attack ends early."""
    answer = np.eye(3, dtype=np.float32)[0]
    options = {"input_shape": (1, *size), "nb_classes": 3, "clip_values": (0, 1)}
    kind = art.load_art().estimators.classification.BlackBoxClassifierNeuralNetwork
    return kind(lambda x: np.tile(answer, (len(x), 1)), **options)


def test_another_attack_of_art_needs_its_class_and_settings(batch, monkeypatch):
    monkeypatch.setitem(art.CLASSES, "PGD", "ProjectedGradientDescent")
    settings = (("eps", 0.2), ("eps_step", 0.05), ("max_iter", 5))
    result = run_attack(victim(), Attack("PGD", settings), *batch)
    assert result.linf.max() <= 0.2 + 1e-6
    assert result.success_rate > 0.5


@pytest.mark.parametrize("nb_grads", [3, 10])
def test_deepfool_asks_for_gradients_of_images_that_have_moved_alone_and_finds_the_same_ones(
    batch, nb_grads, monkeypatch
):
    def attack(*, apart):
        asked = []
        monkeypatch.setattr(art, "treats_apart", lambda network: apart)
        gradient = art.load_art().estimators.classification.PyTorchClassifier.class_gradient
        with monkeypatch.context() as patched:
            patched.setattr(
                art.load_art().estimators.classification.PyTorchClassifier,
                "class_gradient",
                lambda self, x, label=None, **options: asked.append(len(x)) or gradient(self, x, label, **options),
            )
            return run_attack(victim(), preset("DF", max_iter=30, nb_grads=nb_grads), *batch).images, sum(asked)

    (images, asked), (expected, all_asked) = attack(apart=True), attack(apart=False)
    assert torch.allclose(images, expected, atol=1e-6)
    assert asked < all_asked / 2


def test_a_network_that_mixes_a_batch_is_asked_for_gradients_of_all_of_it(batch, monkeypatch):
    monkeypatch.setattr(art, "_of_moved", None)  # what would fail if it was called
    mixing = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 10))
    assert run_attack(mixing, preset("DF", max_iter=2), *batch).images.isfinite().all()
