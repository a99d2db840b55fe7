"""Detection: adversarial and out-of-distribution inputs told by the path they take through a network (section 5)."""

from odenets.detection.detector import Detector
from odenets.detection.features import Features, Trajectory, check_images, in_batches
from odenets.detection.pipeline import Pipeline
from odenets.detection.protocol import Parts, Scores, score, split
from odenets.detection.quantile import QuantileTest

__all__ = [
    "Detector",
    "Features",
    "Parts",
    "Pipeline",
    "QuantileTest",
    "Scores",
    "Trajectory",
    "check_images",
    "in_batches",
    "score",
    "split",
]
