"""Networks of other libraries with the numbers of their residual additions, counted by hand.

A number is read in the publication or in the source that builds the network: the blocks that add, and how often each
adds. None comes from running this package. What counts as an addition:

- one operand is a state, the other a branch that is computed from it, has parameters and the same shape. The state may
  pass a linear map on its way (convolution, norm, pool, slice, learned scale); then the branch is nonlinear;
- each place where it happens counts once a call, and of nested ones the outermost counts;
- a sum of linear maps of one state is none (RepVGG's branches), nor is that of two states of which neither comes from
  the other (HRNet's fusion), nor what is added without being computed from the state (biases, positions, masks).

Every case is small: few pixels, few samples, small configurations where a family has no small member.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})

CONCATENATES = "concatenat"
SUMS_LINEAR_MAPS = "linear"
IS_A_CHAIN = "displacement=True"


class Case(NamedTuple):
    """A network, one batch of it, and how many additions it has or the word in the refusal.

    Attributes:
        build: makes the network, with random weights.
        example: a batch.
        depth: the number of additions, or what the refusal says.
        options: of ``adapt``.
        differentiable: whether its output has a gradient.
        warning: of ``adapt``.
    """

    build: Callable[[], nn.Module]
    example: Example
    depth: int | str
    options: Mapping[str, Any] = NOTHING
    differentiable: bool = True
    warning: str = ""


@cache
def pictures(size: int = 64, samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(size))


def enliven(model: nn.Module) -> nn.Module:
    """Let every branch act: what begins at 0 or next to it (last norms, layer scales, heads) is of moderate size."""
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.abs().max() < 1e-3:
            nn.init.uniform_(parameter, 0.1, 0.3)
    return model


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a tensor, tuple, mapping or model output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [tensor for part in output for tensor in tensors_of(part)] if isinstance(output, tuple | list) else []
