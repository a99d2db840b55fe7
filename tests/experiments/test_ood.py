"""The study of foreign images, on a few digits and on planted scores."""

from dataclasses import replace

import numpy as np
import ood_setup
import pytest
import torch
from ood import EXPERIMENT, compare
from ood_scores import COVERAGE, LAST, PATH, PathDistance, joined, measured, scores_of
from ood_setup import NEAR, ODIN_SETTINGS, PATHS, POOL, TRAIN, Config, data, phases, read, sets_of
from ood_tables import BEST, JOINED
from pytorch_ood.detector import ODIN
from scipy.special import logsumexp, softmax
from sklearn.covariance import ledoit_wolf
from torch import nn

from lab.experiment import run
from lab.pretrained.resnets import ResNet
from odenets import adapt
from odenets.detection import Trajectory
from odenets.training.runs import read_summary

TINY = Config(network="digits", train=100, pool=60, foreign=40, seeds=(0, 1), held=0.3, epochs=1, workers=1)


def test_a_run_leaves_a_row_for_every_score_and_set(tmp_path):
    run(EXPERIMENT, replace(TINY, output=tmp_path))
    rows = read_summary(tmp_path / "digits")["results"]["rows"]
    names = (*LAST, COVERAGE, PATH, BEST, JOINED)
    assert [(row["images"], row["score"]) for row in rows] == [(s, n) for s in (NEAR, "far", "textures") for n in names]
    assert all(0 <= row[key]["mean"] <= 100 for row in rows for key in ("auroc", "fpr95"))
    assert all(("difference" in row) == (row["score"] != BEST) for row in rows)
    text = (tmp_path / "digits" / "table.md").read_text()
    assert "the trajectory alone" in text
    assert (tmp_path / "digits" / "figures" / "auroc.png").exists()
    scores = compare(replace(TINY, output=tmp_path), 0)
    assert scores == compare(replace(TINY, output=tmp_path), 0)
    assert scores != compare(replace(TINY, output=tmp_path), 1)


def test_sets_are_apart_by_index():
    sets = sets_of(replace(TINY, pool=100, foreign=1000))
    _, test = data(TINY)
    index = {image.numpy().tobytes(): i for i, image in enumerate(test.x)}
    pool = {index[image.numpy().tobytes()] for image in sets[POOL].x}
    turned = {index[image.rot90(-1, (1, 2)).numpy().tobytes()] for image in sets[NEAR].x}
    assert len(pool) == len(turned) == 100
    assert not pool & turned
    seen = {image.numpy().tobytes() for image in sets[TRAIN].x}
    assert not seen & {image.numpy().tobytes() for image in sets[POOL].x}
    for images in sets.values():
        torch.testing.assert_close((images.x * 255).round() / 255, images.x, rtol=0, atol=0.002)


