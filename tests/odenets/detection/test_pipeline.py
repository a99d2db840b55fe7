"""A network, its features and a detector as one."""

import copy

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, models
from odenets.checkpoints import fingerprint
from odenets.detection import (
    Attacked,
    Detector,
    Features,
    FourierSpectrum,
    Mahalanobis,
    NaturalSceneStatistics,
    Pipeline,
    QuantileTest,
    Trajectory,
    network_state,
    score,
)
from odenets.detection.persistence import write
from odenets.module_wise import split_into_modules
from tests.odenets.detection.victims import CLEAN, FOREST, GENERATOR, NEW, NEW_ODD, ODD, network, refused, unchanged


@pytest.mark.parametrize("mode", ["general", "conditional", "ensemble"])
def test_noise_is_detected_among_digits(mode):
    pipeline = Pipeline(network(), detector=Detector(FOREST, mode=mode)).fit(CLEAN, ODD)
    assert pipeline.predict(NEW).mean() < 0.1
    assert pipeline.predict(NEW_ODD).mean() > 0.9
    scores = pipeline.evaluate(NEW, NEW_ODD, successful=torch.ones(80, dtype=torch.bool))
    assert scores.auroc > 0.95
    assert scores.detected == scores.detected_successful == pipeline.predict(NEW_ODD).mean()
    assert scores.false_positives == pipeline.predict(NEW).mean()


def test_a_test_on_the_action_needs_no_adversarial_images():
    pipeline = Pipeline(network(), Trajectory("action"), QuantileTest(0.05, side="both")).fit(CLEAN)
    assert pipeline.predict(NEW).mean() < 0.15
    assert ((pipeline.scores(NEW) > 0) == pipeline.predict(NEW)).all()


def test_noisy_copies_count_as_clean():
    noisy = (CLEAN + 0.1 * torch.randn(CLEAN.shape, generator=GENERATOR)).clamp(0, 1)
    plain = Pipeline(network(), detector=Detector(FOREST)).fit(CLEAN, ODD)
    noise_aware = Pipeline(network(), detector=Detector(FOREST)).fit(CLEAN, ODD, noisy=noisy)
    assert noise_aware.scores(noisy).mean() < plain.scores(noisy).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_and_images_of_any_precision(dtype):
    pipeline = Pipeline(network().to(dtype), detector=Detector(FOREST, mode="ensemble")).fit(CLEAN, ODD)
    assert pipeline.predict(NEW.to(dtype)).mean() < 0.15
    assert pipeline.predict(NEW_ODD.to(dtype)).mean() > 0.85


def test_features_in_double_precision_keep_their_scale():
    """Their squares are 0 in single precision."""
    wide = network().double()
    with torch.no_grad():
        for field in wide.flows[0].blocks:
            for parameter in field.parameters():
                parameter.mul_(1e-30)
    X, _ = Pipeline(wide, Trajectory("residue")).extract(CLEAN)
    assert X.dtype == np.float64
    assert (X > 0).all()


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (lambda z: {"scores": z}, TypeError, "network must return logits, .*got a dict"),
        (lambda z: z[:, :, None], ValueError, r"network must return logits, .*got shape \(80, 10, 1\)"),
        (lambda z: z * torch.nan, ValueError, "features and logits must be finite"),
    ],
)
def test_networks_must_return_finite_logits(output, error, match):
    other = network()
    other.head.register_forward_hook(lambda head, inputs, logits: output(logits))
    refused(match, Pipeline(other).extract, CLEAN, error=error)


def test_features_beyond_single_precision_are_not_finite():
    class Huge(Trajectory):
        def output_and_features(self, network, x):
            output, values = super().output_and_features(network, x)
            return output, torch.full_like(values, 3e38) * torch.tensor(10.0)

    refused("features and logits must be finite", Pipeline(network(), Huge()).extract, CLEAN)


def test_fitting_and_scoring_leave_the_network_as_it_was():
    trained = network().train()
    trained.head.eval()
    with unchanged(trained):
        pipeline = Pipeline(trained, detector=Detector(FOREST)).fit(CLEAN, ODD)
        scores = pipeline.evaluate(NEW, NEW_ODD, successful=[True] * 40 + [False] * 40)
    assert 0 <= scores.detected_successful <= 1


