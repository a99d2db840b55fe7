"""Mahalanobis distance of feature maps to the classes of the training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from odenets.detection.features.base import Features, check_images
from odenets.detection.features.feature_maps import feature_map_values, feature_maps_of, pooled
from odenets.detection.features.training_set import check_training, training_labels

__all__ = ["MAGNITUDES", "Mahalanobis"]

MAGNITUDES = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)
"""Input steps to choose from, in units of pixels in [0, 1] (Lee et al. 2018)."""

SMALLEST = 1e-10
"""Variances below this part of the largest are rounding: states are float32."""


class Mahalanobis(Features):
    """Confidence that an input belongs to a class, by each feature map.

    The feature maps are the state after the encoder and that after each run of blocks whose states have one shape. With
    z the means of their channels over all positions, ``mu_c`` those of the training images of class c averaged, and S
    the covariance of all z about the mean of their class, one for all classes, the confidence is::

        max_c -d_c^2 / 2,   d_c^2 = (z - mu_c)^T S^+ (z - mu_c)

    The pseudo-inverse ``S^+`` leaves out directions whose standard deviation is below 1e-5 of the largest. Channels
    that depend on each other linearly, as after an encoder of one convolution, have such directions, in which all
    differences are rounding. ([K24, appendix E.2.1] writes ``max_c -M`` for an M that is negative already: the farthest
    class.)

    An input step raises the confidence before it is read: ``x + magnitude * sign(grad_x max_c -d_c^2 / 2)``, for each
    state a step of its own, clamped to [0, 1].

    Args:
        magnitude: of the input step, in units of pixels in [0, 1]; Lee et al. choose among 0, 0.0005, 0.001, 0.0014,
            0.002, 0.005 and 0.01.
        relative: subtract the distance ``d_0`` to one Gaussian fitted to all training images, whatever their class:
            ``max_c -(d_c^2 - d_0^2) / 2``.

    Attributes:
        means: for each state ``(classes, C)``.
        factors: for each state W ``(C, rank)`` with ``W W^T = S^+``.
        mean: that of the one Gaussian, for each state ``(1, C)``; empty unless relative.
        factor: its W, for each state ``(C, rank)``; empty unless relative.

    Raises:
        ValueError: a magnitude outside [0, 1].

    References:
        Lee, Lee, Lee, Shin. A simple unified framework for detecting out-of-distribution samples and adversarial
        attacks. NeurIPS 2018. Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan. A simple fix to Mahalanobis distance for
        improving near-OOD detection. 2021 (relative).

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=3)
    >>> x, y = torch.rand(50, 1, 8, 8), torch.arange(50) % 10
    >>> Mahalanobis().fit(network, x, y)(network, x[:5]).shape
    torch.Size([5, 2])
    """

    def __init__(self, *, magnitude: float = 0.0, relative: bool = False) -> None:
        if not magnitude >= 0:
            raise ValueError(f"magnitude must not be negative, got {magnitude}")
        if magnitude > 1:
            raise ValueError(f"magnitude must be at most 1, in units of pixels in [0, 1], got {magnitude}")
        self.magnitude, self.relative = magnitude, relative
        self.means: list[np.ndarray] = []
        self.factors: list[np.ndarray] = []
        self.mean: list[np.ndarray] = []
        self.factor: list[np.ndarray] = []

    def fit(self, network: nn.Module, x: Tensor, y: Tensor, *, normalized: bool = False) -> Mahalanobis:
        """Take the means of the classes and the covariance they share, in eval mode.

        Args:
            network: a network that records its steps.
            x: training images ``(N, C, H, W)``, pixels in [0, 1].
            y: their labels 0, 1, ..., ``(N,)`` of integers.
            normalized: whether images come normalized, with any finite values, and not as pixels in [0, 1].

        Returns:
            Itself.

        Raises:
            TypeError: inputs by keyword, images that are no floating tensor, or labels that are no tensor.
            ValueError: images outside [0, 1], labels that do not fit them or leave a class out, or states that are not
                finite or do not vary within the classes.
        """
        check_training(x, normalized=normalized)
        labels = training_labels(x, y)
        means, factors, mean, factor = [], [], [], []
        for i, values in enumerate(feature_map_values(network, x)):
            z = values.double().numpy()
            if not np.isfinite(z).all():
                raise ValueError(f"network must have finite states, got NaN or infinity in state {i}")
            means.append(np.stack([z[labels == c].mean(0) for c in range(labels.max() + 1)]))
            rounding = torch.finfo(values.dtype).eps * np.abs(z).max()
            factors.append(_factor(z - means[-1][labels], rounding, i))
            if self.relative:
                mean.append(z.mean(0, keepdims=True))
                factor.append(_factor(z - mean[-1], rounding, i))
        self.means, self.factors, self.mean, self.factor = means, factors, mean, factor
        return self

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Confidences of a batch ``x`` by a ``network``, ``(B, feature maps)`` float32; gradients pass.

        The input step, if there is one, is fixed.

        Raises:
            ValueError: before :meth:`fit`, for a network with other states, or, with an input step, for inputs that are
                no images in [0, 1] and for a network without finite gradients.
        """
        if not self.means:
            raise ValueError("Mahalanobis must be fitted to training images before it is called: fit(network, x, y)")
        if self.magnitude == 0:
            return torch.stack([self._confidence(i, z) for i, z in enumerate(self._states(network, x))], 1).float()
        x = check_images(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        moved = [(x + self.magnitude * way).clamp(0, 1) for way in self._directions(network, x)]
        states = [self._states(network, near, i + 1)[i] for i, near in enumerate(moved)]
        return torch.stack([self._confidence(i, z) for i, z in enumerate(states)], 1).float()

    def _directions(self, network: nn.Module, x: Tensor) -> list[Tensor]:
        """Signs of the gradient of each state's confidence, ``(B, C, H, W)``."""
        if any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers())):
            rule = "network must be made outside torch.inference_mode for an input step, which takes gradients"
            raise ValueError(rule)
        gradients = []
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            for i, z in enumerate(self._states(network, x)):
                end = z.detach().requires_grad_()
                (way,) = torch.autograd.grad(self._confidence(i, end).sum(), end)
                exponent = way.abs().amax(1, keepdim=True).frexp().exponent
                way = torch.ldexp(way, -exponent)  # exact; within the range of a network in half precision
                gradients.append(torch.autograd.grad(z, x, way, retain_graph=True)[0])
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise ValueError("network must have finite gradients for an input step, got NaN or infinity")
        return [gradient.sign() for gradient in gradients]

    def _states(self, network: nn.Module, x: Tensor, count: int | None = None) -> list[Tensor]:
        """Channel means of all states, or of the first ``count``, each ``(B, C)``."""
        states = [pooled(state) for state in feature_maps_of(network, x, count)]
        channels, fitted = ([each.shape[1] for each in maps] for maps in (states, self.means[:count]))
        if channels != fitted:
            raise ValueError(f"network must be the one of fit, with states of {fitted} channels, got {channels}")
        return states

    def _confidence(self, i: int, z: Tensor) -> Tensor:
        """By state i, ``(B,)`` float64."""
        square = _square_distances(z, self.means[i], self.factors[i]).amin(1)
        if self.relative:
            square = square - _square_distances(z, self.mean[i], self.factor[i])[:, 0]
        return -square / 2

    def __repr__(self) -> str:
        return f"Mahalanobis(magnitude={self.magnitude:g}, relative={self.relative})"


def _square_distances(z: Tensor, means: np.ndarray, factor: np.ndarray) -> Tensor:
    """``|W^T (z - mu)|^2`` for each of the means, ``(B, means)`` float64."""
    white = torch.as_tensor(factor, device=z.device)
    centers = torch.as_tensor(means, device=z.device)
    return torch.cdist(z.double() @ white, centers @ white, compute_mode="donot_use_mm_for_euclid_dist").square()


def _factor(centered: np.ndarray, rounding: float, state: int) -> np.ndarray:
    """W with ``W W^T`` the pseudo-inverse of the covariance of centered values ``(N, C)``, known up to ``rounding``."""
    scale = np.ldexp(1.0, np.frexp(np.abs(centered).max())[1])  # exact; squares stay in range
    variances, vectors = np.linalg.eigh((centered / scale).T @ (centered / scale) / len(centered))
    varying = variances > max(SMALLEST * variances[-1], (rounding / scale) ** 2)
    if not varying.any():
        raise ValueError(f"x must hold images that differ within a class, got equal ones in state {state}")
    return vectors[:, varying] / np.sqrt(variances[varying]) / scale
