"""Initialisers: how all weights of a network are drawn at once."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeVar

from torch import nn

from odenets.normalization import StageBatchNorm

__all__ = ["INITIALISERS", "initialize"]

INITIALISERS = ("orthogonal", "normal", "kaiming")
NORMS = (StageBatchNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)

N = TypeVar("N", bound=nn.Module)


def initialize(network: N, name: str, gain: float = 1.0, *, biases: bool = False) -> N:
    """Draw every linear layer and convolution of a network anew, encoder and head included.

    Biases become 0, norms 1 and 0.

    Args:
        network: changed in place.
        name: "orthogonal", matrices with ``W W^T = gain^2 I`` (or ``W^T W``); "normal", N(0, gain^2); "kaiming", N(0,
            2 gain^2 / n) for a ReLU, with n the outputs that an input of a convolution reaches (He et al. 2015, "fan
            out") or the inputs of a linear layer.
        gain: scale of the weights.
        biases: whether "normal" draws the biases too.

    Returns:
        The network.

    Raises:
        ValueError: an unknown name, a gain that is not positive and finite, biases for another initialiser, or a
            network with a flow that has no field yet, or with attention, whose projections are no layers.
    """
    if name not in INITIALISERS:
        raise ValueError(f"name must be one of {', '.join(INITIALISERS)}, got {name!r}")
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive and finite, got {gain}")
    if biases and name != "normal":
        raise ValueError(f"biases are drawn by 'normal' only, not by {name!r}")
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("network has a flow without a field: call network(x) once before it is initialised")
    if any(isinstance(layer, nn.MultiheadAttention) for layer in network.modules()):
        raise ValueError("network must not hold nn.MultiheadAttention, the weights of which are no layers of their own")
    draw = {"orthogonal": partial(nn.init.orthogonal_, gain=gain), "normal": partial(nn.init.normal_, std=gain)}
    for layer in network.modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            if name == "kaiming":
                mode = "fan_in" if isinstance(layer, nn.Linear) else "fan_out"
                nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
                layer.weight.data *= gain
            else:
                draw[name](layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=gain) if biases else nn.init.zeros_(layer.bias)
        elif isinstance(layer, NORMS) and layer.weight is not None:
            nn.init.ones_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
