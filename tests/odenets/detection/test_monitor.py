"""A monitor fitted to clean images alone: planted anomalies, streams, files, and what it refuses."""

import gc
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.ensemble import IsolationForest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import odenets
from odenets import Flow, MLPField, Network, NeuralODE, models
from odenets.detection import Detector, Features, Mahalanobis, Monitor, OneClassGaussian, Pipeline, Trajectory
from odenets.schemes import Noisy
from tests.odenets.detection.victims import CLEAN, NEW, ODD, Affine, network, refused, unchanged

GENERATOR = torch.Generator().manual_seed(0)


class Residual(nn.Module):
    """Three blocks without weights, whose residues are known: x + branch."""

    def __init__(self, channels=3):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(c) for c in range(channels))
        self.head = nn.Linear(channels, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        only = torch.zeros_like(x)
        only[:, self.channel] = 1
        return x + self.scale * only * x


def pixels(samples, low=0.2, high=0.4):
    return low + (high - low) * torch.rand(samples, 3, 4, 4, generator=GENERATOR)


def test_planted_anomalies_are_found_and_the_features_are_known():
    """Block c adds channel c to itself, so that its feature is the mean square of that channel."""
    torch.manual_seed(0)
    model, clean = Residual().eval(), pixels(400)
    monitor = Monitor(model).fit(clean)
    new = pixels(60)
    planted = new.clone()
    planted[:30, 1] += 0.3  # of the second block alone
    X, _ = odenets.detection.extraction.extract(monitor.network, monitor.features, planted)
    np.testing.assert_allclose(X[:, :3], planted.double().square().mean((2, 3)) / 3, rtol=1e-5)
    assessment = monitor.check(planted)
    assert assessment.flags[:30].all()
    assert assessment.flags[30:].mean() < 0.2
    assert set(assessment.surest[:30].tolist()) == set(range(30))
    assert (assessment.p_values[:30] == 1 / 201).all()


def test_p_values_of_clean_images_are_uniform_over_ten_splits():
    images, pooled = torch.cat([CLEAN, NEW]), []
    torch.manual_seed(0)
    watched = network()
    for seed in range(10):
        order = torch.randperm(160, generator=torch.Generator().manual_seed(seed))
        monitor = Monitor(watched, seed=seed).fit(images[order[:120]])
        pooled.append(monitor.p_values(images[order[120:]]))
    assert stats.kstest(np.concatenate(pooled), "uniform").pvalue > 0.01


def test_noise_among_digits_in_one_line():
    monitor = Monitor(network()).fit(CLEAN)
    assert monitor.predict(ODD).mean() > 0.5
    assert monitor.predict(NEW).mean() < 0.2
    assert monitor.drift(monitor.p_values(torch.cat([NEW, ODD])), window=40).first == 2


def test_flags_are_p_values_up_to_the_rate_and_scores_above_the_threshold():
    monitor = Monitor(network(), false_positive_rate=0.1).fit(CLEAN)
    both = torch.cat([NEW, ODD])
    for rate in (None, 0.025, 0.3):
        one = monitor.check(both, false_positive_rate=rate)
        assert np.array_equal(one.flags, one.p_values <= (rate or 0.1) + 1e-9)
        assert np.array_equal(one.flags, one.scores > monitor.threshold(rate))
        assert np.array_equal(one.flags, monitor.predict(both, false_positive_rate=rate))
    assert np.array_equal(one.scores, monitor.scores(both))
    assert np.array_equal(one.p_values, monitor.p_values(both))
    low, high = monitor.interval()
    assert low < 0.1 < high
    assert pd.DataFrame(vars(one)).shape == (160, 5)


LOADERS = {
    "a tensor": lambda x: x,
    "batches of tensors": lambda x: x.split(30),
    "pairs": lambda x: [(part, torch.zeros(len(part))) for part in x.split(30)],
    "a DataLoader with labels": lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), 30),
    "a DataLoader without": lambda x: DataLoader(TensorDataset(x), 30),
    "a generator": lambda x: (part for part in x.split(30)),
}


