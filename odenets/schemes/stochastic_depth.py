"""Stochastic depth: Euler steps that are left out at random while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from odenets.schemes.probability import check_probability
from odenets.schemes.scheme import Learned, Memory, Scheme, Velocity

__all__ = ["StochasticDepth"]


class Survival(Learned):
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

    The probability p of b = 1 falls along the flow: ``p_m = first - (m + 1) / depth * (first - survival)``. A block
    that depth edits copy hands its own on; a shared one has that of the last.
    Reference: Huang, Sun, Liu, Sedra, Weinberger. Deep networks with stochastic depth. ECCV 2016, eq. 2, 4 and 5.

    Args:
        survival: p of the last block, in (0, 1].
        first: p before the first block, from which it falls; where a network has several flows,
            :func:`odenets.models.network` lets it fall along all of them.
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
    first: float = 1.0

    def __post_init__(self) -> None:
        check_probability("survival", self.survival, loses=False)
        check_probability("first", self.first, loses=False)
        if self.by not in ("sample", "batch"):
            raise ValueError(f"by must be 'sample' or 'batch', got {self.by!r}")
        super().__post_init__()

    @property
    def draws(self) -> bool:
        """Where a block may be left out."""
        return self.survival < 1

    def learned(self, m: int, depth: int) -> nn.Module:
        """What draws whether block m takes its step."""
        return Survival(self.first - (m + 1) / depth * (self.first - self.survival))

    def of_share(self, begin: float, end: float) -> StochasticDepth:
        """That of the blocks from one share of a network's to another, so that p falls along all."""
        fall = self.first - self.survival
        return replace(self, first=self.first - begin * fall, survival=self.first - end * fall)

    @property
    def settings(self) -> str:
        """Its name, for probabilities are in the state."""
        return self.name

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """``b v(t, x)``."""
        mask = learned.mask(x, self.by)
        return torch.zeros_like(x) if mask is None else mask * fields[0](t, x)
