"""Velocity fields with scalars in place of norms: SkipInit's multiplier, and the branch of a Fixup block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from odenets.errors import check_number
from odenets.fields import VelocityField, reset_modules
from odenets.normalization.stage_batch_norm import expand_stages

__all__ = ["FixupField", "ScaledField"]


class ScaledField(VelocityField):
    """Any field times a scalar that trains, ``alpha v(t, x)``: 0 at first, it is SkipInit (De and Smith 2020).

    A batch norm at initialization makes the branch of the l-th block smaller than its state by the square root of l,
    so that the network begins near the identity. Without norms a scalar does the same; with ``initial=0`` all steps
    begin as the identity, where the gradient of the scalars is not 0 and that of the field is.

    Args:
        field: a module ``v(t, x, *args)``, such as ``ConvField(16, norm=None)``.
        initial: alpha at first.

    Raises:
        TypeError: a field that is no module, or what is no number.
        ValueError: a number that is not finite.

    References:
        De, Smith. Batch normalization biases residual blocks towards the identity function in deep networks. NeurIPS
        2020, arXiv:2002.10444.

    >>> import odenets
    >>> flow = odenets.Flow(lambda: ScaledField(odenets.MLPField(3)), solver="euler", h=1.0, depth=4)
    >>> x = torch.randn(5, 3)
    >>> torch.equal(flow(x), x)
    True
    """

    def __init__(self, field: nn.Module, initial: float = 0.0) -> None:
        super().__init__()
        if not isinstance(field, nn.Module):
            raise TypeError(f"field must be a module v(t, x), got {type(field).__name__}")
        self.initial = check_number("initial", initial)
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite, got {initial}")
        self.field = field
        self.scale = nn.Parameter(torch.tensor(float(self.initial)))

    def forward(self, t: float | Tensor, x: Tensor, *args: Any, stage: int = 0) -> Tensor:
        """``alpha v(t, x, *args)``, of the shape of ``x``; ``stage`` is for the norms of the field."""
        if isinstance(self.field, VelocityField):
            return self.scale * self.field(t, x, *args, stage=stage)
        return self.scale * self.field(t, x, *args)

    def reset_parameters(self) -> None:
        """Draw the field anew, and set alpha to what it was at first.

        Raises:
            ValueError: some module in the field has parameters and no ``reset_parameters``.
        """
        if reset := getattr(self.field, "reset_parameters", None):
            reset()
        else:
            reset_modules(self.field)
        nn.init.constant_(self.scale, self.initial)

    def expand_stages(self, stages: int) -> None:
        """Give every batch norm of the field its own statistics for each of ``stages`` stages."""
        if isinstance(self.field, VelocityField):
            self.field.expand_stages(stages)
        else:
            expand_stages(self.field, stages)

    def extra_repr(self) -> str:
        """What alpha is at first, as ``print`` shows it."""
        return f"initial={self.initial:g}"


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
