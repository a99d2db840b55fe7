"""Local intrinsic dimensionality of feature maps among those of clean training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from odenets.detection.features.base import Features
from odenets.detection.features.feature_maps import feature_map_values, feature_maps_of
from odenets.detection.features.training_set import check_training
from odenets.errors import check_count

__all__ = ["LID", "local_dimension"]

SAME = 1e-5
"""Distances below this part of the median, or below the states' precision, are those of a point to itself."""

LARGEST = 1e6
"""Dimension where all distances are equal."""


class LID(Features):
    """How fast the number of clean training images grows with the distance from an input, in each feature map.

    The feature maps are the state after the encoder and that after each run of blocks whose states have one shape.
    Flattened, each gives the maximum-likelihood estimate of the local intrinsic dimensionality,
    ``-(1/k sum_i log(r_i / r_k))^-1`` with ``r_1 <= ... <= r_k`` the distances to the k nearest images. Ma et al. take
    these from the batch at hand; here they are images of the training set, drawn once, so that the features of an
    input do not depend on the others of its batch.

    Args:
        k: number of nearest neighbors.
        reference: number of training images among which they are.
        seed: of the draw of these.

    Attributes:
        states: of the reference images, for each feature map ``(reference, D)`` float32 or wider.

    Raises:
        ValueError: k below 2, or no fewer than the reference images.

    References:
        Ma, Li, Wang, Erfani, Wijewickrema, Schoenebeck, Song, Houle, Bailey. Characterizing adversarial subspaces using
        local intrinsic dimensionality. ICLR 2018.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=3)
    >>> x, y = torch.rand(200, 1, 8, 8), torch.arange(200) % 10
    >>> LID().fit(network, x, y)(network, x[:5]).shape
    torch.Size([5, 2])
    """

    def __init__(self, *, k: int = 20, reference: int = 100, seed: int = 0) -> None:
        for name, value in (("k", k), ("reference", reference)):
            check_count(name, value, 0)
        if k < 2:
            raise ValueError(f"k must be at least 2, got {k}: the distance to one neighbor says nothing of growth")
        if reference <= k:
            raise ValueError(f"reference must be more than the k = {k} neighbors among it, got {reference}")
        self.k, self.reference, self.seed = k, reference, seed
        self.states: list[np.ndarray] = []

    def fit(self, network: nn.Module, x: Tensor, y: Tensor, *, normalized: bool = False) -> LID:
        """Draw the reference images among clean training images, and keep the states that they have in eval mode.

        Args:
            network: a network that records its steps.
            x: clean training images ``(N, C, H, W)``, pixels in [0, 1].
            y: their labels, which are not used.
            normalized: whether images come normalized, with any finite values, and not as pixels in [0, 1].

        Returns:
            Itself.

        Raises:
            TypeError: inputs by keyword, or images that are no floating tensor.
            ValueError: images outside [0, 1], fewer than the reference is to hold, or states that are not finite.
        """
        check_training(x, normalized=normalized)
        if len(x) < self.reference:
            raise ValueError(f"x must hold at least the reference = {self.reference} images, got {len(x)}")
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[: self.reference]
        values = feature_map_values(network, x[drawn.to(x.device)], lambda state: state.flatten(1))
        if not all(each.isfinite().all() for each in values):
            raise ValueError("network must have finite states on the reference images, got NaN or infinity")
        self.states = [each.to(torch.promote_types(each.dtype, torch.float32)).numpy() for each in values]
        return self

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Local dimensions of a batch ``x`` by a ``network``, ``(B, feature maps)`` float32; gradients pass.

        Raises:
            ValueError: before :meth:`fit`, or for a network with other states.
        """
        if not self.states:
            raise ValueError("LID must be fitted to training images before it is called: fit(network, x, y)")
        states = [state.flatten(1) for state in feature_maps_of(network, x)]
        sizes, fitted = ([each.shape[1] for each in maps] for maps in (states, self.states))
        if sizes != fitted:
            raise ValueError(f"network must be the one of fit, with states of {fitted} numbers, got {sizes}")
        pairs = zip(states, self.states, strict=True)
        return torch.stack([local_dimension(z, torch.as_tensor(near), self.k) for z, near in pairs], 1).float()

    def __repr__(self) -> str:
        return f"LID(k={self.k}, reference={self.reference}, seed={self.seed})"


def local_dimension(x: Tensor, reference: Tensor, k: int) -> Tensor:
    """Maximum-likelihood estimate of the local intrinsic dimensionality of points ``(B, D)``, ``(B,)`` float64.

    ``-(1/k sum_i log(r_i / r_k))^-1`` with ``r_1 <= ... <= r_k`` the distances to the k nearest points of a reference
    ``(R, D)``. A point that is itself in the
    reference is no neighbor of its own; where the others are fewer than k, all of them count. At most 1e6, where all
    distances are equal or there are no neighbors; NaN for a point that is not finite.

    Raises:
        ValueError: more neighbors than points, or a reference that is not finite.
    """
    if not 1 <= k <= len(reference):
        raise ValueError(f"k must be between 1 and the {len(reference)} points of the reference, got {k}")
    if not reference.isfinite().all():
        raise ValueError("reference must be finite, got NaN or infinity")
    rounding = max(SAME, torch.finfo(x.dtype).eps)
    x, others = x.double(), reference.to(x.device, torch.float64)
    largest = torch.cat([x, others]).detach().abs().nan_to_num(0, 0).amax()
    scale = torch.ldexp(torch.ones_like(largest), -largest.frexp().exponent)  # exact; squares stay in range
    distances = torch.cdist(x * scale, others * scale, compute_mode="donot_use_mm_for_euclid_dist")
    same = distances <= rounding * distances.detach().median(1, keepdim=True).values
    nearest = distances.masked_fill(same, torch.inf).topk(k, largest=False).values
    neighbors = nearest.isfinite()
    farthest = nearest.masked_fill(~neighbors, 0).amax(1, keepdim=True)
    farthest = farthest.masked_fill(farthest == 0, 1)
    logs = torch.where(neighbors, nearest, farthest).div(farthest).log().sum(1)
    dimensions = 1 / (-logs / neighbors.sum(1).clamp(min=1)).clamp(min=1 / LARGEST)
    return dimensions.masked_fill(~x.isfinite().all(1), torch.nan)
