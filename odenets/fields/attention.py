"""The two halves of a transformer block as velocity fields: self-attention, and a perceptron on each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from odenets.fields.activations import make_activation
from odenets.fields.feature_norm import FeatureNorm
from odenets.fields.sizes import check_divides, check_sizes
from odenets.fields.tokens import as_state, as_tokens
from odenets.fields.velocity_field import VelocityField
from solvers.validation import is_transformed

__all__ = ["AttentionField", "FeedForwardField"]


class AttentionField(VelocityField):
    """Self-attention of a transformer block, its norm first: ``v = W [softmax(Q_i K_i^T / sqrt(D / heads)) V_i] + b``.

    Q, K and V are linear in ``norm(x)``, cut into heads i along their features. Euler steps of h = 1 through this
    field and a :class:`FeedForwardField` in turn are the blocks of a vision transformer (Dosovitskiy et al. 2021):
    two steps a block, as Lu et al. (2019) read it as a splitting of ``x' = attention(x) + perceptron(x)``.

    Args:
        features: features D of each token, or channels of images, whose places are the tokens.
        heads: number of heads.
        norm: "layer", over the features of each token, "group", "batch" (own statistics per stage where stages share
            the field) or None.
        fused: whether attention is one operation of torch, which has no second derivatives; False for these. Forward
            derivatives and the transforms of ``torch.func`` take the formula in any case.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, heads that do not divide the features, or an unknown norm.

    References:
        Vaswani et al. Attention is all you need. arXiv:1706.03762 (2017). Dosovitskiy et al. An image is worth 16x16
        words. arXiv:2010.11929 (2021). Lu, Li, He, Sun, Dong, Qin, Wang, Liu. Understanding and improving transformer
        from a multi-particle dynamic system point of view. arXiv:1906.02762 (2019).

    >>> import torch
    >>> field = AttentionField(8, heads=2)
    >>> field(0.0, torch.randn(2, 5, 8)).shape, field(0.0, torch.randn(2, 8, 4, 4)).shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 4, 4]))
    """

    def __init__(self, features: int, heads: int = 1, *, norm: str | None = "layer", fused: bool = True) -> None:
        super().__init__()
        check_divides(heads=heads, features=features)
        self.heads, self.fused = heads, fused
        self.norm = FeatureNorm(norm, features)
        self.project_in = nn.Linear(features, 3 * features)
        self.project_out = nn.Linear(features, features)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at tokens or images ``x``, of their shape; ``t`` is not read, ``stage`` is for the norm.

        Raises:
            ValueError: x is neither ``(B, N, D)`` nor ``(B, D, H, W)``.
        """
        projected = self.project_in(self.norm(as_tokens(x), stage))
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        attend = F.scaled_dot_product_attention if self.fused and not _is_differentiated_forward(q) else _attention
        return as_state(self.project_out(attend(q, k, v).transpose(1, 2).flatten(2)), x)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(Q K^T / sqrt(d)) V``, each ``(B, heads, N, d)``."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _is_differentiated_forward(x: Tensor) -> bool:
    """Whether a tangent comes along, or a transform of ``torch.func`` is at work, which fused attention lacks."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed(x) or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None)


class FeedForwardField(VelocityField):
    """The perceptron of a transformer block, its norm first: ``v = W2 act(W1 norm(x) + b1) + b2`` on each token.

    Args:
        features: features D of each token, or channels of images, whose places are the tokens.
        expansion: width of the hidden layer over features.
        norm: "layer", over the features of each token, "group", "batch" (own statistics per stage where stages share
            the field) or None.
        activation: "gelu", "relu", "silu", "tanh" or "relu6".

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or an unknown activation or norm.

    References:
        Vaswani et al. Attention is all you need. arXiv:1706.03762 (2017), section 3.3.

    >>> import torch
    >>> field = FeedForwardField(8)
    >>> field(0.0, torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, features: int, expansion: int = 4, *, norm: str | None = "layer", activation: str = "gelu"
    ) -> None:
        super().__init__()
        check_sizes(features=features, expansion=expansion)
        self.norm = FeatureNorm(norm, features)
        self.first = nn.Linear(features, expansion * features)
        self.second = nn.Linear(expansion * features, features)
        self.activation = make_activation(activation)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at tokens or images ``x``, of their shape; ``t`` is not read, ``stage`` is for the norm.

        Raises:
            ValueError: x is neither ``(B, N, D)`` nor ``(B, D, H, W)``.
        """
        y = self.first(self.norm(as_tokens(x), stage))
        return as_state(self.second(self.activation(y)), x)
