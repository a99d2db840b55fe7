"""Fields ``-K^T s(K x + b)`` with a symmetric Jacobian: gradients of an energy, as parabolic networks take them."""

from __future__ import annotations

from torch import Tensor

from odenets.fields.activations import make_activation
from odenets.fields.operators import adjoint, make_operator, square_norm
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["SymmetricField"]

MONOTONE = ("relu", "tanh", "relu6")
"""Activations that do not fall, with a slope of at most 1."""


class SymmetricField(VelocityField):
    """``v = -K^T s(K x + b)``, K a matrix or a convolution: the field of parabolic networks (Ruthotto and Haber 2020).

    It is monotone, ``<v(x) - v(y), x - y> <= 0``, and ``v = -grad sum S(K x + b)`` with S' = s. A step of Euler brings
    no two states further apart while ``h ||K||^2 <= 2``; :meth:`square_norm` is that number. With ``sign=1`` it is the
    half of a Hamiltonian network, ``K^T s(K x + b)`` (Chang et al. 2018).

    Args:
        features: features of points ``(B, ..., features)``, or channels of images.
        hidden: those of ``K x``; ``features`` if not given.
        kernel_size: odd size of the convolution of images; None for points.
        activation: s, "relu", "tanh" or "relu6", which do not fall and whose slope is at most 1.
        norm: of ``K x + b``, "group", "layer", "batch" (own statistics per stage where stages share the field), with
            which the field has no such properties; or None. With one, points are ``(B, features)``.
        sign: -1 or 1.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an even kernel_size, another activation or sign, or an unknown norm.

    References:
        Ruthotto, Haber. Deep neural networks motivated by partial differential equations. arXiv:1804.04272 (2020).
        Chang, Meng, Haber, Ruthotto, Begert, Holtham. Reversible architectures for arbitrarily deep residual neural
        networks. arXiv:1709.03698 (2018).

    >>> import odenets
    >>> import torch
    >>> field = SymmetricField(4, hidden=8)
    >>> flow = odenets.Flow(field, solver="euler", h=2 / field.square_norm())
    >>> x, y = torch.randn(2, 10, 4)
    >>> bool(((flow(x) - flow(y)).norm(dim=1) <= (x - y).norm(dim=1) + 1e-6).all())
    True
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        kernel_size: int | None = None,
        activation: str = "relu",
        norm: str | None = None,
        sign: int = -1,
    ) -> None:
        super().__init__()
        if activation not in MONOTONE:
            raise ValueError(
                f"activation must be one of {', '.join(MONOTONE)}, which do not fall and whose slope is at most 1, got "
                f"{activation!r}"
            )
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1 or 1, got {sign!r}")
        hidden = features if hidden is None else hidden
        self.sign = sign
        self.K = make_operator(features, hidden, kernel_size)
        self.norm = make_norm(norm, hidden)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at points or images ``x``, of their shape; ``t`` is not read, ``stage`` is for the norm."""
        v = adjoint(self.K.weight, self.activation(self.norm(self.K(x), stage)))
        return v if self.sign == 1 else -v

    def square_norm(self, size: tuple[int, int] | None = None) -> float:
        """``||K||^2``, by which ``h <= 2 / ||K||^2`` is chosen.

        Args:
            size: height and width of the images; not for points.

        Returns:
            The largest eigenvalue of ``K^T K``.

        Raises:
            TypeError, ValueError: images without a size, or a size that is none.
        """
        return square_norm(self.K.weight, size)
