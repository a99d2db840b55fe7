"""How far the blocks of a network move a cloud of points, beside the shortest way there is [K24, appendix F.5.1].

The map of a block sends a cloud to the next one. No map between the two moves the points by less than their Wasserstein
distance: ``W1 <= mean |r|`` and ``W2 <= sqrt(mean |r|^2)``, with equality for an optimal map.

>>> from odenets.models import points_network
>>> measured = moves(points_network(depth=3), torch.rand(20, 2))
>>> bool((measured.w2 <= measured.root_mean_square + 1e-6).all()), measured.gap > -1e-6
(True, True)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odenets.errors import needs
from odenets.flow import Flow
from odenets.modes import evaluating, inputs_for
from odenets.network import Network

__all__ = ["LARGEST", "Moves", "moves", "states_of", "wasserstein"]

LARGEST = 20_000
"""Points of a cloud of which a machine still holds the costs, 3.2 GB, and three tables more of that size."""

GAP = 1e-8
"""How far a cost may lie above its lower bound, relatively, to count as the least one."""


@dataclass(frozen=True)
class Moves:
    """What each block does to a cloud, as :func:`moves` measures it; Euclidean lengths, one per block: ``(blocks,)``.

    >>> one = np.ones(2)
    >>> Moves(mean=one, root_mean_square=one, w1=one, w2=np.array([1.0, 0.6])).gap  # 2 / 1.6 - 1
    0.25

    Attributes:
        mean: mean displacement.
        root_mean_square: root mean square displacement.
        w1: exact Wasserstein distance between the clouds before and after, with the cost ``|x - y|``.
        w2: that with the cost ``|x - y|^2``, the root of the least mean.
    """

    mean: np.ndarray
    root_mean_square: np.ndarray
    w1: np.ndarray
    w2: np.ndarray

    @property
    def gap(self) -> float:
        """By how much the way of the points is longer than the shortest, ``sum rms / sum W2 - 1``.

        0 where nothing moves, and infinity where points change places alone.
        """
        way, shortest = float(self.root_mean_square.sum()), float(self.w2.sum())
        if shortest == 0:
            return math.inf if way else 0.0
        return way / shortest - 1


def wasserstein(x: Tensor, y: Tensor, p: int = 2) -> float:
    """Exact Wasserstein distance ``W_p`` between two clouds of equally many points, at any scale and offset.

    The costs come from differences of coordinates in float64. The network simplex of POT is believed where its own dual
    variables prove the cost least, to 1e-8; beside far larger costs, or tiny ones, they do not, and SciPy's shortest
    augmenting paths take its place, whose rounding is relative to the least cost.

    Args:
        x, y: points, ``(N, *S)``, N at most 20,000; complex coordinates count as two.
        p: 1 or 2; the cost is the Euclidean distance to this power.

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: clouds of several shapes, empty, not finite or too large, another p, or distances that span more
            than float64 does.
        ModuleNotFoundError: POT or SciPy is not installed: ``pip install 'odenets[transport]'``.

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [0.0]])
    >>> wasserstein(x, y, p=1)  # 0 stays, 1 goes to 3
    1.0
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"x and y must have one shape (N, *S), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.numel() or len(x) > LARGEST:
        raise ValueError(f"x and y must hold between 1 and {LARGEST} points (N, *S), got shape {tuple(x.shape)}")
    a, b = (_coordinates(z).numpy() for z in (x, y))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("x and y must be finite, got NaN or infinity")
    exponent = math.frexp(max(np.abs(a).max(), np.abs(b).max()))[1]
    a, b = np.ldexp(a, -exponent), np.ldexp(b, -exponent)  # exact, so that no square leaves the range of float64
    least = _least_cost(a, b, p)
    one, other = (points[np.lexsort(points.T)] for points in (a, b))
    if least < np.finfo(float).tiny / np.finfo(float).eps and not np.array_equal(one, other):
        raise ValueError("x and y must hold coordinates within 150 orders of magnitude: squares of some are lost")
    return math.ldexp(least ** (1 / p), exponent)


