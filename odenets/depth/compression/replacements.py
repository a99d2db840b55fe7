"""What takes the place of blocks: modules of the state alone, behind the arguments of the block that was there."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets.blocks import Block
from odenets.depth.compression.units import Unit
from odenets.flow import Flow

__all__ = ["InPlaceOf", "ScaledStep", "Zero", "pass_on", "scaled", "standing_for"]


class InPlaceOf(nn.Module):
    """A module of the state alone, which takes the arguments of a block and returns a tuple where that does.

    Args:
        inner: the module, of a state.
        argument: where the state is among the arguments.
        elements: length of the tuple that the block returns; None where that is the state.

    >>> InPlaceOf(nn.Identity(), argument=1)("other", "state")
    'state'
    """

    def __init__(self, inner: nn.Module, argument: int | str = 0, elements: int | None = None) -> None:
        super().__init__()
        self.inner, self.argument, self.elements = inner, argument, elements

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state of ``inner``, and None for what the block returns besides."""
        at = self.argument
        x = self.inner(args[at] if isinstance(at, int) else kwargs[at])
        return x if self.elements is None else (x, *[None] * (self.elements - 1))


class Zero(nn.Module):
    """Adds nothing: zeros in the place of a branch."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros like a state ``x``."""
        return torch.zeros_like(x)


class ScaledStep(nn.Module):
    """A block whose step is ``h`` times as long, ``x0 + h (x1 - x0)``, before a ReLU if its states come out of one.

    Args:
        block: the block, whose step has the length 1.
        h: how many times as long.
        argument, elements: where the state is among its arguments, and the length of the tuple that it returns.
        rectified: whether its states come out of a ReLU: ``relu(x0 + h f)`` is then ``relu(x0 + h (x1 - x0))``.
        branch: whether it returns what is added to the state, and no state.

    >>> ScaledStep(nn.ReLU(), 2.0)(torch.tensor([1.0, -1.0]))
    tensor([1., 1.])
    """

    def __init__(
        self,
        block: nn.Module,
        h: float,
        argument: int | str = 0,
        elements: int | None = None,
        rectified: bool = False,
        branch: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.h, self.argument, self.elements = block, h, argument, elements
        self.rectified, self.branch = rectified, branch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns, of the longer step."""
        output = self.block(*args, **kwargs)
        x1 = output if self.elements is None else output[0]
        if self.branch:
            state = self.h * x1
        else:
            x0 = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
            state = x0 + self.h * (x1 - x0)
        state = state.relu() if self.rectified else state
        return state if self.elements is None else (state, *output[1:])

    def extra_repr(self) -> str:
        """The length of the step."""
        return f"h={self.h:g}"


def scaled(module: nn.Module, unit: Unit, h: float, start: float | None = None) -> nn.Module:
    """The block of a ``unit`` with a step ``h`` times as long; it shares what the block holds.

    A flow of one block takes the step size itself, from the time ``start``.
    """
    if not isinstance(module, Flow):
        return ScaledStep(module, h, unit.argument, unit.elements, unit.rectified, unit.adds)
    module.check_one_step("model", "blocks that are removed one by one are those of Flow(solver='euler') and its like")
    block = cast(Block, module.blocks[0])
    longer, settings = Block([*block.fields], block.h * h), module.settings
    return Flow.of([longer], start=module.start if start is None else start, **settings).train(module.training)


def standing_for(unit: Unit, inner: nn.Module) -> nn.Module:
    """A module ``inner`` of the state in the place of a ``unit``: itself, where that takes and returns nothing else."""
    return inner if unit.alone else InPlaceOf(inner, unit.argument, unit.elements)


def pass_on(unit: Unit) -> nn.Module:
    """What passes the state on in the place of a ``unit``, or adds nothing to it."""
    return Zero() if unit.adds else standing_for(unit, nn.Identity())
