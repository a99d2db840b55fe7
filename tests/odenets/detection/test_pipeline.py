"""A network, its features and a detector together: fitted, asked, saved, loaded, refused."""

import io
import pickle
import sys
import zipfile

import numpy as np
import pytest
import skops.io
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.tree._tree import Tree
from torch import nn

from odenets import models
from odenets.detection import Detector, Pipeline, QuantileTest, Trajectory
from odenets.training import datasets

GENERATOR = torch.Generator().manual_seed(0)
DIGITS = datasets.load("digits")[0].x
CLEAN, NEW = DIGITS[:80], DIGITS[80:160]
ODD, NEW_ODD = (torch.rand(80, 1, 8, 8, generator=GENERATOR) for _ in range(2))  # noise, far from digits


def network():
    torch.manual_seed(0)
    return models.small_network(solver="bs23", depth=2, normalize=models.Normalize([0.3], [0.4]))


@pytest.mark.parametrize("mode", ["general", "conditional", "ensemble"])
def test_noise_is_told_from_digits(mode):
    pipeline = Pipeline(network(), detector=Detector(mode=mode, random_state=0)).fit(CLEAN, ODD)
    assert pipeline.predict(NEW).mean() < 0.1
    assert pipeline.predict(NEW_ODD).mean() > 0.9
    found = pipeline.evaluate(NEW, NEW_ODD, successful=torch.ones(80, dtype=torch.bool))
    assert found.auroc > 0.95
    assert found.detected == found.detected_successful == pipeline.predict(NEW_ODD).mean()
    assert found.false_positives == pipeline.predict(NEW).mean()


def test_a_test_on_the_action_needs_no_adversarial_images():
    pipeline = Pipeline(network(), Trajectory("action"), QuantileTest(0.05, side="both")).fit(CLEAN)
    assert pipeline.predict(NEW).mean() < 0.15
    assert ((pipeline.scores(NEW) > 0) == pipeline.predict(NEW)).all()


def test_noisy_copies_count_as_clean():
    noisy = (CLEAN + 0.1 * torch.randn(CLEAN.shape, generator=GENERATOR)).clamp(0, 1)
    plain = Pipeline(network(), detector=Detector(random_state=0)).fit(CLEAN, ODD)
    told = Pipeline(network(), detector=Detector(random_state=0)).fit(CLEAN, ODD, noisy=noisy)
    assert told.scores(noisy).mean() < plain.scores(noisy).mean()


def test_saved_and_loaded_it_says_the_same(tmp_path):
    for detector in (Detector(random_state=0, mode="ensemble"), Detector(LogisticRegression())):
        pipeline = Pipeline(network(), Trajectory("stages", "error", vectors=1), detector).fit(CLEAN, ODD)
        path = pipeline.save(tmp_path / "detector.skops")
        loaded = Pipeline.load(path, network())
        np.testing.assert_array_equal(loaded.scores(NEW), pipeline.scores(NEW))
        assert repr(loaded.features) == "Trajectory('stages', 'error', vectors=1)"
    test = Pipeline(network(), Trajectory("action"), QuantileTest()).fit(CLEAN)
    loaded = Pipeline.load(test.save(tmp_path / "test.skops"), network())
    np.testing.assert_array_equal(loaded.scores(NEW), test.scores(NEW))


