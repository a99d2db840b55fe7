"""Linear maps in blocks: what their rows and weights are, and the last one of a block, on which its step depends."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from odenets.depth.compression.least_squares import NormalEquations
from odenets.depth.compression.units import Unit, state_of

__all__ = [
    "LastMap",
    "add_rows",
    "identity_of",
    "last_map",
    "macs_of",
    "rows_of",
    "seam_for",
    "targets_of",
    "weights_at",
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
    weight = cast(Tensor, layer.weight).detach().flatten(1).double().cpu()
    weight = weight if _is_transposed(layer) else weight.T
    bias = layer.bias
    row = weight.new_zeros(1, weight.shape[1]) if bias is None else cast(Tensor, bias).detach().double().cpu()[None]
    return torch.cat([weight, row])


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of a linear ``layer`` with another ``weight`` ``(features, outputs)`` and ``bias``, in its own dtype."""
    layer = copy.deepcopy(layer)
    old = cast(nn.Parameter, layer.weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(old.new_zeros(len(bias)), requires_grad=old.requires_grad)
    with torch.no_grad():
        old.copy_((weight if _is_transposed(layer) else weight.T).reshape(old.shape))
        cast(nn.Parameter, layer.bias).copy_(bias)
    return layer


def identity_of(layer: nn.Module) -> Tensor:
    """The weights ``(features, outputs)`` with which a linear ``layer`` that keeps the shape is the identity."""
    if isinstance(layer, nn.Linear):
        return torch.eye(layer.in_features, dtype=torch.float64)
    identity = torch.zeros(cast(Tensor, layer.weight).shape, dtype=torch.float64)
    each = torch.arange(len(identity))
    identity[each, each, identity.shape[2] // 2, identity.shape[3] // 2] = 1
    return identity.flatten(1).T


def add_rows(sums: NormalEquations, layer: nn.Module, x: Tensor, y: Tensor, state: Tensor, *, held_out: bool) -> None:
    """Count what a linear ``layer`` reads of ``x`` with what it should return, ``y``, some samples at a time.

    Errors are weighed as :func:`weights_at` the ``state``.
    """
    per_sample = max(1, sums.features * y[:1].numel() // y.shape[-1 if is_dense(layer) else 1])
    chunk = max(1, 2**25 // per_sample)
    weights = weights_at(state)
    parts = [None] * len(x.split(chunk)) if weights is None else weights.split(chunk)
    for part, target, weight in zip(x.split(chunk), y.split(chunk), parts, strict=True):
        flat = None if weight is None else weight.flatten()
        sums.add(rows_of(layer, part), targets_of(layer, target), held_out=held_out, weights=flat)


def weights_at(state: Tensor) -> Tensor | None:
    """What errors at the positions of a ``state`` of tokens ``(B, T, D)`` are multiplied with, ``(B, T)``.

    That is one over its size, for what follows is a norm, and a few tokens are a thousand times as large as others;
    None for other states.

    >>> weights_at(torch.full((1, 1, 4), 5.0))
    tensor([[0.2000]])
    """
    return state.square().mean(-1).rsqrt().clamp_max(1e6) if state.ndim == 3 else None


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


@dataclass(frozen=True)
class LastMap:
    """The last linear map of a block, of whose output that of the block, before its activation, is an affine function.

    Attributes:
        name: its dotted name in the block.
        scale: what its output is multiplied with, for each output: 1, or what a norm in eval mode or a scale makes.
        axis: along which its outputs lie.
        shift: what is added to its output so that a ReLU behind it lets all pass; zeros where there is none.
    """

    name: str
    scale: Tensor
    axis: int
    shift: Tensor

    @property
    def activation(self) -> bool:
        """Whether a ReLU stands at the end of the block."""
        return bool(self.shift.any())

    def run(self, module: nn.Module, unit: Unit, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The input and output of the map, and that of the block before its activation, in one call of its module.

        Args:
            module, unit: the block.
            args, kwargs: its inputs.
        """
        layer = module.get_submodule(self.name)
        seen: list[Tensor] = []
        shift, scale = self._along(self.shift), self._along(self.scale * self.shift)

        def take(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[:] = inputs[0], output
            return output + shift

        with _hooked(layer, take):
            x1 = state_of(module(*args, **kwargs), unit)
        if self.activation and not ((x1 > 0) | (shift == 0)).all():
            raise ValueError(
                f"block {unit.name!r} has states much larger than in the first batch of the calibration: shuffle it"
            )
        return seen[0], seen[1].reshape(x1.shape), x1 - scale.to(x1)

    def target(self, before: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        """What its output, times the scale, would have to be for the block to be as ``wanted`` before its activation.

        ``output`` is what it returns, with which the block is as ``before``.
        """
        return self._along(self.scale) * output + wanted - before

    def prior(self, layer: nn.Module) -> Tensor:
        """The weights of the ``layer`` times the scale, ``(features + 1, outputs)``."""
        return weights_of(layer) * self.scale.double().cpu()

    def put(self, module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
        """The block with another last map, which times its scale has a ``weight`` ``(features, outputs)`` and ``bias``.

        Outputs of scale 0 are left, and the rest is shared with the block.
        """
        layer = module.get_submodule(self.name)
        scale = self.scale.double().cpu()
        new = torch.cat([weight, bias[None]]) / torch.where(scale == 0, 1.0, scale)
        new = torch.where(scale == 0, weights_of(layer), new)
        return _with(module, self.name.split("."), with_weights(layer, new[:-1], new[-1]))

    def _along(self, values: Tensor) -> Tensor:
        return values.reshape([-1, *[1] * (-self.axis - 1)])


def _with(module: nn.Module, path: Sequence[str], layer: nn.Module) -> nn.Module:
    """A module that shares all with another but the ``layer`` at a path."""
    if not path:
        return layer
    new = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(new)[name] = copy.copy(value)  # of parameters, buffers, parts and hooks
    new._modules[path[0]] = _with(cast(nn.Module, module._modules[path[0]]), path[1:], layer)
    return new


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def last_map(module: nn.Module, unit: Unit, args: Any, kwargs: Any) -> LastMap | None:
    """The last linear map of a block, found by moving its output; None where the block is no function of that kind.

    Args:
        module, unit: the block, in eval mode.
        args, kwargs: its inputs on a batch.
    """
    calls: list[str] = []
    hooks = []
    for name, layer in module.named_modules():
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            continue  # one that is computed, as by weight norm
        if is_dense(layer) or (type(layer) is nn.Conv2d and layer.groups == 1):
            hooks.append(layer.register_forward_hook(lambda *_, name=name: calls.append(name)))
    try:
        x1 = state_of(module(*args, **kwargs), unit)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or not calls[-1] or calls.count(calls[-1]) > 1:
        return None
    layer = module.get_submodule(calls[-1])
    axis = -1 if is_dense(layer) else -3
    largest = x1.abs().amax().float().item() or 1.0
    size = 1000 * largest  # so that it outweighs the rest behind small scales too
    outputs = weights_of(layer).shape[1]
    if x1.ndim < -axis or x1.shape[axis] != outputs:
        return None

    def moved(by: float) -> Tensor:
        with _hooked(layer, lambda *_: _[-1] + by):
            return state_of(module(*args, **kwargs), unit).double()

    up, down = moved(2 * size) - moved(size), moved(-2 * size) - moved(-size)
    others = [i for i in range(x1.ndim) if i != x1.ndim + axis]
    scales, open_ends = [], []
    for change, sign in ((up, 1), (down, -1)):
        least, most = change.amin(others), change.amax(others)
        constant = most - least <= 1e-3 * torch.maximum(most.abs(), least.abs())
        scales.append(torch.where(constant, sign * (most + least) / 2 / size, torch.nan))
        open_ends.append(constant & ~((most == 0) & (least == 0)))
    plus, minus = scales
    if (open_ends[0] & open_ends[1] & ((plus - minus).abs() <= 1e-3 * plus.abs())).all():
        found = LastMap(calls[-1], plus.to(x1), axis, torch.zeros_like(plus).to(x1))  # no activation
    else:
        ends = open_ends[0] ^ open_ends[1]
        if not (ends | ((plus == 0) & (minus == 0))).all() or not (x1 >= 0).all():
            return None
        scale = torch.where(open_ends[0], plus, torch.where(open_ends[1], minus, torch.zeros_like(plus)))
        shift = torch.where(ends, 32 * largest / torch.where(ends, scale, 1.0), 0.0)
        found = LastMap(calls[-1], scale.to(x1), axis, shift.to(x1))
    return found if _agrees(found, module, unit, args, kwargs, x1, largest) else None


def _agrees(last: LastMap, module: nn.Module, unit: Unit, args: Any, kwargs: Any, x1: Tensor, largest: float) -> bool:
    """Whether the block returns ``x1`` from the map, and each position of its output is where it is in the state."""
    layer = module.get_submodule(last.name)
    try:
        _, output, before = last.run(module, unit, args, kwargs)
    except RuntimeError:  # another number of entries
        return False
    if not torch.allclose(before.relu() if last.activation else before, x1, rtol=1e-3, atol=1e-4 * largest):
        return False
    noise = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output) * largest
    scale = last._along(last.scale)
    by = noise / torch.where(scale == 0, 1.0, scale) + last._along(last.shift)
    with _hooked(layer, lambda *_: _[-1] + by.reshape(_[-1].shape)):
        moved = state_of(module(*args, **kwargs), unit)
    change = moved - last._along(last.scale * last.shift) - before
    return torch.allclose(change, torch.where(scale == 0, 0.0, noise), rtol=1e-2, atol=1e-3 * largest)
