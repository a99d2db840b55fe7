"""Linear maps of states as matrices."""

import torch


def matrix(function, shape):
    """That of a linear function of one state."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    return function(basis).flatten(1).T