@pytest.mark.parametrize("kind", LOADERS.values(), ids=LOADERS)
def test_images_come_as_a_tensor_or_from_a_loader(kind):
    expected = Monitor(network()).fit(CLEAN)
    monitor = Monitor(network()).fit(kind(CLEAN))
    np.testing.assert_allclose(monitor.calibration_scores, expected.calibration_scores, rtol=1e-4)
    parts = [*monitor.stream(kind(NEW))]
    np.testing.assert_array_equal(np.concatenate([part.index for part in parts]), np.arange(80))
    np.testing.assert_allclose(np.concatenate([part.scores for part in parts]), expected.scores(NEW), rtol=1e-4)


def test_a_plain_module_is_adapted_and_its_own_blocks_are_measured():
    torch.manual_seed(0)
    model = Residual()
    own, adapted = Monitor(model), Monitor(odenets.adapt(model))
    clean = pixels(100)
    np.testing.assert_array_equal(own.fit(clean).calibration_scores, adapted.fit(clean).calibration_scores)


@pytest.mark.parametrize("detector", [OneClassGaussian(conditional=False), IsolationForest(random_state=0)])
@pytest.mark.parametrize("features", [Trajectory("action"), Mahalanobis()], ids=repr)
def test_other_features_and_detectors(features, detector, tmp_path):
    features = features.fit(network(), CLEAN, torch.arange(80) % 2)
    monitor = Monitor(network(), features, detector).fit(NEW)
    assert monitor.predict(ODD).mean() > 0.3
    again = Monitor.load(monitor.save(tmp_path / "monitor.skops"), network())
    np.testing.assert_array_equal(again.p_values(ODD), monitor.p_values(ODD))


def test_it_is_the_same_after_loading_adapted_or_not(tmp_path):
    torch.manual_seed(0)
    model, clean, new = Residual(), pixels(100), pixels(20)
    monitor = Monitor(
        model, false_positive_rate=0.1, calibration=0.3, batch_size=7, seed=3, preparation="of unit sum"
    ).fit(clean)
    path = monitor.save(tmp_path / "folder" / "monitor.skops")
    for same in (model, odenets.adapt(model), monitor.network):
        again = Monitor.load(path, same)
        np.testing.assert_array_equal(again.check(new).p_values, monitor.check(new).p_values)
        np.testing.assert_array_equal(again.predict(new), monitor.predict(new))
        assert repr(again) == repr(monitor)
        assert again.preparation == "of unit sum"
    refused(
        r"images must have one shape, 3 x 4 x 4 as the first of fit, got 3 x 5 x 5", again.check, torch.rand(2, 3, 5, 5)
    )
    refused("was fitted on another network, or on other weights", Monitor.load, path, Residual())
    two = odenets.adapt(model, new[:2], blocks=["blocks.0", "blocks.1"])
    refused("or blocks of this one", Monitor.load, path, two)
    refused("model must be a torch module", Monitor.load, path, "model", error=TypeError)
    of_pipeline = Pipeline(network(), detector=OneClassGaussian(conditional=False)).fit(CLEAN).save(tmp_path / "other")
    refused("holds no monitor: it was not written by Monitor.save", Monitor.load, of_pipeline, network())
    refused("holds no detector: it was not written by Pipeline.save", Pipeline.load, path, network())
    with pytest.raises(FileNotFoundError, match="no detector at"):
        Monitor.load(tmp_path / "none", model)


def test_a_stream_of_ten_thousand_images_is_flat_in_memory():
    torch.manual_seed(0)
    monitor = Monitor(Residual()).fit(pixels(200))
    alive, bytes_held = [], []

    def batches():
        for _ in range(200):
            yield pixels(50)

    tracemalloc.start()
    for i, part in enumerate(monitor.stream(batches())):
        assert len(part) == 50
        if i in (20, 199):
            bytes_held.append(tracemalloc.get_traced_memory()[0])
            alive.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
    tracemalloc.stop()
    assert part.index[-1] == 9999
    assert alive[1] <= alive[0] + 2
    assert bytes_held[1] < bytes_held[0] + 100_000  # 10,000 images have 1.9 MB


def test_watching_leaves_the_network_as_it_was():
    trained = network().train()
    trained.head.eval()
    with unchanged(trained):
        monitor = Monitor(trained).fit(DataLoader(CLEAN, 30, shuffle=True))
        monitor.check(DataLoader(NEW, 30, shuffle=True))


def test_between_the_batches_of_a_stream_the_network_is_as_it_was():
    trained = network().train()
    monitor = Monitor(trained).fit(CLEAN)
    for _ in monitor.stream(NEW.split(40)):
        assert all(module.training for module in trained.modules())