class Harmful:
    """Leaves a trace where it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


class Foreign:
    """Of a type that nobody trusts."""


def rewritten(path, change):
    """The archive with its schema changed."""
    found = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(found, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == "schema.json" else content)
    path.write_bytes(found.getvalue())


def test_what_is_tampered_with_or_foreign_is_refused_and_nothing_of_it_runs(tmp_path):
    pipeline = Pipeline(network(), detector=Detector(LogisticRegression())).fit(CLEAN, ODD)
    path = tmp_path / "detector.skops"

    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"holds no detector: it was not written by Pipeline.save"):
        Pipeline.load(path, network())
    assert not Harmful.ran

    skops.io.dump({"detector": Foreign()}, path)
    with pytest.raises(ValueError, match=r"types that are not trusted, so nothing of it was loaded: .*Foreign"):
        Pipeline.load(path, network())

    skops.io.dump({"detector": 3}, path)
    with pytest.raises(ValueError, match="holds no detector"):
        Pipeline.load(path, network())

    pipeline.save(path)
    rewritten(path, lambda schema: schema.replace(b"odenets.detection.detector", b"os"))
    with pytest.raises(ValueError, match=r"not trusted, so nothing of it was loaded: os.Detector"):
        Pipeline.load(path, network())

    pipeline.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"damaged|holds no detector"):
        Pipeline.load(path, network())


def test_a_tree_that_leads_out_of_itself_is_refused(tmp_path):
    pipeline = Pipeline(network(), detector=Detector(random_state=0)).fit(CLEAN, ODD)
    tree = pipeline.detector.general_.estimators_[3].tree_
    tree.children_left[0] = tree.node_count + 1000
    with pytest.raises(ValueError, match="a tree whose branches lead out of it"):
        Pipeline.load(pipeline.save(tmp_path / "detector.skops"), network())


def test_a_tree_of_features_that_there_are_none_of_is_refused(tmp_path):
    """It would read memory that is not its own."""
    pipeline = Pipeline(network(), detector=Detector(random_state=0)).fit(CLEAN, ODD)
    estimator = pipeline.detector.general_.estimators_[3]
    state = estimator.tree_.__getstate__()
    inner = state["nodes"]["left_child"] != -1
    state["nodes"]["feature"][inner] = 10**6
    wide = Tree(10**6 + 1, estimator.tree_.n_classes, estimator.tree_.n_outputs)
    wide.__setstate__(state)
    estimator.tree_ = wide
    with pytest.raises(ValueError, match="a tree whose branches lead out of it or of its features"):
        Pipeline.load(pipeline.save(tmp_path / "detector.skops"), network())


def test_without_skops(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install odenets\[detection\]"):
        Pipeline(network()).save(tmp_path / "detector.skops")


def test_another_network_is_refused(tmp_path):
    path = Pipeline(network(), detector=Detector(LogisticRegression())).fit(CLEAN, ODD).save(tmp_path / "detector")
    torch.manual_seed(1)
    other = models.small_network(solver="bs23", depth=2, normalize=models.Normalize([0.3], [0.4]))
    with pytest.raises(ValueError, match="fitted on another network, or on other weights"):
        Pipeline.load(path, other)
    with pytest.raises(FileNotFoundError, match="no detector at"):
        Pipeline.load(tmp_path / "nowhere", network())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_and_images_of_any_precision(dtype):
    pipeline = Pipeline(network().to(dtype), detector=Detector(random_state=0, mode="ensemble")).fit(CLEAN, ODD)
    assert pipeline.predict(NEW.to(dtype)).mean() < 0.15
    assert pipeline.predict(NEW_ODD.to(dtype)).mean() > 0.85


def test_features_in_double_precision_keep_their_scale():
    """Their squares are 0 in single precision."""
    wide = network().double()
    with torch.no_grad():
        for field in wide.flows[0].blocks:
            for parameter in field.parameters():
                parameter.mul_(1e-30)
    X, _ = Pipeline(wide, Trajectory("residue")).look(CLEAN)
    assert X.dtype == np.float64
    assert (X > 0).all()


class Returning(nn.Module):
    """A head."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        (lambda z: (z, z), TypeError, "network must return logits, .*got a tuple"),
        (lambda z: {"logits": z}, TypeError, "network must return logits, .*got a dict"),
        (lambda z: z[:, 0], ValueError, r"network must return logits, .*got shape \(80,\) for 80 inputs"),
        (lambda z: z[:, :, None], ValueError, r"network must return logits, .*got shape \(80, 16, 1\)"),
        (lambda z: z * torch.nan, ValueError, "features and logits must be finite"),
    ],
)
def test_what_a_network_must_return_is_named(how, error, match):
    other = network()
    other.head = Returning(how)
    with pytest.raises(error, match=match):
        Pipeline(other).look(CLEAN)


def test_features_beyond_single_precision_are_not_finite():
    class Huge(Trajectory):
        def look(self, network, x):
            output, values = super().look(network, x)
            return output, torch.full_like(values, 3e38) * torch.tensor(10.0)

    with pytest.raises(ValueError, match="features and logits must be finite"):
        Pipeline(network(), Huge()).look(CLEAN)


def test_a_network_is_looked_at_and_left_as_it_was():
    looked = network().train()
    looked.head.eval()
    modes = [module.training for module in looked.modules()]
    state = torch.get_rng_state()
    pipeline = Pipeline(looked, detector=Detector(random_state=0)).fit(CLEAN, ODD)
    scores = pipeline.evaluate(NEW, NEW_ODD, successful=[True] * 40 + [False] * 40)
    assert 0 <= scores.detected_successful <= 1
    assert [module.training for module in looked.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in looked.parameters())


def test_errors():
    pipeline = Pipeline(network())
    with pytest.raises(TypeError, match=r"must record its steps, got Sequential: pass odenets.adapt"):
        Pipeline(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got RandomForestClassifier: pass Detector\(RandomForestClassifier\(...\)\)"):
        Pipeline(network(), detector=RandomForestClassifier())
    with pytest.raises(ValueError, match=r"adversarial must hold at least 10 images, got 3: too few attacks"):
        pipeline.fit(CLEAN, ODD[:3])
    with pytest.raises(ValueError, match="Detector is fitted on adversarial images too"):
        pipeline.fit(CLEAN)
    with pytest.raises(ValueError, match="QuantileTest is fitted on no adversarial images"):
        Pipeline(network(), Trajectory("action"), QuantileTest()).fit(CLEAN, ODD)
    with pytest.raises(ValueError, match=r"adversarial must have pixels in \[0, 1\]"):
        pipeline.fit(CLEAN, 2 * ODD)
    with pytest.raises(ValueError, match="images must be finite"):
        pipeline.predict(torch.full((2, 1, 8, 8), torch.nan))
