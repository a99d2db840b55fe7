"""Initializers: how all weights of a network are drawn at once."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from odenets.normalization import StageBatchNorm

__all__ = ["INITIALIZERS", "initialize"]

INITIALIZERS = ("orthogonal", "normal", "kaiming")
NORMS = (StageBatchNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

N = TypeVar("N", bound=nn.Module)


def initialize(network: N, name: str, gain: float = 1.0, *, biases: bool = False) -> N:
    """Draw every linear layer and convolution of a network anew, encoder and head included.

    Biases become 0, norms 1 and 0 without running statistics, frozen ones too. Weights of other layers stay. The seed
    decides, whatever the memory format; dtypes narrower than float32 are drawn in float32.

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
        ValueError: an unknown name, a gain that is not positive and finite, biases for another initializer, or a
            network with a flow that has no field yet or another lazy layer, on the meta device, with attention, whose
            projections are no layers, or with weights that are computed from others (weight norm, pruning).

    >>> layer = initialize(nn.Linear(4, 4), "orthogonal", gain=0.5)
    >>> torch.allclose(layer.weight @ layer.weight.T, 0.25 * torch.eye(4), atol=1e-6)
    True
    """
    if name not in INITIALIZERS:
        raise ValueError(f"name must be one of {', '.join(INITIALIZERS)}, got {name!r}")
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive and finite, got {gain}")
    if biases and name != "normal":
        raise ValueError(f"biases are drawn by 'normal' only, not by {name!r}")
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError(
            "network has a flow without a field or another lazy layer: call network(x) once before it is initialized"
        )
    if any(p.is_meta for p in network.parameters()):
        raise ValueError(
            "network is on the meta device, where weights have no values: call network.to_empty(...) before"
        )
    if any(isinstance(layer, nn.MultiheadAttention) for layer in network.modules()):
        raise ValueError("network must not hold nn.MultiheadAttention, the weights of which are no layers of their own")
    for title, layer in network.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            if not isinstance(layer._parameters.get("weight"), nn.Parameter):
                raise ValueError(
                    f"layer {title or type(layer).__name__!r} computes its weight from other parameters, which are not "
                    "drawn: initialize the network before it is parametrized or pruned"
                )
            _set(layer.weight, _drawn(layer, name, gain))
            if layer.bias is not None:
                _set(layer.bias, nn.init.normal_(_blank(layer.bias), std=gain) if biases else 0.0)
        elif isinstance(layer, NORMS):
            for which, value in (("weight", 1.0), ("bias", 0.0)):
                if isinstance(tensor := getattr(layer, which, None), Tensor):
                    _set(tensor, value)
            if getattr(layer, "running_mean", None) is not None:
                cast(Any, layer).reset_running_stats()
    return network


def _drawn(layer: nn.modules.conv._ConvNd | nn.Linear, name: str, gain: float) -> Tensor:
    """New weights of a layer, contiguous, so that the memory format of its own decides nothing."""
    weight = _blank(layer.weight)
    if name == "orthogonal":
        return nn.init.orthogonal_(weight, gain)
    if name == "normal":
        return nn.init.normal_(weight, std=gain)
    if isinstance(layer, nn.Linear):
        n = layer.in_features
    else:
        n = layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    return nn.init.normal_(weight, std=math.sqrt(2.0) / math.sqrt(n)).mul_(gain)


def _blank(p: Tensor) -> Tensor:
    """Room to draw in, float32 for narrower dtypes, in which matrices are not factorized."""
    return torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)


@torch.no_grad()
def _set(p: Tensor, value: Tensor | float) -> None:
    p.copy_(value) if isinstance(value, Tensor) else p.fill_(value)