def _coordinates(x: Tensor) -> Tensor:
    """Float64 coordinates ``(N, D)`` on the CPU."""
    x = x.detach().cpu()
    return (torch.view_as_real(x) if x.is_complex() else x).double().flatten(1)


def _least_cost(a: np.ndarray, b: np.ndarray, p: int) -> float:
    """Least mean cost of a map from one cloud onto the other."""
    with needs("transport"):
        import ot
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

    cost = cdist(a, b, "euclidean" if p == 1 else "sqeuclidean")  # by differences: products lose digits far away
    scale = math.frexp(cost.max())[1]
    cost = np.ldexp(cost, -scale)  # the network simplex takes what is far below 1 for 0
    uniform = ot.unif(len(a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is not believed
        answer: Any = ot.emd(uniform, uniform, cost, numItermax=1_000_000, log=True)
    plan, u = answer[0], answer[1]["u"]
    v = (cost - u[:, None]).min(0)
    rounding = 4 * np.finfo(float).eps * max(np.abs(u).max(), np.abs(v).max())
    upper, bound = float((plan * cost).sum()), float(u.mean() + v.mean())
    errors = max(np.abs(plan.sum(axis) - uniform).max() for axis in (0, 1))
    proven = abs(upper - bound) + rounding <= GAP * upper
    if upper > 0 and proven and plan.min() >= 0 and errors <= 1e-12 / len(a):
        return math.ldexp(upper, scale)
    return math.ldexp(math.fsum(cost[linear_sum_assignment(cost)]) / len(a), scale)


@torch.no_grad()
def states_of(network: Network | Flow, x: Tensor) -> list[Tensor]:
    """The states of inputs ``x`` ``(N, ...)`` before the first block of a ``network`` and after every block.

    In eval mode, each ``(N, *S)``: one more than there are blocks. Inputs are taken to the network's device and
    precision; the modes of its modules are restored.

    Raises:
        TypeError: another network, such as an adapted model, whose steps need not begin where the last one ended.

    >>> from odenets.models import points_network
    >>> [tuple(state.shape) for state in states_of(points_network(depth=2), torch.rand(20, 2))]
    [(20, 2), (20, 2), (20, 2)]
    """
    if not isinstance(network, Network | Flow):
        raise TypeError(
            f"network must be a Network or a Flow, got {type(network).__name__}: of others measure each step, "
            "wasserstein(step.x0, step.x1) for step in network.steps(x)"
        )
    with evaluating(network):
        steps = list(network.steps(inputs_for(network, x), closing=False))
    return [steps[0].x0, *(step.x1 for step in steps)]


def moves(network: Network | Flow, x: Tensor) -> Moves:
    """What the blocks of a network do to a cloud, in eval mode.

    Args:
        network: of one flow, or a flow.
        x: inputs, ``(N, ...)``, N at most 20,000; taken to the network's device and precision.

    Returns:
        Mean displacements and Wasserstein distances, of every block.

    Raises:
        TypeError: neither a Network nor a Flow.
        ValueError: several flows, whose states cannot be compared, or states that are not finite.
    """
    if isinstance(network, Network) and len(network.flows) > 1:
        raise ValueError(f"network must have one flow, got {len(network.flows)}")
    clouds = [_coordinates(cloud) for cloud in states_of(network, x)]
    for block, cloud in enumerate(clouds):
        if not cloud.isfinite().all():
            raise ValueError(f"network must have finite states, got NaN or infinity after block {block} (0: before)")
    pairs = list(pairwise(clouds))
    lengths = torch.stack([(after - before).norm(dim=1) for before, after in pairs])
    w1, w2 = (np.array([wasserstein(*pair, p=p) for pair in pairs]) for p in (1, 2))
    return Moves(lengths.mean(1).numpy(), lengths.square().mean(1).sqrt().numpy(), w1, w2)
