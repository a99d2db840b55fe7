"""Neuron activation coverage: whether neurons are in states where training images had them, NAC-UE.

Liu et al. 2023, arXiv 2306.02879.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn import functional as F

from lab.pretrained.resnets import ResNet
from odenets.detection.isolation import frozen

__all__ = ["Coverage", "neuron_states"]


def neuron_states(model: ResNet, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, means of the channels after each stage, and what these means add to the divergence from uniform.

    That is ``z * dD/dz``, with z the mean of a channel over its pixels and ``D = KL(u || softmax(logits))`` of the
    uniform distribution u; the derivative is that of a shift of all pixels of the channel. Of the last stage, z is the
    state before the head.

    Args:
        model: in stages; it is left as it was.
        x: images ``(B, C, H, W)``.

    Returns:
        Logits ``(B, K)``; of each stage ``(B, C)``, the means; and the products.
    """
    maps: list[Tensor] = []
    with frozen(model):
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda module, args, out: maps.append(out.requires_grad_()))
            for name in model.stages
        ]
        try:
            logits = model(x)
        finally:
            for hook in hooks:
                hook.remove()
        divergence = -F.log_softmax(logits, 1).mean(1)  # less log K, which has no derivative
        gradients = torch.autograd.grad(divergence.sum(), maps)
    means = [each.detach().mean((2, 3)) for each in maps]
    products = [z * gradient.sum((2, 3)) for z, gradient in zip(means, gradients, strict=True)]
    return logits.detach(), means, products


class Coverage:
    """How rarely training images had neurons in the states that an image has them in.

    The state of a neuron is the sigmoid of ``alpha * z * dD/dz``, in one of M intervals of equal length. An interval
    that n training images fall into covers it by ``min(n / least, 1)``. The score is the mean over the neurons of a
    layer and over layers, its sign changed.

    Args:
        products: of training images, for each layer ``(N, C)``, as :func:`neuron_states` has them.
        alpha: steepness, over the root mean square of a layer's products, whose size differs from layer to layer.
        intervals: M.
        least: images that cover an interval wholly, O* in the paper, ``r N / M``.
    """

    def __init__(self, products: list[np.ndarray], alpha: float, intervals: int, least: int) -> None:
        self.intervals, self.least = intervals, least
        self.steepness = [alpha / max(float(np.sqrt(np.square(layer).mean())), 1e-30) for layer in products]
        self.counts = []
        for layer, places in zip(products, self._places(products), strict=True):
            counts = np.zeros((layer.shape[1], intervals), dtype=np.int64)
            np.add.at(counts, (np.arange(layer.shape[1]), places), 1)
            self.counts.append(counts)

    def _places(self, products: list[np.ndarray]) -> list[np.ndarray]:
        """Intervals of the states, 0 to M - 1, of each layer ``(N, C)``."""
        states = [expit(alpha * layer) for alpha, layer in zip(self.steepness, products, strict=True)]
        return [np.minimum((state * self.intervals).astype(np.int64), self.intervals - 1) for state in states]

    def __call__(self, products: list[np.ndarray]) -> np.ndarray:
        """Scores of images, larger for what is foreign, ``(N,)``."""
        of_layers = [
            np.minimum(counts[np.arange(len(counts)), places] / self.least, 1).mean(1)
            for counts, places in zip(self.counts, self._places(products), strict=True)
        ]
        return -np.mean(of_layers, axis=0)
