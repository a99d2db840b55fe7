"""Features of a detector: numbers read off an image or its path through a network."""

from odenets.detection.features.base import Features
from odenets.detection.features.fourier import FourierSpectrum
from odenets.detection.features.kernel_density import KernelDensity
from odenets.detection.features.lid import LID
from odenets.detection.features.mahalanobis import Mahalanobis
from odenets.detection.features.natural_scenes import NaturalSceneStatistics
from odenets.detection.features.separation import Separation
from odenets.detection.features.squeezing import FeatureSqueezing
from odenets.detection.features.trajectory import Trajectory

__all__ = [
    "LID",
    "FeatureSqueezing",
    "Features",
    "FourierSpectrum",
    "KernelDensity",
    "Mahalanobis",
    "NaturalSceneStatistics",
    "Separation",
    "Trajectory",
]
