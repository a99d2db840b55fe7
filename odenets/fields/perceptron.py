"""A perceptron as a velocity field of points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.fields.activations import make_activation
from odenets.fields.sizes import check_sizes
from odenets.fields.time_input import time_like
from odenets.fields.velocity_field import VelocityField
from odenets.normalization import make_norm

__all__ = ["MLPField"]


class MLPField(VelocityField):
    """A perceptron with one hidden layer: ``v = W2 act(norm(W1 [x, t] + b1)) + b2``.

    Args:
        features: size of the last dimension of x.
        hidden: width of the hidden layer; ``max(64, 2 * features)`` if not given.
        activation: "relu", "silu", "gelu", "relu6" or "tanh" (ten times slower on CPUs).
        time: whether t is an input.
        norm: "group", "layer", "batch" (own statistics per stage where stages share the field) or None; x is then
            ``(B, features)``.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or an unknown activation or norm.

    >>> field = MLPField(2, hidden=16, time=True)
    >>> field(0.5, torch.randn(4, 2)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        activation: str = "silu",
        time: bool = False,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(features=features, hidden=hidden)
        hidden = hidden or max(64, 2 * features)
        self.time = time
        self.first = nn.Linear(features + time, hidden)
        self.norm = make_norm(norm, hidden)
        self.activation = make_activation(activation)
        self.second = nn.Linear(hidden, features)

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x`` ``(B, ..., features)`` and time ``t``, of the shape of x; ``stage`` is for the norm."""
        inputs = torch.cat([x, time_like(t, x[..., :1])], -1) if self.time else x
        return self.second(self.activation(self.norm(self.first(inputs), stage)))
