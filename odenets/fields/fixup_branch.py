"""The branch of a Fixup block: scalars in place of norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from odenets.fields.velocity_field import VelocityField, reset_modules

__all__ = ["FixupField"]


class FixupField(VelocityField):
    """The branch of a Fixup block (Zhang, Dauphin and Ma 2019): weights, scalar biases and a multiplier, no norms.

    ``x <- act(x + b)``, ``x <- W_i (x + b)`` for each layer in turn with a new scalar b each time, and ``v = scale x``:
    2 m biases of m layers, 0 at first, and a scale of 1. Without ``leading`` the first activation is left out, and the
    last bias is added behind the scale, before the activation that follows the sum, as in figure 1 of the paper. The
    weights are drawn by :func:`odenets.fixup.fixup`, which knows the depth.

    Args:
        layers: convolutions or linear layers without biases, the last of which returns the shape of the state.
        activation: between them; ReLU if not given.
        leading: whether it begins with the activation.

    Raises:
        TypeError: what is no layer, or no module.
        ValueError: no layer, or one with a bias.

    References:
        Zhang, Dauphin, Ma. Fixup initialization: residual learning without normalization. ICLR 2019, arXiv:1901.09321.

    >>> field = FixupField(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    >>> field(0.0, torch.randn(2, 4, 8, 8)).shape, len(field.biases)
    (torch.Size([2, 4, 8, 8]), 4)
    """

    def __init__(self, *layers: nn.Module, activation: nn.Module | None = None, leading: bool = True) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must be at least one convolution or linear layer, got none")
        for layer in layers:
            if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                raise TypeError(f"layers must be convolutions or linear layers, got {type(layer).__name__}")
            if layer.bias is not None:
                raise ValueError(f"layers must have bias=False, since scalars take its place, got {layer}")
        if activation is not None and not isinstance(activation, nn.Module):
            raise TypeError(f"activation must be a module, such as nn.ReLU(), got {type(activation).__name__}")
        self.layers = nn.ModuleList(layers)
        self.activation = nn.ReLU() if activation is None else activation
        self.leading = leading
        self.biases = nn.Parameter(torch.zeros(2 * len(layers)))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
        """Velocity at ``x``, of its shape; ``t`` and ``stage`` are not read."""
        biases = iter(self.biases)
        for i, layer in enumerate(self.layers):
            x = self.activation(x + next(biases)) if self.leading or i else x
            x = layer(x + next(biases))
        x = self.scale * x
        return x if self.leading else x + next(biases)

    def reset_parameters(self) -> None:
        """Draw the layers anew; biases become 0, and the scale 1.

        Raises:
            ValueError: the activation has parameters and no ``reset_parameters``.
        """
        for module in (self.layers, self.activation):
            reset_modules(module)
        nn.init.zeros_(self.biases)
        nn.init.ones_(self.scale)