CHANGES = {
    "in place": lambda network: next(network.parameters()).mul_(1.5),
    "a buffer": lambda network: next(network.buffers()).add_(0.1),
    "another tensor": lambda network: setattr(network.head[-1], "weight", nn.Parameter(1.5 * network.head[-1].weight)),
    "loaded": lambda network: network.load_state_dict({k: 1.5 * v for k, v in network.state_dict().items()}),
    "finer": lambda network: network.flows[0].resize([0.5] * 4, network),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("loaded", [False, True], ids=["fitted", "loaded"])
def test_a_network_that_has_changed_since_the_fit_is_refused(change, loaded, tmp_path):
    watched = models.small_network(solver="bs23", depth=2, norm="batch")
    pipeline = Pipeline(watched, Trajectory("action"), QuantileTest(0.05)).fit(CLEAN)
    if loaded:
        pipeline = Pipeline.load(pipeline.save(tmp_path / "detector"), pipeline.network)
    with torch.no_grad():
        change(pipeline.network)
    calls = {
        "scores": lambda: pipeline.scores(NEW),
        "predict": lambda: pipeline.predict(NEW),
        "threshold": lambda: pipeline.threshold(NEW),
        "evaluate": lambda: pipeline.evaluate(NEW, NEW_ODD),
        "save": lambda: pipeline.save(tmp_path / "other"),
    }
    for call in calls.values():
        refused("network has changed since the detector was fitted.*fit the pipeline again", call)
    assert not (tmp_path / "other").exists()
    assert np.isfinite(pipeline.fit(CLEAN).scores(NEW)).all()


def test_a_network_that_is_what_it_was_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(network_state, "fingerprint", lambda net: hashed.append(1) or fingerprint(net))
    pipeline = Pipeline(network(), Trajectory("action"), QuantileTest(0.05)).fit(CLEAN)
    scores = pipeline.scores(NEW)
    for _ in range(3):
        assert np.array_equal(pipeline.scores(NEW), scores)
    assert len(hashed) == 1
    state = {name: value.clone() for name, value in pipeline.network.state_dict().items()}
    with torch.no_grad():
        next(pipeline.network.parameters()).zero_()
        pipeline.network.load_state_dict(state)  # the same numbers, written again
    for _ in range(3):
        assert np.array_equal(pipeline.scores(NEW), scores)
    assert len(hashed) == 2
    assert np.array_equal(copy.deepcopy(pipeline).scores(NEW), scores)


def test_what_torch_does_not_count_is_noticed_when_it_is_saved(tmp_path):
    pipeline = Pipeline(network(), Trajectory("action"), QuantileTest(0.05)).fit(CLEAN)
    next(pipeline.network.parameters()).data.mul_(1.5)
    refused("network has changed since", pipeline.save, tmp_path / "detector")


class Unnormed(nn.BatchNorm2d):
    """A batch norm of another library, that keeps no statistics."""

    def __init__(self, features):
        super().__init__(features, track_running_stats=False)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (
            Unnormed(1),
            "'encoder.0' is a Unnormed without running statistics.*: track_running_stats=True",
        ),
        (nn.Sequential(nn.Flatten(), NeuralODE(MLPField(64))), "'encoder.0.1' is a NeuralODE .*: steps=n"),
    ],
)
def test_features_that_depend_on_the_batch_are_refused(layer, match):
    plain = network()
    encoder = nn.Sequential(layer, nn.Unflatten(1, (1, 8, 8)) if isinstance(layer, nn.Sequential) else nn.Identity())
    joined = Network(nn.Sequential(*encoder, plain.encoder), plain.flows[0], plain.head)
    refused(match, Pipeline(joined, Trajectory("action"), QuantileTest()).fit, CLEAN)


def test_networks_whose_images_are_apart_are_taken():
    for norm in (nn.BatchNorm2d(1), nn.InstanceNorm2d(1), nn.GroupNorm(1, 1)):
        plain = network()
        joined = Network(nn.Sequential(norm, plain.encoder), plain.flows[0], plain.head)
        Pipeline(joined, Trajectory("action"), QuantileTest()).fit(CLEAN)


