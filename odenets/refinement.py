"""Iterative refinement: how much a block changes the state, and whether it goes down the loss (section 2.6, Fig. 6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from odenets.network import Network

__all__ = ["Refinement", "refinement"]


@dataclass(frozen=True)
class Refinement:
    """Means over the samples, one number per block, ``(blocks,)``.

    Attributes:
        ratio: ``|x1 - x0| / |x0|``, the displacement by the block over the state before it.
        cosine: of the displacement with the gradient of the loss at x0; negative where the block goes down the loss.
    """

    ratio: Tensor
    cosine: Tensor


def refinement(network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> Refinement:
    """Measure every block of a classifier, in eval mode; its mode is restored.

    Args:
        network: reads the solution of its last flow.
        batches: inputs and labels.

    Raises:
        ValueError: no batch, or a network that reads an ensemble.
    """
    if network.readout != "solution":
        raise ValueError(f"network must read the solution, got readout {network.readout!r}")
    mode = network.training
    network.eval()
    sums, samples = None, 0
    try:
        for x, y in batches:
            found = _of_batch(network, x, y)
            sums, samples = found if sums is None else sums + found, samples + len(x)
    finally:
        network.train(mode)
    if sums is None:
        raise ValueError("batches must hold at least one batch")
    return Refinement(*(sums / samples).cpu())


def _of_batch(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """Sums over the samples of ratio and cosine, ``(2, blocks)``."""
    with torch.enable_grad():
        steps = list(network.steps(x.detach().requires_grad_(), closing=False))
        loss = F.cross_entropy(network.head(steps[-1].x1), y, reduction="sum")
        gradients = torch.autograd.grad(loss, [step.x0 for step in steps])
    rows = []
    for step, gradient in zip(steps, gradients, strict=True):
        state, moved = step.x0.detach().flatten(1), (step.x1 - step.x0).detach().flatten(1)
        cosine = F.cosine_similarity(moved, gradient.flatten(1)).sum()
        rows.append(torch.stack([(moved.norm(dim=1) / state.norm(dim=1)).sum(), cosine]))
    return torch.stack(rows, 1)
