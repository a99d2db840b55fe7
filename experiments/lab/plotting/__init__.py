"""Figures of the experiments."""

from lab.plotting.depth import accuracy_against_cost, block_errors, depth_and_steps, epochs_of
from lab.plotting.intervals import intervals
from lab.plotting.solves import cost_of_solves, solves_while_training

__all__ = [
    "accuracy_against_cost",
    "block_errors",
    "cost_of_solves",
    "depth_and_steps",
    "epochs_of",
    "intervals",
    "solves_while_training",
]
