"""How far the blocks of a network move a cloud of points, beside the shortest way there is (appendix F.5.1).

The map of a block sends a cloud to the next one. No map between the two moves the points by less than their Wasserstein
distance: ``W1 <= mean |r|`` and ``W2 <= sqrt(mean |r|^2)``, with equality for an optimal map.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odenets.network import Network

__all__ = ["Moves", "moves", "states", "wasserstein"]


@dataclass(frozen=True)
class Moves:
    """What each block does to a cloud; Euclidean lengths, one number per block.

    Attributes:
        mean: mean displacement.
        root_mean_square: root mean square displacement.
        w1, w2: exact Wasserstein distances between the clouds before and after, with the costs ``|x - y|`` and its
            square.
    """

    mean: np.ndarray
    root_mean_square: np.ndarray
    w1: np.ndarray
    w2: np.ndarray

    @property
    def gap(self) -> float:
        """By how much the way of the points is longer than the shortest, ``sum rms / sum W2 - 1``."""
        return float(self.root_mean_square.sum() / self.w2.sum() - 1)


def wasserstein(x: Tensor, y: Tensor, p: int = 2) -> float:
    """Exact Wasserstein distance ``W_p`` between two clouds of equally many points, by linear programming (POT).

    Args:
        x, y: points, ``(N, *S)``.
        p: 1 or 2; the cost is the Euclidean distance to this power.

    Raises:
        ValueError: clouds of several shapes, or another p.
    """
    import ot

    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"x and y must have one shape (N, *S), got {tuple(x.shape)} and {tuple(y.shape)}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    a, b = (z.detach().cpu().double().flatten(1).numpy() for z in (x, y))
    cost = ot.dist(a, b, metric="euclidean" if p == 1 else "sqeuclidean")
    least: Any = ot.emd2(ot.unif(len(a)), ot.unif(len(b)), cost, numItermax=1_000_000)
    return max(float(least), 0.0) ** (1 / p)


@torch.no_grad()
def states(network: Network, x: Tensor) -> list[Tensor]:
    """The states of inputs ``x`` before the first block and after every block, in eval mode; its mode is restored."""
    mode = network.training
    network.eval()
    try:
        steps = list(network.steps(x, closing=False))
    finally:
        network.train(mode)
    return [steps[0].x0, *(step.x1 for step in steps)]


def moves(network: Network, x: Tensor) -> Moves:
    """What the blocks of a network do to the cloud of inputs ``x`` ``(N, ...)``, in eval mode.

    Raises:
        ValueError: several flows, whose states cannot be compared.
    """
    if len(network.flows) > 1:
        raise ValueError(f"network must have one flow, got {len(network.flows)}")
    clouds = states(network, x)
    pairs = list(pairwise(clouds))
    lengths = torch.stack([(after - before).flatten(1).norm(dim=1) for before, after in pairs]).double()
    w1, w2 = (np.array([wasserstein(*pair, p=p) for pair in pairs]) for p in (1, 2))
    return Moves(lengths.mean(1).numpy(), lengths.square().mean(1).sqrt().numpy(), w1, w2)
