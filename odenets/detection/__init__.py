"""Detection: adversarial and foreign inputs, recognized by the path they take through a network [K24, section 5].

A :class:`Pipeline` reads features of the path that an image takes, and a classifier tells those of adversarial images
from those of clean ones. Attacks (:func:`run_attack`) make the images that it is fitted to:

>>> import torch
>>> from odenets.detection import Pipeline, preset, run_attack
>>> from odenets.models import small_network
>>> _ = torch.manual_seed(0)
>>> network, images = small_network(depth=2, total_time=1.0), torch.rand(40, 1, 8, 8)
>>> labels = network(images).argmax(1)  # as if it was trained on these
>>> attacked = run_attack(network, preset("FGM", eps=0.3), images, labels)
>>> images, attacked = images[attacked.success], attacked.subset(attacked.success)
>>> pipeline = Pipeline(network).fit(images, attacked.images)
>>> pipeline.predict(attacked.images[:3])
array([1, 1, 1])

A :class:`Monitor` needs clean images alone, and says how foreign others are as p-values:

>>> from odenets.detection import Monitor
>>> monitor = Monitor(network).fit(torch.rand(200, 1, 8, 8))
>>> monitor.predict(torch.zeros(2, 1, 8, 8))
array([1, 1])

Adaptive attacks know of the detector: they begin at images that it detects, and look for others that fool network and
detector. Here with far fewer steps than they need:

>>> from odenets.detection import ProjectedDescent, Trajectory
>>> from odenets.detection import black_box, distill, feature_attack, surrogate_attack
>>> start, clean = attacked.subset(torch.arange(1)), images[:1]
>>> few = {"pool": images, "max_iter": 1, "max_eval": 10, "init_eval": 5}
>>> evasion = black_box(network, pipeline.predict, start, clean, trials=5, **few)
>>> features = Trajectory()
>>> bound = features(network, start.images).mean() + 1e-6
>>> def detected(z):
...     return z.mean(1) <= bound
>>> evasion = feature_attack(network, features, detected, start, clean, rounds=1, **few)
>>> def score(z):
...     return pipeline.detector.predict_proba(z)[:, 1]
>>> X, _ = pipeline.extract(torch.cat([images, attacked.images]))
>>> surrogate, descent = distill(score, X, epochs=2), ProjectedDescent(eps=0.3, steps=3)
>>> evasion = surrogate_attack(
...     network, features, score, surrogate, start, clean, descent=descent
... )
>>> evasion.images.shape, evasion.evaded.shape
(torch.Size([1, 1, 8, 8]), torch.Size([1]))
"""

from odenets.detection.assessment import Assessment
from odenets.detection.attacks import PRESETS, Attack, Attacked, preset, run_attack
from odenets.detection.attacks.adaptive import (
    Evasion,
    ProjectedDescent,
    Surrogate,
    black_box,
    distill,
    feature_attack,
    surrogate_attack,
)
from odenets.detection.conformal import (
    conformal_p_values,
    conformal_threshold,
    false_positive_interval,
)
from odenets.detection.detector import Detector
from odenets.detection.drift import Drift, drift_test
from odenets.detection.evaluation import (
    FALSE_POSITIVE_RATES,
    Choice,
    Parts,
    Samples,
    Scores,
    choose_and_score,
    detection_rates,
    score,
    split,
)
from odenets.detection.features import (
    LID,
    Features,
    FeatureSqueezing,
    FourierSpectrum,
    KernelDensity,
    Mahalanobis,
    NaturalSceneStatistics,
    Separation,
    Trajectory,
)
from odenets.detection.features.base import check_images, in_batches
from odenets.detection.monitor import Monitor
from odenets.detection.one_class import OneClassGaussian
from odenets.detection.pipeline import Pipeline
from odenets.detection.quantile import QuantileTest

__all__ = [
    "FALSE_POSITIVE_RATES",
    "LID",
    "PRESETS",
    "Assessment",
    "Attack",
    "Attacked",
    "Choice",
    "Detector",
    "Drift",
    "Evasion",
    "FeatureSqueezing",
    "Features",
    "FourierSpectrum",
    "KernelDensity",
    "Mahalanobis",
    "Monitor",
    "NaturalSceneStatistics",
    "OneClassGaussian",
    "Parts",
    "Pipeline",
    "ProjectedDescent",
    "QuantileTest",
    "Samples",
    "Scores",
    "Separation",
    "Surrogate",
    "Trajectory",
    "black_box",
    "check_images",
    "choose_and_score",
    "conformal_p_values",
    "conformal_threshold",
    "detection_rates",
    "distill",
    "drift_test",
    "false_positive_interval",
    "feature_attack",
    "in_batches",
    "preset",
    "run_attack",
    "score",
    "split",
    "surrogate_attack",
]
