"""Detection: adversarial and foreign inputs, recognized by the path they take through a network [K24, section 5]."""

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
from odenets.detection.detector import Detector
from odenets.detection.evaluation import (
    FALSE_POSITIVE_RATES,
    Choice,
    Parts,
    Samples,
    Scores,
    choose_and_score,
    score,
    split,
)
from odenets.detection.features import LID, Features, FourierSpectrum, Mahalanobis, NaturalSceneStatistics, Trajectory
from odenets.detection.features.base import check_images, in_batches
from odenets.detection.pipeline import Pipeline
from odenets.detection.quantile import QuantileTest

__all__ = [
    "FALSE_POSITIVE_RATES",
    "LID",
    "PRESETS",
    "Attack",
    "Attacked",
    "Choice",
    "Detector",
    "Evasion",
    "Features",
    "FourierSpectrum",
    "Mahalanobis",
    "NaturalSceneStatistics",
    "Parts",
    "Pipeline",
    "ProjectedDescent",
    "QuantileTest",
    "Samples",
    "Scores",
    "Surrogate",
    "Trajectory",
    "black_box",
    "check_images",
    "choose_and_score",
    "distill",
    "feature_attack",
    "in_batches",
    "preset",
    "run_attack",
    "score",
    "split",
    "surrogate_attack",
]