def test_a_network_that_has_changed_is_refused_also_within_a_stream():
    watched = network()
    monitor = Monitor(watched).fit(CLEAN)
    stream = monitor.stream(NEW.split(40))
    next(stream)
    with torch.no_grad():
        next(watched.parameters()).mul_(2)
    match = "network has changed since the monitor was fitted.*fit the monitor again"
    refused(match, next, stream)
    refused(match, monitor.predict, NEW)
    refused(match, monitor.stream, NEW)  # at once, not with the first batch


def test_images_that_are_normalized_already():
    monitor = Monitor(network(), normalized=True).fit(4 * CLEAN - 2)
    assert monitor.predict(4 * NEW - 2).mean() < 0.2
    refused(r"must have pixels in \[0, 1\], got \[-2, 2\]", Monitor(network()).fit, 4 * CLEAN - 2)


def test_inputs_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network(x)

    monitor = Monitor(Named()).fit({"x": CLEAN})
    np.testing.assert_allclose(monitor.scores({"x": NEW}), monitor.scores([{"x": NEW}]), rtol=1e-4)


def test_errors():
    refused("model must be a torch module, got str", Monitor, "resnet18", error=TypeError)
    refused("preparation must be words, got a int", lambda: Monitor(network(), preparation=1), error=TypeError)
    refused("features must be an instance, got the class", Monitor, network(), Trajectory, error=TypeError)
    refused("features must be Features, such as", Monitor, network(), "residue", error=TypeError)
    refused(
        "detector must be an outlier detector .* for Pipeline", Monitor, network(), None, Detector(), error=TypeError
    )
    refused(r"false_positive_rate must lie in \(0, 1\)", Monitor, network(), false_positive_rate=0)
    refused("calibration must be a share", Monitor, network(), calibration=1)
    refused("batch_size must be at least 1", Monitor, network(), batch_size=0)
    refused("seed must not be negative", Monitor, network(), seed=-1)
    monitor = Monitor(network())
    for call in (monitor.predict, monitor.stream, monitor.drift, monitor.save):
        refused(r"the monitor is not fitted: monitor.fit\(clean\)", call, NEW)
    refused("clean must hold at least one batch, got none", monitor.fit, [])
    refused(
        "clean must be a floating tensor .* got torch.int64", monitor.fit, [torch.zeros(3, dtype=int)], error=TypeError
    )
    refused("must hold batches of inputs, got TensorDataset", monitor.fit, TensorDataset(CLEAN), error=TypeError)
    array = CLEAN.numpy()
    refused(r"got an array \(80, 1, 8, 8\): torch.from_numpy makes a tensor", monitor.fit, array, error=TypeError)
    refused("got ndarray: torch.as_tensor of an array, torchvision's to_tensor", monitor.fit, [array], error=TypeError)
    refused(r"got shape \(1, 8, 8\): x\[None\] is a batch of one, and a DataLoader", monitor.fit, list(CLEAN))
    refused("clean must hold numbers, got a tensor on the meta", monitor.fit, CLEAN.to("meta"), error=TypeError)
    refused("clean must be dense, got a tensor of torch.sparse_coo", monitor.fit, CLEAN.to_sparse(), error=TypeError)
    without = Monitor(network().to("meta"))
    refused("network must have weights, got 'encoder.1.weight' on the meta device", without.fit, CLEAN)
    message = "the model takes no input 'image', which is a tensor; its inputs are input"
    refused(message, Monitor(nn.Sequential(network())).fit, [{"image": CLEAN}], error=TypeError)
    refused("clean must not be empty", monitor.fit, CLEAN[:0])
    refused("19; the smallest that they have is 0.0909", monitor.fit, CLEAN[:20])
    forest = Monitor(network(), None, IsolationForest(), calibration=0.999)
    refused("0 of 80 fit the detector: calibration is to be less", forest.fit, CLEAN)
    refused("15 of 60 fit the detector, and there are 32 features", Monitor(deep(), calibration=0.75).fit, CLEAN[:60])
    refused(
        "clean must be a floating tensor .* divide bytes by 255", monitor.fit, (CLEAN * 255).byte(), error=TypeError
    )
    monitor.fit(CLEAN)
    refused(
        r"1 / \(n \+ 1\) = 0.0244 with n = 40 .* got 0.01: 99 of them", monitor.predict, NEW, false_positive_rate=0.01
    )
    refused("got 0.01: 99 of them", monitor.stream, NEW, false_positive_rate=0.01)  # at once
    refused("images must be a batch .* got shape \\(1, 8, 8\\)", monitor.predict, NEW[0])
    refused("images must be a batch .* not empty, got shape \\(0, 1, 8, 8\\)", monitor.predict, [NEW, NEW[:0]])
    refused("p_values must hold p-values .* got Assessment", monitor.drift, monitor.check(NEW), error=TypeError)
    parts = [part.p_values for part in monitor.stream(NEW.split(30))]
    refused("p-values as of monitor.p_values.* got list", monitor.drift, parts, error=TypeError)
    refused("images must be finite, got NaN", monitor.predict, torch.full((2, 1, 8, 8), torch.nan))
    refused(
        "images must have one shape, 1 x 8 x 8 as the first of fit, got 1 x 9 x 9",
        monitor.predict,
        torch.rand(2, 1, 9, 9),
    )


