"""Detectors on disk: loaded as they were, refused where they are not what was saved."""

import io
import pickle
import sys
import zipfile
from copy import deepcopy

import numpy as np
import pytest
import skops.io
import torch
from sklearn.linear_model import LogisticRegression

import odenets.detection
from odenets import models
from odenets.detection import Detector, Pipeline, QuantileTest, Trajectory
from tests.odenets.detection.victims import CLEAN, FOREST, NEW, ODD, network, refused


@pytest.mark.parametrize(
    ("text", "detector"),
    [
        ("Trajectory('stages', 'error', vectors=1)", Detector(FOREST, mode="ensemble")),
        ("Trajectory('action')", QuantileTest()),
        ("Mahalanobis(magnitude=0.01, relative=True)", Detector(LogisticRegression())),
        ("LID(k=5, reference=20, seed=0)", Detector(LogisticRegression())),
        ("KernelDensity(bandwidth=0.5)", Detector(LogisticRegression())),
        ("FeatureSqueezing('bits', 'median', bits=4, window=2, strength=0.02)", Detector(LogisticRegression())),
        ("Separation(width=0.5, alone=False)", Detector(LogisticRegression())),
        ("FourierSpectrum('phase')", Detector(LogisticRegression())),
        ("NaturalSceneStatistics()", Detector(LogisticRegression())),
    ],
)
def test_scores_are_the_same_after_loading(text, detector, tmp_path):
    features = eval(text, vars(odenets.detection)).fit(network(), CLEAN, torch.arange(80) % 10)
    pipeline = Pipeline(network(), features, detector).fit(CLEAN, None if isinstance(detector, QuantileTest) else ODD)
    loaded = Pipeline.load(pipeline.save(tmp_path / "detector.skops"), network())
    np.testing.assert_array_equal(loaded.scores(NEW), pipeline.scores(NEW))
    assert repr(loaded.features) == text


class Own(Trajectory):
    pass


def test_types_of_the_user_are_loaded_where_they_are_trusted(tmp_path):
    pipeline = Pipeline(network(), Own(), Detector(LogisticRegression())).fit(CLEAN, ODD)
    path, name = pipeline.save(tmp_path / "detector.skops"), f"{Own.__module__}.Own"
    refused(f"types that are not trusted, so nothing of it was loaded: {name}", Pipeline.load, path, network())
    assert type(Pipeline.load(path, network(), trusted=[name]).features) is Own


def test_a_file_of_another_version_is_told_from_a_foreign_one(tmp_path):
    """Before there was a room for features, their modules had other names."""
    path = Pipeline(network(), detector=Detector(LogisticRegression())).fit(CLEAN, ODD).save(tmp_path / "detector")
    rewritten(path, lambda schema: schema.replace(b"detection.features.trajectory", b"detection.features"))
    match = r"another version of odenets, .*: odenets\.detection\.features\.Trajectory;"
    refused(match, Pipeline.load, path, network())


class Harmful:
    """Leaves a trace where it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


def rewritten(path, change):
    """The archive with its schema changed."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == "schema.json" else content)
    path.write_bytes(copy.getvalue())


def test_what_is_tampered_with_or_foreign_is_refused_and_nothing_of_it_runs(tmp_path):
    pipeline = Pipeline(network(), detector=Detector(LogisticRegression())).fit(CLEAN, ODD)
    path = tmp_path / "detector.skops"
    path.write_bytes(pickle.dumps(Harmful()))
    refused(r"holds no detector: it was not written by Pipeline.save", Pipeline.load, path, network())
    assert not Harmful.ran
    skops.io.dump({"detector": 3}, path)
    refused("holds no detector", Pipeline.load, path, network())
    pipeline.save(path)
    rewritten(path, lambda schema: schema.replace(b"odenets.detection.detector", b"os"))
    refused(r"not trusted, so nothing of it was loaded: os.Detector", Pipeline.load, path, network())
    pipeline.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    refused(r"damaged|holds no detector", Pipeline.load, path, network())


def test_a_tree_that_leads_out_of_itself_or_of_its_features_is_refused(tmp_path):
    """It would read memory that is not its own."""
    match = "a tree whose branches lead out of it or of its features"
    pipeline = Pipeline(network(), detector=Detector(FOREST)).fit(CLEAN, ODD)
    estimator = pipeline.detector.general_.estimators_[3]
    state = deepcopy(estimator.tree_.__getstate__())
    inner = state["nodes"]["left_child"] != -1
    estimator.tree_.children_left[0] += 1000 + estimator.tree_.node_count
    refused(match, Pipeline.load, pipeline.save(tmp_path / "detector.skops"), network())
    state["nodes"]["feature"][inner] = 10**6
    estimator.tree_ = type(estimator.tree_)(10**6 + 1, estimator.tree_.n_classes, estimator.tree_.n_outputs)
    estimator.tree_.__setstate__(state)
    refused(match, Pipeline.load, pipeline.save(tmp_path / "detector.skops"), network())


def test_without_skops(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    save, extra = Pipeline(network()).save, r"pip install 'odenets\[detection\]'"
    refused(extra, save, tmp_path / "detector.skops", error=ModuleNotFoundError)


def test_another_network_is_refused(tmp_path):
    path = Pipeline(network(), detector=Detector(LogisticRegression())).fit(CLEAN, ODD).save(tmp_path / "detector")
    torch.manual_seed(1)
    other = models.small_network(solver="bs23", depth=2, normalize=models.Normalize([0.3], [0.4]))
    refused("fitted on another network, or on other weights", Pipeline.load, path, other)
    refused("no detector at", Pipeline.load, tmp_path / "nowhere", network(), error=FileNotFoundError)
