"""The study of foreign images, on a few digits and on planted scores."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import ood
import ood_setup
import pytest
import torch
from ood import EXPERIMENT, compare
from ood_scores import COVERAGE, LAST, PATH, PathDistance, joined, measured, scores_of
from ood_setup import NEAR, ODIN_SETTINGS, PATHS, POOL, TRAIN, Config, data, phases, read, sets_of
from ood_tables import BEST, JOINED
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
    one, other = (read_summary(tmp_path / "digits" / f"split{seed}")["results"]["scores"] for seed in (0, 1))
    assert one == compare(replace(TINY, output=tmp_path), 0) != other


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
    moving = x.clone().requires_grad_()
    logits = model(moving) / 1000
    gradient = torch.autograd.grad(logits.log_softmax(1).max(1).values.sum(), moving)[0]
    with torch.no_grad():
        expected = -(model(x + 0.0014 * gradient.sign()) / 1000).softmax(1).max(1).values
    np.testing.assert_allclose(values["ODIN 0.0014 1000"], expected, rtol=1e-5)
    assert "neurons 3" in values
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
    scores, logits = scores_of(sets, y, head), sets[POOL]["logits"].astype(float)
    np.testing.assert_allclose(scores["MSP"][""][POOL], -softmax(logits, 1).max(1), rtol=1e-5)
    np.testing.assert_allclose(scores["MaxLogit"][""][POOL], -logits.max(1), rtol=1e-6)
    np.testing.assert_allclose(scores["energy"]["T = 2"][POOL], -2 * logsumexp(logits / 2, 1), rtol=1e-5)
    p = softmax(logits, 1)
    np.testing.assert_allclose(scores["GEN"]["gamma = 0.1"][POOL], ((p * (1 - p)) ** 0.1).mean(1), rtol=1e-3)


def test_scores_of_states_are_those_of_their_papers():
    sets, y, head = planted()
    scores, fit, z = scores_of(sets, y, head), sets[TRAIN]["z"].astype(float), sets[NEAR]["z"].astype(float)
    unit, units = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (z, fit))
    distances = np.sort(np.linalg.norm(unit[:, None] - units, axis=2), axis=1)
    np.testing.assert_allclose(scores["KNN"]["k = 10"][NEAR], distances[:, 9], rtol=1e-4)

    means = np.stack([fit[y == c].mean(0) for c in range(2)])
    shared = np.linalg.inv(np.cov((fit - means[y]).T, bias=True))
    whole = np.linalg.inv(np.cov(fit.T, bias=True))
    to_classes = np.stack([np.einsum("ni,ij,nj->n", z - mean, shared, z - mean) for mean in means], 1)
    to_all = np.einsum("ni,ij,nj->n", z - fit.mean(0), whole, z - fit.mean(0))
    np.testing.assert_allclose(scores["Mahalanobis"][""][NEAR] * 2 * len(fit), to_classes.min(1), rtol=1e-3)
    expected = to_classes.min(1) - to_all
    np.testing.assert_allclose(scores["relative Mahalanobis"][""][NEAR] * len(fit), expected, rtol=1e-3)

    weight, bias = (p.detach().double().numpy() for p in (head.weight, head.bias))
    origin = -np.linalg.pinv(weight) @ bias
    _, directions = np.linalg.eigh((fit - origin).T @ (fit - origin))
    residual = directions[:, : 8 - 4]
    alpha = (fit @ weight.T + bias).max(1).mean() / np.linalg.norm((fit - origin) @ residual, axis=1).mean()
    expected = alpha * np.linalg.norm((z - origin) @ residual, axis=1) - logsumexp(z @ weight.T + bias, axis=1)
    np.testing.assert_allclose(scores["ViM"]["d = 4"][NEAR], expected, rtol=1e-3)


def test_scores_of_shaped_states_are_those_of_their_papers():
    sets, y, head = planted()
    scores, z = scores_of(sets, y, head), sets[NEAR]["z"].astype(float)
    weight, bias = (p.detach().double().numpy() for p in (head.weight, head.bias))

    def energy(states):
        return -logsumexp(states @ weight.T + bias, axis=1)

    limit = np.quantile(sets[TRAIN]["z"], 0.9)
    np.testing.assert_allclose(scores["ReAct"]["0.9"][NEAR], energy(np.minimum(z, limit)), rtol=1e-4)
    kept = z >= np.sort(z, axis=1)[:, [8 - 3]]  # 65 % of eight channels are five
    pruned = np.where(kept, z, 0)
    ratio = np.exp(z.sum(1) / pruned.sum(1))[:, None]
    np.testing.assert_allclose(scores["ASH"]["ash-s 0.65"][NEAR], energy(pruned * ratio), rtol=1e-4)
    np.testing.assert_allclose(scores["ASH"]["ash-b 0.65"][NEAR], energy(kept * z.sum(1)[:, None] / 3), rtol=1e-4)
    np.testing.assert_allclose(scores["SCALE"]["0.65"][NEAR], energy(z * ratio), rtol=1e-4)


def test_no_choice_sees_images_of_the_test(tmp_path, monkeypatch):
    """Anything in the place of tested images leaves all choices; other images for choosing leave the figures."""
    sets, y, head = planted(60)
    config = replace(TINY, output=tmp_path)
    monkeypatch.setattr(ood, "network", lambda config: SimpleNamespace(linear=head))
    draw = np.random.default_rng(0)
    choosing = draw.permutation(60)[:20]
    held = np.isin(np.arange(60) % 10, draw.permutation(10)[:3])
    sets["textures"] = sets[NEAR]
    labels = {TRAIN: y, POOL: y, NEAR: np.arange(60) % 10, "textures": y}

    def outcome(noisy):
        """With noise in rows of some sets."""
        for name, values in sets.items():
            folder = tmp_path / "digits" / f"read_{name}"
            folder.mkdir(parents=True, exist_ok=True)
            noise, rows = np.random.default_rng(7), noisy.get(name, np.full(60, False))
            values = {key: value.copy() for key, value in values.items()} | {"y": labels[name]}
            for key in values.keys() - {"y"}:
                values[key][rows] = noise.uniform(size=values[key][rows].shape)
            with (folder / "read.npz").open("wb") as file:
                np.savez(file, **values)  # type: ignore[arg-type] - its stub takes any of them for an option
        return compare(config, 0)

    tested = {POOL: ~np.isin(np.arange(60), choosing), NEAR: ~held, "textures": np.full(60, True)}
    clean, other = outcome({}), outcome(tested)
    assert [row["variant"] for row in clean] == [row["variant"] for row in other]
    assert [row["auroc"] for row in clean] != [row["auroc"] for row in other]
    fixed = [row for row in clean if row["score"] in ("MSP", "MaxLogit", "Mahalanobis", "relative Mahalanobis")]
    others = outcome({POOL: ~tested[POOL], NEAR: held})
    assert all(row in others for row in fixed)


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
