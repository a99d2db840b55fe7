"""Density of the last feature map among those of training images of the predicted class."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from odenets.detection.features.base import Features, in_batches
from odenets.detection.features.feature_maps import feature_maps_of, pooled
from odenets.detection.features.training_set import check_training, training_labels
from odenets.detection.isolation import checked_logits, to_network

__all__ = ["KernelDensity", "log_density"]


class KernelDensity(Features):
    """Logarithm of a kernel density estimate at the last feature map of an input, among those of its predicted class.

    With z the means of the channels of the state after the last block over all positions, and ``z_i`` those of the
    training images with the label c that the network predicts for the input::

        log 1/N_c sum_i exp(-|z - z_i|^2 / sigma^2)

    Args:
        bandwidth: sigma, in units of the root mean square distance of two training images of one class, so that it
            means the same for states of any scale; Feinman et al. choose one for each data set.

    Attributes:
        states: of the training images, for each class ``(N_c, C)`` float64.
        width: sigma in units of the states.

    Raises:
        ValueError: a bandwidth that is not positive and finite.

    References:
        Feinman, Curtin, Shintre, Gardner. Detecting adversarial samples from artifacts. 2017, arXiv:1703.00410.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=3)
    >>> x, y = torch.rand(50, 1, 8, 8), torch.arange(50) % 10
    >>> KernelDensity().fit(network, x, y)(network, x[:5]).shape
    torch.Size([5, 1])
    """

    def __init__(self, *, bandwidth: float = 0.25) -> None:
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
        self.bandwidth = bandwidth
        self.states: list[np.ndarray] = []
        self.width = 0.0

    def fit(self, network: nn.Module, x: Tensor, y: Tensor, *, normalized: bool = False) -> KernelDensity:
        """Keep the states of training images in eval mode.

        Args:
            network: a network that records its steps.
            x: training images ``(N, C, H, W)``, pixels in [0, 1].
            y: their labels 0, 1, ..., ``(N,)`` of integers.
            normalized: whether images come normalized, with any finite values, and not as pixels in [0, 1].

        Returns:
            Itself.

        Raises:
            TypeError: inputs by keyword, images that are no floating tensor, or labels that are no tensor.
            ValueError: images outside [0, 1], labels that do not fit them, a class without two of them, or states that
                are not finite or do not vary within the classes.
        """
        check_training(x, normalized=normalized)
        labels = training_labels(x, y, fewest=2)
        z = in_batches(lambda part: self._last(network, part), network, x)
        if not z.isfinite().all():
            raise ValueError("network must have finite states on the training images, got NaN or infinity")
        states = [z.double().numpy()[labels == c] for c in range(labels.max() + 1)]
        # the mean square distance of two different ones is twice the unbiased variance, summed over the channels
        square = float(sum(2 * each.var(0, ddof=1).sum() for each in states)) / len(states)
        if square == 0:
            raise ValueError("x must hold images that differ within a class, got equal states")
        self.states, self.width = states, self.bandwidth * math.sqrt(square)
        return self

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Log densities of a batch ``x`` by a ``network``, ``(B, 1)`` float32; gradients pass.

        Raises:
            ValueError: before :meth:`fit`, for a network with other states, or that predicts a class without training
                images.
        """
        return self.output_and_features(network, x)[1]

    def output_and_features(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a ``network`` and the features of a batch ``x``.

        Raises:
            ValueError: as a call.
        """
        if not self.states:
            raise ValueError("KernelDensity must be fitted to training images before it is called: fit(network, x, y)")
        logits = checked_logits(network(to_network(network, x)), len(x))
        z = self._last(network, x)
        if z.shape[1] != (size := self.states[0].shape[1]):
            raise ValueError(f"network must be the one of fit, with states of {size} channels, got {z.shape[1]}")
        predicted = logits.argmax(1)
        if (last := int(predicted.max())) >= len(self.states):
            raise ValueError(f"network must predict the {len(self.states)} classes of fit, got class {last}")
        values = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for c, states in enumerate(self.states):
            members = predicted == c
            if members.any():
                values = values.masked_scatter(
                    members, log_density(z[members], torch.as_tensor(states, device=z.device), self.width)
                )
        return logits, values[:, None].float()

    @staticmethod
    def _last(network: nn.Module, x: Tensor) -> Tensor:
        """Channel means of the last feature map, ``(B, C)``."""
        return pooled(feature_maps_of(network, x)[-1])

    def __repr__(self) -> str:
        return f"KernelDensity(bandwidth={self.bandwidth:g})"


def log_density(x: Tensor, points: Tensor, width: float) -> Tensor:
    """``log 1/N sum_i exp(-|x - p_i|^2 / width^2)`` at each x of ``(B, D)``, for points ``(N, D)``; ``(B,)`` float64.

    >>> log_density(torch.zeros(1, 2), torch.zeros(3, 2), 1.0)
    tensor([0.], dtype=torch.float64)
    """
    square = torch.cdist(x.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.logsumexp(-square / width**2, 1) - math.log(len(points))