def test_a_threshold_has_the_rate_of_false_alarms_that_it_is_for():
    pipeline = Pipeline(network(), detector=Detector(FOREST)).fit(CLEAN, ODD)
    scores = np.sort(pipeline.scores(NEW))
    for rate in (0.01999, 0.05, 0.1, 0.5):
        threshold = pipeline.threshold(NEW, rate=rate)
        assert (scores > threshold).mean() <= rate
        assert (scores >= threshold).mean() > rate  # and no lower one has it
        assert np.array_equal(pipeline.predict(NEW, threshold=threshold), pipeline.scores(NEW) > threshold)
        evaluated = pipeline.evaluate(NEW, NEW_ODD, threshold=threshold)
        assert evaluated == score(pipeline.scores(NEW), pipeline.scores(NEW_ODD), threshold=threshold)
    with pytest.warns(UserWarning, match=r"clean holds 80 images, fewer than the 100 that rate 0.01 asks for"):
        assert pipeline.threshold(NEW, rate=0.01) == scores[-1]
    refused(r"rate must lie in \(0, 1\), got 1.5", pipeline.threshold, NEW, rate=1.5)
    refused("rate must be a number", pipeline.threshold, NEW, rate="5%", error=TypeError)
    refused("threshold must be finite, got nan", pipeline.predict, NEW, threshold=float("nan"))


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (
            lambda x: x.mean((0, 2, 3))[None],
            ValueError,
            r"Own must return features \(B, F\), .* \(1, 1\) for 80",
        ),
        (lambda x: x.mean((1, 2, 3)), ValueError, r"got shape \(80,\) for 80 images"),
        (lambda x: x.mean((1, 2, 3)).numpy(), TypeError, "a row for each image, got ndarray"),
    ],
)
def test_features_are_a_row_for_each_image(values, error, match):
    class Own(Features):
        def __call__(self, network, x):
            return values(x)

    refused(match, Pipeline(network(), Own(), QuantileTest()).fit, CLEAN, error=error)


def test_errors():
    pipeline = Pipeline(network())
    refused("must record its steps, got Linear: pass odenets.adapt", Pipeline, nn.Linear(64, 10), error=TypeError)
    refused("features must be an instance, got the class", Pipeline, network(), features=Trajectory, error=TypeError)
    refused("features must be Features, such as Traj", Pipeline, network(), features="residue", error=TypeError)
    refused("batch_size must be at least 1, got 0", Pipeline, network(), batch_size=0)
    match = r"got RandomForestClassifier: pass Detector\(RandomForestClassifier\(...\)\)"
    refused(match, Pipeline, network(), detector=RandomForestClassifier(), error=TypeError)
    refused(r"adversarial must hold at least 10 images, got 3: too few attacks", pipeline.fit, CLEAN, ODD[:3])
    refused("Detector is fitted on adversarial images too", pipeline.fit, CLEAN)
    by_quantile = Pipeline(network(), Trajectory("action"), QuantileTest())
    refused("QuantileTest is fitted on no adversarial images", by_quantile.fit, CLEAN, ODD)
    refused(r"adversarial must have pixels in \[0, 1\]", pipeline.fit, CLEAN, 2 * ODD)
    refused("images must be finite", pipeline.predict, torch.full((2, 1, 8, 8), torch.nan))


