"""Fields whose linear map is antisymmetric, so that neither states nor gradients grow or fade."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from odenets.errors import check_number
from odenets.fields.activations import make_activation
from odenets.fields.operators import apply, make_operator
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["AntisymmetricField"]


class AntisymmetricField(VelocityField):
    """``v = s((K - K^T - gamma I) x + b)``, K a matrix or a convolution (Haber and Ruthotto 2017, Chang et al. 2019).

    The eigenvalues of ``K - K^T`` are imaginary: x' = v then neither grows nor forgets. Euler's steps do grow, by
    ``1 + h^2 w^2`` for a frequency w, which a small ``gamma`` makes up for; rk4 needs none.

    Args:
        features: features of points ``(B, ..., features)``, or channels of images.
        gamma: diffusion, at least 0.
        kernel_size: odd size of the convolution of images; None for points.
        activation: s, "tanh", "relu", "silu", "gelu" or "relu6".
        norm: of the argument of s, "group", "layer", "batch" (own statistics per stage where stages share the field)
            or None, without which the map is antisymmetric; points are then ``(B, features)``.

    Raises:
        TypeError: a size that is no whole number, or a gamma that is no number.
        ValueError: a size below 1, an even kernel_size, a gamma that is negative or not finite, or an unknown
            activation or norm.

    References:
        Haber, Ruthotto. Stable architectures for deep neural networks. arXiv:1705.03341 (2017). Chang, Chen, Haber,
        Chi. AntisymmetricRNN: a dynamical system view on recurrent neural networks. arXiv:1902.09689 (2019).

    >>> field = AntisymmetricField(4, gamma=0.5)
    >>> A = field.operator()
    >>> torch.equal(A + A.T, -torch.eye(4))
    True
    """

    def __init__(
        self,
        features: int,
        gamma: float = 0.0,
        *,
        kernel_size: int | None = None,
        activation: str = "tanh",
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.gamma = check_number("gamma", gamma)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be finite and not negative, got {gamma}: a negative one lets states grow")
        self.K = make_operator(features, features, kernel_size)
        self.norm = make_norm(norm, features)
        self.activation = make_activation(activation)

    def operator(self) -> Tensor:
        """The weight of ``K - K^T - gamma I``: a matrix, or the kernel of a convolution that pads with zeros."""
        weight = self.K.weight
        if weight.ndim == 2:
            weight = weight - weight.T
            return weight - self.gamma * torch.eye(len(weight)).to(weight) if self.gamma else weight
        weight = weight - weight.flip(2, 3).transpose(0, 1)
        if self.gamma:
            around = weight.shape[-1] // 2
            identity = torch.eye(len(weight)).to(weight)[:, :, None, None]
            weight = weight - self.gamma * F.pad(identity, (around,) * 4)
        return weight

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at points or images ``x``, of their shape; ``t`` is not read, ``stage`` is for the norm."""
        return self.activation(self.norm(apply(self.operator(), x, self.K.bias), stage))