def test_textures_keep_amplitudes_means_and_colors():
    x = 0.4 + 0.02 * torch.rand(3, 3, 16, 16)  # far from where it would be clipped
    y = phases(x)
    one, other = (torch.fft.fft2(each).abs() for each in (x, y))
    torch.testing.assert_close(other, one, atol=0.4, rtol=0)  # at 8 bits
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), atol=1e-3, rtol=0)
    gray = 0.4 + 0.2 * torch.rand(2, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(phases(gray)[:, 0], phases(gray)[:, 2])
    assert not torch.equal(y, x)


def test_files_hold_bytes_and_labels(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(50, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "far.npz", images=images)
    np.savez(tmp_path / "floats.npz", images=images / 255)
    sets = sets_of(replace(TINY, far=(str(tmp_path / "far.npz"),)))
    assert sets["far"].x.shape == (40, 1, 8, 8)
    assert sets["far"].y.eq(0).all()
    with pytest.raises(ValueError, match=r"floats.npz must hold an array 'images' of bytes"):
        sets_of(replace(TINY, far=(str(tmp_path / "floats.npz"),)))


def test_digits_are_blended_with_training_images(monkeypatch):
    train, _ = data(TINY)
    mnist = replace(train, x=torch.rand(20, 1, 28, 28), y=torch.arange(20) % 10)
    monkeypatch.setattr(ood_setup.datasets, "load", lambda name, folder: (mnist, mnist))
    backgrounds = torch.full((1, 3, 32, 32), 0.25)
    blended = ood_setup._blended(TINY, backgrounds, 20)
    torch.testing.assert_close(blended.x[:, :, 2:30, 2:30], (0.25 - mnist.x).abs().expand(20, 3, 28, 28))
    torch.testing.assert_close(blended.x[:, :, :2], torch.full((20, 3, 2, 32), 0.25))


def test_what_is_read():
    x = sets_of(TINY)[POOL].x[:20]
    model = ood_setup.network(TINY)
    assert isinstance(model, ResNet)
    values = read(TINY, x, odin=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(values["logits"]), model(x))
        torch.testing.assert_close(model.linear(torch.from_numpy(values["z"])), model(x))
        torch.testing.assert_close(torch.from_numpy(values["eq. 34"]), Trajectory()(adapt(model, x), x))
    expected = ODIN(model, eps=0.0014, temperature=1000.0).predict(x)
    np.testing.assert_allclose(values["ODIN 0.0014 1000"], expected, rtol=1e-5)
    assert "ODIN 0.0014 1000" not in read(TINY, x, odin=False)


def planted(n=300):
    """States of two classes; foreign ones are between them and off them, and their path is longer."""
    draw, y = np.random.default_rng(0), np.arange(n) % 2
    head = nn.Linear(8, 2)
    weight = torch.zeros(2, 8)
    weight[0, 0] = weight[1, 1] = 2.0
    head.load_state_dict({"weight": weight, "bias": torch.zeros(2)})

    def of(center, length):
        z = np.abs(draw.normal(0.2, 0.1, (n, 8)) + center).astype(np.float32)
        path = draw.normal(length, 1, (n, 4))
        logits = head(torch.from_numpy(z)).detach().numpy()
        more = {f"ODIN {eps:g} {t:g}": -softmax(logits, 1).max(1) for eps, t in ODIN_SETTINGS}
        kinds = draw.choice((-1, 1), (2, n, 6)) * (length == 0)  # foreign images have neurons where no clean one has
        neurons = {f"neurons {i + 1}": kinds[i] + draw.normal(0, 0.1, (n, 6)) for i in range(2)}
        return {"z": z, "logits": logits} | neurons | dict.fromkeys(PATHS, path) | more

    classes = 3 * np.eye(8)[y]
    between = np.zeros((n, 8))
    between[:, :2], between[:, 5] = 0.5, 1.5
    return {TRAIN: of(classes, 0), POOL: of(classes, 0), NEAR: of(between, 3)}, y, head


def test_every_score_sees_planted_foreign_images():
    sets, y, head = planted()
    scores = scores_of(sets, y, head)
    assert set(scores) == {*LAST, COVERAGE, PATH}
    for name, variants in scores.items():
        for variant, values in variants.items():
            if name not in ("ReAct", "ASH", "SCALE"):  # of eight channels they clip or prune those that count
                assert measured(values[POOL], values[NEAR])["auroc"] > 0.9, (name, variant)


def test_scores_of_logits_are_those_of_their_papers():
    sets, y, head = planted()
    scores, logits = scores_of(sets, y, head), sets[POOL]["logits"]
    np.testing.assert_allclose(scores["MSP"][""][POOL], -softmax(logits, 1).max(1), rtol=1e-5)
    np.testing.assert_allclose(scores["MaxLogit"][""][POOL], -logits.max(1), rtol=1e-6)
    np.testing.assert_allclose(scores["energy"]["T = 2"][POOL], -2 * logsumexp(logits / 2, 1), rtol=1e-5)


def test_distance_from_clean_paths_is_that_of_the_formula():
    draw = np.random.default_rng(0)
    X, predicted = draw.normal(size=(80, 3)), np.arange(80) % 2
    z = (X - X.mean(0)) / X.std(0)
    means = np.stack([z[predicted == c].mean(0) for c in range(2)])
    precision = np.linalg.inv(ledoit_wolf(z - means[predicted], assume_centered=True)[0])
    centered = z - means[predicted]
    expected = np.log(np.einsum("ni,ij,nj->n", centered, precision, centered))
    np.testing.assert_allclose(PathDistance(X, predicted)(X, predicted), expected)
    unknown = PathDistance(X, predicted)(X, np.full(80, 7))  # of a class without clean images: from the mean of all
    np.testing.assert_allclose(unknown, np.log(np.einsum("ni,ij,nj->n", z, precision, z)))
    stretched = np.exp(3 * X)  # normal scores know of order alone
    one, other = (PathDistance(each, predicted, "normal")(each, predicted) for each in (X, stretched))
    np.testing.assert_allclose(one, other, rtol=0.05)


def test_joined_scores_are_sums_of_standardized_ones():
    last, path = np.array([1.0, 3.0]), np.array([5.0, 5.0])
    clean = np.array([0.0, 2.0]), np.array([1.0, 9.0])
    np.testing.assert_allclose(joined(last, path, clean, 0.5), [0.0, 2.0])
    np.testing.assert_allclose(joined(last, path, (clean[0], np.array([5.0, 5.0])), 1.0), [0.0, 2.0])


def test_the_false_positive_rate_counts_clean_images_above_most_foreign_ones():
    clean, foreign = np.arange(100.0), np.arange(100.0) + 50
    assert measured(clean, foreign)["fpr95"] == pytest.approx(0.45)
    assert measured(clean, foreign + 100)["auroc"] == 1


def test_bad_input():
    with pytest.raises(ValueError, match="near and far must be turned, blended, textures or"):
        Config(near="cifar100")
    with pytest.raises(ValueError, match=r"held must be a share in \(0, 1\)"):
        Config(held=1.0)