def pooling():
    """A network that takes images of any size."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    net = Network(nn.Conv2d(1, 4, 3), Flow(lambda: ConvField(4), solver="euler", depth=2, h=1.0), head)
    net(CLEAN[:2])
    return net


def test_images_of_another_shape_are_refused_also_after_loading(tmp_path):
    pipeline = Pipeline(pooling(), detector=Detector(FOREST)).fit(CLEAN, ODD)
    large = torch.rand(20, 1, 12, 12)
    for each in (pipeline, Pipeline.load(pipeline.save(tmp_path / "detector"), pooling())):
        for call in (each.extract, each.scores, each.predict):
            refused("images must have one shape, 1 x 8 x 8 as the first of fit, got 1 x 12 x 12: resize", call, large)
        refused("clean must have one shape", each.threshold, large)
        refused("adversarial must have one shape", each.evaluate, NEW, large)
    refused("adversarial must have one shape", pipeline.fit, CLEAN, large)
    refused("noisy must have one shape", pipeline.fit, CLEAN, ODD, noisy=large)
    assert pipeline.fit(large, large.flip(0)).scores(large).shape == (20,)


def test_a_file_without_a_shape_loads(tmp_path):
    pipeline = Pipeline(pooling(), Trajectory(), QuantileTest())
    X, predicted = pipeline.extract(CLEAN)
    pipeline.fit_features(X, np.zeros(len(X), int), predicted)
    content = {"network": fingerprint(pooling()), "features": pipeline.features, "detector": pipeline.detector}
    write(tmp_path / "old", content)
    for path in (pipeline.save(tmp_path / "new"), tmp_path / "old"):
        again = Pipeline.load(path, pooling())
        assert np.array_equal(again.scores(NEW), pipeline.scores(NEW))
        assert again.scores(torch.rand(3, 1, 12, 12)).shape == (3,)  # what is fitted to features knows no images
    write(tmp_path / "damaged", content | {"shape": ["wide"]})
    refused("is damaged", Pipeline.load, tmp_path / "damaged", pooling())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([CLEAN[:40], CLEAN[40:]], r"got list: one tensor of all, torch.stack of images and torch.cat of batches"),
        (DataLoader(TensorDataset(CLEAN), 5), "got DataLoader: one tensor of all"),
        (iter([]), "got list_iterator: one tensor of all"),
        (CLEAN.numpy(), r"got ndarray: torch.from_numpy\(x\), channels first, bytes divided by 255"),
        (None, "got NoneType$"),
        ("photos/", "got str$"),
        (CLEAN.to("meta"), "hold numbers, got a tensor on the meta device"),
        (CLEAN.to_sparse(), r"be dense, got a tensor of torch.sparse_coo: x.to_dense\(\)"),
    ],
)
def test_what_are_no_images_is_refused_by_the_name_of_the_argument(value, match):
    pipeline = Pipeline(network(), Trajectory(), QuantileTest()).fit(CLEAN)
    both = Pipeline(network(), detector=Detector(FOREST)).fit(CLEAN, ODD)
    refused(f"clean must .*{match}", Pipeline(network(), Trajectory(), QuantileTest()).fit, value, error=TypeError)
    refused(f"images must .*{match}", pipeline.scores, value, error=TypeError)
    refused(f"clean must .*{match}", pipeline.threshold, value, error=TypeError)
    refused(f"adversarial must .*{match}", both.evaluate, CLEAN, value, error=TypeError)
    if value is not None:
        refused(f"adversarial must .*{match}", both.fit, CLEAN, value, error=TypeError)
        refused(f"noisy must .*{match}", both.fit, CLEAN, ODD, noisy=value, error=TypeError)


def test_attacked_images_come_as_images():
    labels = torch.zeros(80, dtype=torch.long)
    attacked = Attacked(ODD, labels, labels, labels, torch.zeros(80), torch.zeros(80))
    refused(
        "adversarial must .* got Attacked: pass its images", Pipeline(network()).fit, CLEAN, attacked, error=TypeError
    )


def test_a_pipeline_says_what_it_is():
    pipeline = Pipeline(network(), Trajectory("action"), QuantileTest())
    assert repr(pipeline) == "Pipeline(Network, Trajectory('action'), QuantileTest(); not fitted)"
    assert repr(pipeline.fit(CLEAN)) == "Pipeline(Network, Trajectory('action'), QuantileTest(); fitted)"


def test_a_plain_network_is_told_of_adapt_where_a_detector_is_loaded(tmp_path):
    path = Pipeline(network(), Trajectory(), QuantileTest()).fit(CLEAN).save(tmp_path / "detector")
    refused(
        "must record its steps, got Linear: pass odenets.adapt", Pipeline.load, path, nn.Linear(2, 2), error=TypeError
    )


def test_an_error_of_the_network_says_if_channels_seem_last():
    colored = models.small_network(3, solver="bs23", depth=2, normalize=models.Normalize([0.5] * 3, [0.3] * 3))
    with pytest.raises(ValueError, match="x must have 3 channels") as caught:
        Pipeline(colored).extract(torch.rand(12, 8, 8, 3))
    assert caught.value.__notes__ == ["images of shape (12, 8, 8, 3), are their channels last? x.permute(0, 3, 1, 2)"]


@pytest.mark.parametrize("kind", [Trajectory, FourierSpectrum, Mahalanobis, NaturalSceneStatistics])
def test_a_network_in_modules_is_seen_as_the_network_that_it_was(tmp_path, kind):
    whole = network()
    modules = split_into_modules(whole, 2, CLEAN[:2])
    one, other = (kind().fit(net, CLEAN, torch.arange(len(CLEAN)) % 10) for net in (whole, modules))
    for expected, values in zip(Pipeline(whole, one).extract(NEW), Pipeline(modules, other).extract(NEW), strict=True):
        assert np.array_equal(expected, values)
    pipeline = Pipeline(modules, other, Detector(FOREST)).fit(CLEAN, ODD)
    again = Pipeline.load(pipeline.save(tmp_path / "detector"), modules)
    assert np.array_equal(again.scores(NEW), pipeline.scores(NEW))
