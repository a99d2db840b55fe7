"""Linear layers: their rows and weights, and those that could stand in the place of blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from odenets.depth.compression.least_squares import NormalEquations
from odenets.depth.compression.positions import at_tokens, weights_at
from odenets.depth.compression.units import Unit

__all__ = [
    "add_rows",
    "has_constant",
    "identity_of",
    "is_dense",
    "macs_of",
    "rows_of",
    "seam_for",
    "targets_of",
    "weights_of",
    "with_weights",
]


def is_dense(layer: nn.Module) -> bool:
    """Whether a layer is a linear map along the last axis: torch's, or that of Hugging Face's GPT-2."""
    return type(layer) is nn.Linear or _is_transposed(layer)


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it keeps its weights ``(features, outputs)``, as Hugging Face's Conv1D, which is no convolution."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear ``layer`` multiplies with its weights for an input ``x``, one row for each position.

    >>> rows_of(nn.Conv2d(2, 5, 3, padding=1), torch.zeros(4, 2, 6, 6)).shape
    torch.Size([144, 18])
    """
    if is_dense(layer):
        return x.reshape(-1, x.shape[-1])
    conv = cast(nn.Conv2d, layer)
    padding = conv._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, padding, mode=mode)
    columns = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)  # type: ignore[arg-type]
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def targets_of(layer: nn.Module, y: Tensor) -> Tensor:
    """Outputs ``y`` of a linear ``layer``, one row for each position, in the order of :func:`rows_of`."""
    if not is_dense(layer):
        y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1])


def weights_of(layer: nn.Module) -> Tensor:
    """The weights of a linear ``layer``, ``(features + 1, outputs)`` in float64; the last row is its bias, or zero."""
    weight = cast(Tensor, layer.weight).detach().flatten(1).cpu().double()
    weight = weight if _is_transposed(layer) else weight.T
    bias = layer.bias
    row = weight.new_zeros(1, weight.shape[1]) if bias is None else cast(Tensor, bias).detach().cpu().double()[None]
    return torch.cat([weight, row])


def has_constant(layer: nn.Module) -> bool:
    """Whether a constant may be fitted to a linear ``layer``: not where it is dense and has no bias.

    So what builds such a layer, as Hugging Face's Llama does by its configuration, builds the fitted one too.
    """
    return layer.bias is not None or not is_dense(layer)


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a linear ``layer`` with another ``weight`` ``(features, outputs)`` and ``bias``, in its own dtype."""
    layer = copy.deepcopy(layer)
    old = cast(nn.Parameter, layer.weight)
    if layer.bias is None and bias.any():
        layer.bias = nn.Parameter(old.new_zeros(len(bias)), requires_grad=old.requires_grad)
    with torch.no_grad():
        old.copy_((weight if _is_transposed(layer) else weight.T).reshape(old.shape))
        if layer.bias is not None:
            cast(nn.Parameter, layer.bias).copy_(bias)
    return layer


def identity_of(layer: nn.Module) -> Tensor:
    """The weights ``(features, outputs)`` with which a linear ``layer`` that keeps the shape is the identity."""
    if isinstance(layer, nn.Linear):
        return torch.eye(layer.in_features, dtype=torch.float64, device="cpu")
    identity = torch.zeros(cast(Tensor, layer.weight).shape, dtype=torch.float64, device="cpu")
    each = torch.arange(len(identity), device="cpu")
    identity[each, each, identity.shape[2] // 2, identity.shape[3] // 2] = 1
    return identity.flatten(1).T


def add_rows(
    sums: NormalEquations,
    layer: nn.Module,
    x: Tensor,
    y: Tensor,
    state: Tensor,
    *,
    held_out: bool,
    tokens: Tensor | None = None,
) -> None:
    """Count what a linear ``layer`` reads of ``x`` with what it should return, ``y``, some samples at a time.

    Errors are weighed as :func:`~odenets.depth.compression.positions.weights_at` the ``state``, those at other
    positions than ``tokens`` do not count.
    """
    if is_dense(layer):
        x = x.reshape(*y.shape[:-1], x.shape[-1])  # of layers that read all positions in a row
    weights, x, y = weights_at(state, tokens), at_tokens(x, tokens), at_tokens(y, tokens)
    per_sample = max(1, sums.features * y[:1].numel() // y.shape[-1 if is_dense(layer) else 1])
    chunk = max(1, 2**25 // per_sample)
    parts = [None] * len(x.split(chunk)) if weights is None else weights.split(chunk)
    for part, target, weight in zip(x.split(chunk), y.split(chunk), parts, strict=True):
        flat = None if weight is None else weight.flatten()
        sums.add(rows_of(layer, part), targets_of(layer, target), held_out=held_out, weights=flat)


def macs_of(layer: nn.Module, shape: Sequence[int]) -> int:
    """Multiplications of a linear ``layer`` for a sample of a state of a ``shape`` ``(B, *S)``, which it keeps.

    >>> macs_of(nn.Linear(8, 8), (2, 5, 8)), macs_of(nn.Conv2d(8, 8, 3, padding=1), (2, 8, 4, 4))
    (320, 9216)
    """
    positions = shape[1:-1] if is_dense(layer) else shape[2:]
    return cast(Tensor, layer.weight).numel() * math.prod(positions)


def seam_for(unit: Unit, module: nn.Module, kernel: int) -> nn.Module | None:
    """A linear layer that keeps the shape of a state and could stand in the place of a ``unit``; None if none could.

    Args:
        unit: what it is to replace.
        module: the module of the unit, whose layers tell along which axis the features lie.
        kernel: 1, or the width of a convolution.
    """
    shape = unit.shape
    layers = list(module.modules())
    tensors = [*module.parameters()]
    options: dict[str, Any] = {"device": tensors[0].device if tensors else "cpu", "dtype": unit.dtype}
    learns = any(p.requires_grad for p in tensors)
    if len(shape) == 4 and any(isinstance(one, nn.Conv2d) and one.in_channels == shape[1] for one in layers):
        layer: nn.Module = skip_init(nn.Conv2d, shape[1], shape[1], kernel, padding=kernel // 2, **options)
        return layer.requires_grad_(learns)
    if kernel == 1 and any(_features(one) == shape[-1] for one in layers):
        return skip_init(nn.Linear, shape[-1], shape[-1], **options).requires_grad_(learns)
    return None


def _features(layer: nn.Module) -> int | None:
    """How many features a layer reads along the last axis."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return layer.normalized_shape[-1]
    return None
