"""Per-sample reductions of stages and residues, and the finish of a step: each operand read once, both ways."""

from solvers.reductions.functional import (
    SMALL,
    combine,
    displaced,
    error_ratios,
    finish_step,
    mean_square,
    mean_square_and_cosine,
    power_mean,
    root_mean_square,
    weighted_action,
    weighted_root_mean_square,
)
from solvers.reductions.reference import combination

__all__ = [
    "SMALL", "combination", "combine", "displaced", "error_ratios", "finish_step", "mean_square",
    "mean_square_and_cosine", "power_mean", "root_mean_square", "weighted_action", "weighted_root_mean_square",
]  # fmt: skip
