"""Iterative refinement: how much a block changes the state, and whether it goes down the loss [K24, figure 6]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from odenets.adapting import AdaptedModel
from odenets.modes import evaluating, inputs_for
from odenets.network import Network

__all__ = ["Refinement", "iterative_refinement"]


@dataclass(frozen=True)
class Refinement:
    """Means over the samples, one number per block, ``(blocks,)``, as :func:`iterative_refinement` measures them.

    Attributes:
        ratio: ``|x1 - x0| / |x0|``, the displacement by the block over the state before it.
        cosine: of the displacement with the gradient of the loss at x0; negative where the block goes down the loss.
    """

    ratio: Tensor
    cosine: Tensor


def iterative_refinement(network: Network | AdaptedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Refinement:
    """How far each block of a classifier moves a state, and whether down the gradient of the loss [K24, figure 6].

    In eval mode; the modes of the network's modules are restored. Blocks that refine move states little and down the
    loss: small ratios, negative cosines.

    Args:
        network: a network that reads the solution of its last flow, or :func:`odenets.adapt` of a model. A block of the
            latter that starts from a projection has the gradient at the projection's output, which is added.
        batches: any iterable of batches ``(inputs, labels)``, ``(B, *S)`` and ``(B,)`` int64, taken to the network's
            device and the inputs to its dtype.

    Returns:
        Ratio and cosine of every block.

    Raises:
        TypeError: another network, one whose output is no tensor of logits, or batches that are no pairs.
        ValueError: no batch, a network that reads an ensemble, another number of steps in each batch, or a state of an
            adapted model that is changed in place, so that it has no gradient.

    >>> from odenets.models import points_network
    >>> batches = [(torch.rand(8, 2), torch.arange(8) % 2)]
    >>> refinement = iterative_refinement(points_network(depth=3), batches)
    >>> refinement.ratio.shape, refinement.cosine.shape
    (torch.Size([3]), torch.Size([3]))
    """
    if not isinstance(network, Network | AdaptedModel):
        raise TypeError(
            f"network must be an odenets.Network or an adapted model, got {type(network).__name__}: pass adapt(network)"
        )
    if isinstance(network, Network) and network.readout != "solution":
        raise ValueError(f"network must read the solution, got readout {network.readout!r}")
    if not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of (inputs, labels), got {kind}: Batches(data, size)")
    sums, samples = None, 0
    with evaluating(network):
        for batch in batches:
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TypeError(f"batches must hold pairs (inputs, labels), got {type(batch).__name__}")
            x, y = batch
            summed = _of_batch(network, x, y)
            if sums is not None and sums.shape != summed.shape:
                raise ValueError(
                    f"network must take the same steps for each batch, got {sums.shape[1]} and {summed.shape[1]}"
                )
            sums, samples = summed if sums is None else sums + summed, samples + len(x)
    if sums is None:
        raise ValueError("batches must hold at least one batch")
    return Refinement(*(sums / samples).cpu())


def _of_batch(network: Network | AdaptedModel, x: Tensor, y: Tensor) -> Tensor:
    """Sums over the samples of ratio and cosine, ``(2, blocks)``."""
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs_for(network, x).detach().clone()
        y = y.to(x.device)
        if x.is_floating_point():
            x.requires_grad_()
        if isinstance(network, AdaptedModel):
            output, steps, states = network.differentiable_steps(x)
        else:
            steps = list(network.steps(x, closing=False))
            output, states = network.head(steps[-1].x1), [step.x0 for step in steps]
        if not isinstance(output, Tensor):
            raise TypeError(f"network must return logits, got {type(output).__name__}")
        loss = F.cross_entropy(output, y, reduction="sum")
        gradients = torch.autograd.grad(loss, states)
    rows = []
    for step, gradient in zip(steps, gradients, strict=True):
        state, moved = step.x0.detach().flatten(1), (step.x1 - step.x0).detach().flatten(1)
        cosine = F.cosine_similarity(moved, gradient.flatten(1)).sum()
        rows.append(torch.stack([(moved.norm(dim=1) / state.norm(dim=1)).sum(), cosine]))
    return torch.stack(rows, 1)
