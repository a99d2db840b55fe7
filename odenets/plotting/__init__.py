"""Figures; the one part of the package that imports matplotlib."""

from odenets.plotting.depth import accuracy_against_cost, adaptive_depth, block_errors, depth_and_steps
from odenets.plotting.detection import histograms, operating_characteristics
from odenets.plotting.figures import intervals, save
from odenets.plotting.solves import cost_of_solves, neural_ode, solves_while_training
from odenets.plotting.transport import (
    action_against_accuracy,
    clouds,
    displacements,
    pictures,
    refinement_by_block,
)

__all__ = [
    "accuracy_against_cost",
    "action_against_accuracy",
    "adaptive_depth",
    "block_errors",
    "clouds",
    "cost_of_solves",
    "depth_and_steps",
    "displacements",
    "histograms",
    "intervals",
    "neural_ode",
    "operating_characteristics",
    "pictures",
    "refinement_by_block",
    "save",
    "solves_while_training",
]
