"""The last linear map of a block, on which the state behind it depends: found, read and changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets.depth.compression.linear_maps import is_dense, weights_of, with_weights
from odenets.depth.compression.units import Unit, state_of

__all__ = ["LastMap", "last_map"]


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
        shift, scale = self.along(self.shift), self.along(self.scale * self.shift)

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
        return self.along(self.scale) * output + wanted - before

    def prior(self, layer: nn.Module) -> Tensor:
        """The weights of the ``layer`` times the scale, ``(features + 1, outputs)``."""
        return weights_of(layer) * self.scale.cpu().double()

    def put(self, module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
        """The block with another last map, which times its scale has a ``weight`` ``(features, outputs)`` and ``bias``.

        Outputs of scale 0 are left, and the rest is shared with the block.
        """
        layer = module.get_submodule(self.name)
        scale = self.scale.cpu().double()
        new = torch.cat([weight, bias[None]]) / torch.where(scale == 0, 1.0, scale)
        new = torch.where(scale == 0, weights_of(layer), new)
        return _with(module, self.name.split("."), with_weights(layer, new[:-1], new[-1]))

    def along(self, values: Tensor) -> Tensor:
        """Values, one for each output, in the shape in which they multiply what the map returns."""
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
            return state_of(module(*args, **kwargs), unit).cpu().double()

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
    noise = torch.rand(output.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(output) * largest
    scale = last.along(last.scale)
    by = noise / torch.where(scale == 0, 1.0, scale) + last.along(last.shift)
    with _hooked(layer, lambda *_: _[-1] + by.reshape(_[-1].shape)):
        moved = state_of(module(*args, **kwargs), unit)
    change = moved - last.along(last.scale * last.shift) - before
    return torch.allclose(change, torch.where(scale == 0, 0.0, noise), rtol=1e-2, atol=1e-3 * largest)