def deep():
    torch.manual_seed(0)
    return models.small_network(depth=16)


def test_networks_that_cannot_be_watched():
    one = models.small_network(depth=1)
    refused("at least two blocks for the features of its trajectory, got 1", Monitor(one).fit, CLEAN)
    noisy = Network(nn.Flatten(), Flow(MLPField(64), depth=3, solver=Noisy(0.5)), nn.Linear(64, 3))
    refused("the features of two passes in eval mode differ", Monitor(noisy).fit, CLEAN)
    adaptive = Network(nn.Flatten(), NeuralODE(MLPField(64)), nn.Linear(64, 3))
    refused("network must treat each image apart", Monitor(adaptive).fit, CLEAN)
    refused("no residual addition", Monitor(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).fit, CLEAN)
    headless = Network(nn.Identity(), Flow(Affine(0.1, 0.0), depth=2), nn.Identity())
    refused("network must return logits", Monitor(headless).fit, CLEAN)


def test_a_network_that_mixes_the_images_of_a_batch_is_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network((4 * (x - x.mean(0))).sigmoid())

    match = "must treat each image apart.*others without those that come with them"
    refused(match, Monitor(Mixed()).fit, CLEAN)
    refused(match, Monitor(Mixed()).fit, CLEAN.split(20))


def test_images_that_come_twice_count_once():
    expected = Monitor(network()).fit(CLEAN)
    with pytest.warns(UserWarning, match="clean holds 80 of 160 images a second time, and they count once"):
        monitor = Monitor(network()).fit([CLEAN, CLEAN])
    np.testing.assert_allclose(monitor.calibration_scores, expected.calibration_scores, rtol=1e-4)


def test_two_monitors_with_one_detector_are_fitted_apart():
    detector, other = OneClassGaussian(), deep()
    monitor = Monitor(network(), detector=detector).fit(CLEAN)
    expected = monitor.scores(NEW)
    Monitor(other, detector=detector, calibration=0.3).fit(CLEAN)
    np.testing.assert_array_equal(monitor.scores(NEW), expected)
    assert not hasattr(detector, "means_")


class Failing(IsolationForest):
    fails = False

    def score_samples(self, X):
        return super().score_samples(X) * (np.nan if self.fails else 1)


@pytest.mark.parametrize("late", [False, True], ids=["before it fits", "when it calibrates"])
def test_after_a_fit_that_fails_nothing_of_the_earlier_one_is_left(late, monkeypatch):
    monitor = Monitor(network(), detector=Failing(n_estimators=5, random_state=0)).fit(CLEAN)
    assert "40 calibration images" in repr(monitor)
    monkeypatch.setattr(Failing, "fails", late)
    refused("finite scores" if late else "clean must hold more images", monitor.fit, CLEAN if late else CLEAN[:20])
    assert "not fitted" in repr(monitor)
    refused("the monitor is not fitted", monitor.predict, NEW)


def test_features_that_are_not_finite_are_refused():
    class Broken(Features):
        def __call__(self, network, x):
            return torch.full((len(x), 3), torch.nan)

    refused("features and logits must be finite", Monitor(network(), Broken()).fit, CLEAN)
