"""A network, its features and a detector as one."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from odenets.detection import (
    Detector,
    FourierSpectrum,
    Mahalanobis,
    NaturalSceneStatistics,
    Pipeline,
    QuantileTest,
    Trajectory,
)
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
        (lambda z: {"logits": z}, TypeError, "network must return logits, .*got a dict"),
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
