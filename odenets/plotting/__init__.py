"""Figures; the one part of the package that imports matplotlib."""

from odenets.plotting.detection import histograms, operating_characteristics
from odenets.plotting.figures import save
from odenets.plotting.records import blocks_by_samples
from odenets.plotting.transport import action_against_accuracy, clouds, displacements, pictures, refinement_by_block

__all__ = [
    "action_against_accuracy", "blocks_by_samples", "clouds", "displacements", "histograms",
    "operating_characteristics", "pictures", "refinement_by_block", "save",
]  # fmt: skip
