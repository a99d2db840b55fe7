"""The detection experiment on a few digits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detection import EXPERIMENT, comparisons
from detection_setup import METHODS, TRAJECTORY, Config, attack_of, build, foreign, kinds_of, parts_of
from detection_tables import COLUMNS, summarize

from lab.experiment import draw, run
from lab.tables import table
from odenets.detection import preset
from odenets.training.runs import read_summary

TINY = Config(workers=1, quick=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all settings, so that networks are trained and attacked once."""
    return tmp_path_factory.mktemp("detection")


def test_a_run_leaves_its_table_and_figures_that_are_drawn_again(tmp_path):
    few = {"seeds": 2, "methods": ("vanilla",), "attacks": ("FGM",), "magnitudes": (0.0,), "iterations": 2}
    config = Config(**few, train_size=100, pool_size=120, epochs=1, workers=1, output=tmp_path)
    run(EXPERIMENT, config)
    rows = read_summary(tmp_path / "seen")["results"]["rows"]
    assert {row["kind"] for row in rows} == set(kinds_of(config))
    figure = tmp_path / "seen" / "figures" / "vanilla.png"
    figure.unlink()
    assert f"{figure} is drawn" in draw(EXPERIMENT, figure.parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["seen", "unseen", "ood"])
def test_rows_of_every_setting(folder, capsys, setting):
    config = replace(TINY, setting=setting, output=folder, noisy=setting == "seen")
    if setting == "unseen":
        config = replace(config, modes=("general", "conditional"))
    run(EXPERIMENT, config)
    shown = capsys.readouterr().out
    rows = read_summary(folder / setting)["results"]["rows"]
    assert len(rows) == {"seen": 2, "unseen": 1, "ood": 4}[setting] * len(kinds_of(config))
    assert {row["kind"] for row in rows} == set(kinds_of(config))
    assert all(0 <= row["auroc"]["mean"] <= 100 for row in rows)
    assert all("noisy_false_positives" in row for row in rows) == (setting == "seen")
    assert ("over the general detector" in shown) == (setting == "unseen")
    assert all(("over_general" in row) == (setting == "unseen") for row in rows)
    assert all(("fooled" in row) == (row["kind"] == TRAJECTORY and setting != "ood") for row in rows)
    assert all(len(row["auroc"]["values"]) == 2 for row in rows)
    assert list((folder / setting / "figures").glob("*.png"))


@pytest.mark.slow
def test_attacks_that_know_of_the_detector(folder):
    run(EXPERIMENT, replace(TINY, setting="adaptive", output=folder))
    rows = read_summary(folder / "adaptive")["results"]["rows"]
    assert {row["attack"] for row in rows} <= {"black box", "features", "surrogate"}
    assert all(0 <= row["evading"] <= row["starts"] for row in rows)
    assert all(0 <= row["evaded"]["mean"] <= 100 for row in rows)


def test_time(folder, capsys):
    run(EXPERIMENT, replace(TINY, setting="timing", output=folder))
    rows = {row["what"]: row for row in read_summary(folder / "timing")["results"]["rows"]}
    assert rows["forward pass"]["over_forward"] == 1
    assert "Mahalanobis with its statistics takes" in capsys.readouterr().out


def test_what_is_fitted_on_and_tested():
    config = Config(attacks=("FGM", "BIM", "DF"), foreign=("photographs", "turned"))
    assert comparisons(config) == [("FGM", ("FGM",)), ("BIM", ("BIM",)), ("DF", ("DF",))]
    assert comparisons(replace(config, setting="unseen")) == [("FGM", ("BIM", "DF"))]
    both = ("photographs", "turned")
    assert comparisons(replace(config, setting="ood")) == [("photographs", both), ("FGM", both)]


def test_networks_and_detectors_have_images_of_their_own():
    train, pool = parts_of(Config())
    assert (len(train), len(pool)) == (900, 600)
    seen = {image.numpy().tobytes() for image in train.x}
    assert sum(image.numpy().tobytes() in seen for image in pool.x) == 0


def test_attacks_have_the_size_and_the_iterations_asked_for():
    assert dict(attack_of(Config(eps=0.2, iterations=7), "BIM").settings)["max_iter"] == 7
    assert dict(attack_of(Config(eps=0.2), "FGM").settings)["eps"] == 0.2
    assert dict(attack_of(Config(dataset="cifar10", iterations=0), "APGD").settings)["max_iter"] == 100


@pytest.mark.parametrize("name", ["BIM", "APGD"])
def test_without_iterations_the_steps_are_those_of_the_thesis(name):
    assert attack_of(Config(dataset="cifar10", iterations=0), name) == preset(name, exact=False)
    assert dict(attack_of(Config(dataset="cifar10", iterations=10), name).settings)["eps_step"] == 0.03 / 4


def test_foreign_files_hold_bytes(tmp_path):
    pool = parts_of(Config())[1]
    images = np.random.default_rng(0).integers(256, size=(7, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", images=images)
    np.savez(tmp_path / "floats.npz", images=images / 255)
    assert 0.5 < foreign(Config(), str(tmp_path / "bytes.npz"), pool).max() <= 1
    with pytest.raises(ValueError, match=r"floats.npz must hold an array 'images' of bytes"):
        foreign(Config(), str(tmp_path / "floats.npz"), pool)


@pytest.mark.parametrize("name", ["photographs", "turned"])
def test_foreign_images_are_like_the_others_in_shape_and_range(name, tmp_path):
    pool = parts_of(Config())[1]
    x = foreign(Config(), name, pool)
    assert x.shape[1:] == pool.x.shape[1:]
    assert 0 <= x.min() < x.max() <= 1


def test_networks_of_the_methods():
    pool = parts_of(Config())[1]
    one, other = (build(Config(), pool, 3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert set(METHODS) == {"vanilla", "least action", "reverse cross-entropy"}
    assert "trajectory and stages" not in kinds_of(Config(solver="euler"))


def test_the_figures_of_the_thesis_stand_beside_those_on_cifar10_alone():
    measured = ("accuracy", "auroc", "fpr95", "detected", "detected_successful", "false_positives")
    results = [
        {
            "method": "vanilla",
            "seed": seed,
            "accuracy": 0.9,
            "attacks": [{"attack": "FGM", "success": 0.25 * (1 + seed)}],
            "scores": [
                {"seen": seen, "tested": tested, "kind": kind} | dict.fromkeys(measured, 0.5)
                for seen, tested in (("FGM", "FGM"), ("data/cifar100.npz", "data/cifar100.npz"))
                for kind in ("trajectory", "scenes")
            ],
        }
        for seed in range(2)
    ]
    config = Config(methods=("vanilla",), dataset="cifar10")
    rows = summarize(config, results)
    assert [row["fooled"].values for row in rows if "fooled" in row] == [(25.0, 50.0)]
    assert [row["thesis"] for row in rows] == [97.1, 94.6, None, None]
    assert [row.get("thesis_successful") for row in rows] == [97.7, None, None, None]
    assert [row["thesis"] for row in summarize(replace(config, setting="ood"), results)] == [None, None, 98.3, None]
    assert all("thesis" not in row for row in summarize(replace(config, dataset="mnist"), results))
    shown = table(rows, COLUMNS)
    assert "| cifar100 |" in shown
    assert "thesis (ResNet-110)" in shown
