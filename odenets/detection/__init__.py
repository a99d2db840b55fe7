"""Detection: adversarial and out-of-distribution inputs told by the path they take through a network (section 5)."""

from odenets.detection.attacks.adaptive import Evasion, black_box, feature_attack, surrogate_attack
from odenets.detection.attacks.adaptive.surrogate import Surrogate, distill
from odenets.detection.attacks.generation import PRESETS, Attack, Attacked, attack, preset
from odenets.detection.comparison import Choice, Samples, choose_and_score
from odenets.detection.detector import Detector
from odenets.detection.evaluation import FALSE_POSITIVE_RATES, Parts, Scores, score, split
from odenets.detection.features.fourier import FourierSpectrum
from odenets.detection.features.lid import LID
from odenets.detection.features.mahalanobis import Mahalanobis
from odenets.detection.features.natural_scenes import SceneStatistics
from odenets.detection.features.trajectory import Features, Trajectory, check_images, in_batches
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
    "Parts",
    "Pipeline",
    "QuantileTest",
    "Samples",
    "SceneStatistics",
    "Scores",
    "Surrogate",
    "Trajectory",
    "attack",
    "black_box",
    "check_images",
    "choose_and_score",
    "distill",
    "feature_attack",
    "in_batches",
    "preset",
    "score",
    "split",
    "surrogate_attack",
]
