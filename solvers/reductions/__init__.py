"""Per-sample reductions of stages and residues, and the finish of a step: each operand read once, both ways.

They are what steps and measures are computed with, for who writes a solver or a measure of their own. ``<.>`` is the
mean over the features of a sample, all dimensions but the first:

>>> import torch
>>> from solvers.reductions import mean_square
>>> mean_square(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
tensor([12.5000,  0.5000])

Small operands are reduced by plain operations of torch, large ones by kernels: Triton's on a GPU, blocks of torch's
operations on a CPU. Sums are taken in float32 or wider and come in that precision.
"""

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
