"""Detection on networks that take their inputs by keyword."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier

from odenets.detection import (
    LID,
    Detector,
    FourierSpectrum,
    Mahalanobis,
    NaturalSceneStatistics,
    Pipeline,
    QuantileTest,
    Trajectory,
    in_batches,
)
from tests.odenets.keywords import Encoding, reader, sentences

CLEAN, LABELS = sentences(120)


def louder(inputs, by=4.0):
    return Encoding(**inputs, scale=torch.full((len(inputs["input_ids"]),), by))


@pytest.mark.parametrize("mode", ["general", "conditional", "ensemble"])
def test_what_is_louder_is_detected_among_sentences(mode):
    network, new = reader(), sentences(60, seed=1)[0]
    forest = Detector(RandomForestClassifier(20, random_state=0), mode=mode)
    pipeline = Pipeline(network, detector=forest, batch_size=50).fit(louder(CLEAN, 1.0), louder(CLEAN))
    assert pipeline.predict(louder(new, 1.0)).mean() < 0.2
    assert pipeline.predict(louder(new)).mean() > 0.7
    assert pipeline.evaluate(louder(new, 1.0), louder(new)).auroc > 0.85


def test_a_test_on_the_action_is_fitted_on_sentences_and_has_its_rate():
    pipeline = Pipeline(reader(), Trajectory("action"), QuantileTest(0.1)).fit(CLEAN)
    assert pipeline.predict(sentences(100, seed=2)[0]).mean() < 0.25
    assert pipeline.threshold(sentences(100, seed=3)[0], rate=0.1) == pytest.approx(0, abs=0.5)
    with pytest.warns(UserWarning, match="clean holds 8 images, fewer than the 20"):
        pipeline.threshold(sentences(8)[0])


def test_features_and_classes_are_those_of_one_pass():
    network = reader()
    X, predicted = Pipeline(network, Trajectory("action", "cosine"), batch_size=7).extract(CLEAN)
    output, features = Trajectory("action", "cosine").output_and_features(network.eval(), CLEAN)
    np.testing.assert_allclose(X, features.detach().numpy(), rtol=1e-5)
    assert (predicted == output["logits"].argmax(1).numpy()).all()
    batched = in_batches(lambda x: network(**x)["logits"], network, CLEAN, 50)
    torch.testing.assert_close(batched, output["logits"].detach())


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        (Encoding({name: x[:5] for name, x in CLEAN.items()}), ValueError, "clean must hold at least 10 images, got 5"),
        (louder(CLEAN, torch.nan), ValueError, "clean must be finite, got NaN or infinity in 'scale'"),
        (
            louder(CLEAN, 1.0) | {"scale": torch.ones(300, device="meta")},
            TypeError,
            "clean of 'scale' must hold numbers",
        ),
        (Encoding(text=["a"] * 20), TypeError, r"must be tensors \(B, ...\), got Encoding with \['text'\]"),
    ],
)
def test_what_is_no_data_is_named(inputs, error, match):
    with pytest.raises(error, match=match):
        Pipeline(reader(), Trajectory("action"), QuantileTest()).fit(inputs)


def test_no_sample_is_no_data():
    with pytest.raises(ValueError, match="images must not be empty, got no sample"):
        Pipeline(reader()).extract({name: x[:0] for name, x in CLEAN.items()})


@pytest.mark.parametrize("features", [NaturalSceneStatistics(), FourierSpectrum(), Mahalanobis(), LID()])
def test_features_of_images_and_of_all_tokens_refuse_keywords(features):
    with pytest.raises(
        TypeError, match=r"(must be a floating tensor \(N, C, H, W\)|feature maps must be of a tensor x)"
    ):
        features.fit(reader(), CLEAN, LABELS)(reader(), CLEAN)
