"""Stochastic depth: Euler steps that are left out at random while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odenets.schemes.probability import check_probability
from odenets.schemes.scheme import Memory, Scheme, Velocity

__all__ = ["StochasticDepth"]


class Survival(nn.Module):
    """Draws whether a block takes its step, in training mode.

    Attributes:
        probability: that it does, which a ``state_dict`` holds.
    """

    probability: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.register_buffer("probability", torch.tensor(probability, dtype=torch.float64))

    def mask(self, x: Tensor, by: str) -> Tensor | None:
        """What multiplies the velocity at ``x``, one number or one per sample; None where the block is left out."""
        if not self.training:
            return self.probability.to(x.dtype)
        if by == "batch":
            return None if torch.rand(()) >= self.probability.cpu() else torch.ones((), dtype=x.dtype, device=x.device)
        draws = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device)
        return (draws < self.probability).to(x.dtype)


@dataclass(frozen=True)
class StochasticDepth(Scheme):
    """``x1 = x + h b v(x)`` with b drawn from {0, 1} in training mode; ``x1 = x + h p v(x)``, its mean, in eval mode.

    The probability p of b = 1 falls along the flow from 1: ``p_m = 1 - (m + 1) / depth * (1 - survival)``. A block that
    depth edits copy hands its own on.
    Reference: Huang, Sun, Liu, Sedra, Weinberger. Deep networks with stochastic depth. ECCV 2016, eq. 2, 4 and 5.

    Args:
        survival: p of the last block, in (0, 1].
        by: "sample", b is drawn for each, or "batch", as published: one b for all, and a block that is left out is not
            evaluated, so that its weights get no gradient (``find_unused_parameters`` of torch's data parallelism).

    Raises:
        TypeError, ValueError: a survival that is no probability above 0, or another ``by``.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=StochasticDepth(0.5), depth=4)
    >>> [block.fields[1].probability.item() for block in flow.blocks]
    [0.875, 0.75, 0.625, 0.5]
    """

    name: str = field(init=False, repr=False, default="stochastic_depth")
    survival: float = 0.5
    by: str = "sample"

    def __post_init__(self) -> None:
        check_probability("survival", self.survival, loses=False)
        if self.by not in ("sample", "batch"):
            raise ValueError(f"by must be 'sample' or 'batch', got {self.by!r}")
        super().__post_init__()

    def learned(self, m: int, depth: int) -> nn.Module:
        """What draws whether block m takes its step."""
        return Survival(1 - (m + 1) / depth * (1 - self.survival))

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """``b v(t, x)``."""
        mask = learned.mask(x, self.by)
        return torch.zeros_like(x) if mask is None else mask * fields[0](t, x)
