"""When to change the depth: the embedded error of each block decides [K24, section 6.2.1, A.3].

With ``e_m`` the embedded error of block m on validation data in eval mode, its root mean square over the features,
averaged over the samples:

- ``e_m > eps`` (or not finite): ``(theta_m, h_m)`` becomes two blocks ``(theta_m, h_m / 2)``;
- ``e_m < eps / K``: ``h_m`` becomes ``h_m + h_{m+1}`` and block m + 1 goes, unless that one needs refining;
- else the block is kept.

Every edit keeps the total time. Doubling h multiplies the error of a tied BS23 block by 8 where its field is smooth
(SiLU, the default of MLP fields); fields with ReLU, the default of convolutional ones, have kinks, and their error
grows by 5.5 to 5.8 only. With K = 8 two blocks of one h that merge stay within the tolerance in either case; a smaller
K merges more blocks with ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.errors import check_count, check_number
from odenets.inputs import call, inputs_of
from odenets.modes import evaluating, inputs_for
from odenets.network import Network
from odenets.neural_ode import NeuralODE
from odenets.regrouping import OTHERS
from solvers import Step

__all__ = ["DepthRule", "block_errors", "check_rule", "flow_network", "plan"]


@dataclass(frozen=True)
class DepthRule:
    """When to change the depth: a block is duplicated above the tolerance, and merged with the next far below it.

    Attributes:
        tolerance: eps, the largest error of a block.
        K: merge below ``tolerance / K``; what doubling h multiplies the error of a block by, or more. For tied BS23
            blocks that is 8 with smooth fields, and 5.5 to 5.8 with ReLU; 3 suits untied ones, for which it is 2.
        max_depth: largest number of blocks per flow.
        min_h: smallest step size, in the units of the flow's time.
        norm: "rms" over the features, independent of the dimension, or "raw" for the 2-norm of [K24].

    Raises:
        TypeError: what is no number, or a ``max_depth`` that is no whole one.
        ValueError: numbers out of range, or an unknown norm.
    """

    tolerance: float
    K: float = 8.0
    max_depth: int = 32
    min_h: float = 1e-3
    norm: Literal["rms", "raw"] = "rms"

    def __post_init__(self) -> None:
        for name in ("tolerance", "K", "min_h"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        check_count("max_depth", self.max_depth, 1)
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance must be positive and finite, got {self.tolerance}")
        if not self.K > 1:
            raise ValueError(f"K must be greater than 1, got {self.K}")
        if not self.min_h >= 0:
            raise ValueError(f"min_h must not be negative, got {self.min_h}")
        if self.norm not in ("rms", "raw"):
            raise ValueError(f"norm must be 'rms' or 'raw', got {self.norm!r}")


@torch.no_grad()
def block_errors(network: Network, batches: Iterable[Any], norm: str = "rms") -> list[list[float]]:
    """Mean embedded error of every block on some inputs, in eval mode; the modes of its modules are restored.

    Args:
        network: a network of discrete flows whose method has an embedded error, such as "bs23".
        batches: of inputs ``(B, ...)`` or of pairs ``(inputs, labels)``, whose labels are not read, taken to the
            network's device and dtype.
        norm: "rms" over the features of a sample, or "raw", their 2-norm.

    Returns:
        One list per flow, one error per block; infinite where any sample's is not finite.

    Raises:
        TypeError: another network, or one tensor in place of batches of inputs.
        ValueError: no batch, another norm, a neural ODE or a flow without embedded error, or batch norms that have
            statistics of some stages only: training does not take the closing stage, which the error reads, so that
            they are to be recalibrated before.

    >>> from odenets.models import points_network
    >>> network = points_network(solver="bs23", total_time=1.0, depth=3)
    >>> [len(flow) for flow in block_errors(network, [torch.rand(50, 2)])]
    [3]
    """
    network = flow_network(network)
    if norm not in ("rms", "raw"):
        raise ValueError(f"norm must be 'rms' or 'raw', got {norm!r}")
    for i, flow in enumerate(network.flows):
        if isinstance(flow, NeuralODE):
            raise ValueError(f"flow {i} is a neural ODE: its steps are no blocks")
    errors, starts = [], (0,)
    with evaluating(network):
        for x in inputs_of(batches, "batches"):
            x, error = inputs_for(network, x), _raw_error if norm == "raw" else measures.error
            _, records = call(network.record, x, error=error)
            errors.append(records["error"])
            starts = records.starts
    values = torch.cat(errors, 1).cpu().double().mean(1).tolist()
    return [
        [e if math.isfinite(e) else math.inf for e in values[start:end]]
        for start, end in pairwise([*starts, len(values)])
    ]


def _raw_error(step: Step) -> Tensor:
    """The 2-norm of the embedded error over the features, ``(B,)``."""
    return measures.error(step) * math.sqrt(math.prod(step.x0.shape[1:]))


def plan(errors: Sequence[float], h: Sequence[float], rule: DepthRule) -> list[Literal["keep", "duplicate", "merge"]]:
    """What becomes of each block of a flow, decided on one snapshot, left to right, each block touched once.

    A block marked "merge" absorbs the next one, which is marked "keep" and not looked at again.

    Args:
        errors: of the blocks, as :func:`block_errors` measures them; not finite counts as too large.
        h: their step sizes.
        rule: when to duplicate and to merge.

    Returns:
        A decision per block.

    Raises:
        ValueError: errors and h are not of one length.

    >>> plan([5e-3, 5e-4, 1e-5, 1e-5], h=[0.25] * 4, rule=DepthRule(tolerance=1e-3))
    ['duplicate', 'keep', 'merge', 'keep']
    """
    if len(errors) != len(h):
        raise ValueError(f"errors and h must hold a number per block, got {len(errors)} and {len(h)}")
    decisions: list[Literal["keep", "duplicate", "merge"]] = ["keep"] * len(errors)
    depth = len(errors)
    absorbed = False
    for m, error in enumerate(errors):
        if absorbed:
            absorbed = False
            continue
        if not error <= rule.tolerance:
            if depth < rule.max_depth and h[m] / 2 >= rule.min_h:
                decisions[m] = "duplicate"
                depth += 1
        elif error < rule.tolerance / rule.K and m + 1 < len(errors) and errors[m + 1] <= rule.tolerance:
            decisions[m] = "merge"  # which may be taken back: what it frees is free in the next round
            absorbed = True
    return decisions


def check_rule(rule: object) -> None:
    """That a rule is one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(rule, DepthRule):
        raise TypeError(f"rule must be a DepthRule, such as DepthRule(tolerance=1e-3), got {rule!r}")


def flow_network(network: nn.Module) -> Network:
    """The network itself, whose flows can be edited, behind ``torch.compile`` too."""
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, Network):
        raise TypeError(
            f"network must be an odenets.Network, whose flows can be edited, got {type(network).__name__}: {OTHERS}"
        )
    return network
