"""RKCNN: Runge-Kutta steps whose coefficients each block learns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from odenets.schemes.scheme import Memory, Scheme, Velocity
from solvers import ButcherTableau, LearnedTableau, Step, get_tableau, rk_step

__all__ = ["LearnedRungeKutta"]


@dataclass(frozen=True)
class LearnedRungeKutta(Scheme):
    """RKCNN: an explicit Runge-Kutta method for each block, whose coefficients train with its field.

    ``p_i = v(t + c_i h, x + h sum_j a_ij p_j)`` and ``x1 = x + h sum_i b_i p_i``, where a and b are learned, and the
    nodes c are the sums of the rows of a. The order stays, see :class:`solvers.LearnedTableau`; one of these as the
    solver of a flow is shared by all blocks. Steps have all their stages.
    Reference: Zhu, Chang, Fu. Convolutional neural networks combined with Runge-Kutta methods. arXiv:1802.08831.

    Args:
        start: name of the explicit method that each block begins with.

    Raises:
        ValueError, TypeError: no explicit method of two stages or more.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=LearnedRungeKutta("rk4"), depth=3)
    >>> plain = flow.of([odenets.Block([block.fields[0]], block.h) for block in flow.blocks], solver="rk4")
    >>> x = torch.randn(4, 2)
    >>> torch.allclose(flow(x), plain(x), atol=1e-6)
    True
    """

    name: str = field(init=False, repr=False, default="rkcnn")
    start: str = "rk4"

    def __post_init__(self) -> None:
        learned, start = LearnedTableau(self.start), get_tableau(self.start)
        self.adopt(ButcherTableau(self.name, learned.order, start.c, start.a, start.b))
        super().__post_init__()

    @property
    def uses(self) -> tuple[int, ...]:
        """One field at every stage."""
        return (self.stages,)

    def learned(self, m: int, depth: int) -> nn.Module:
        """The coefficients of a block."""
        return LearnedTableau(self.start)

    def take(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None,
        reductions: Collection[str] = ()
    ) -> Step:  # fmt: skip
        """The Runge-Kutta step with the block's coefficients of this moment."""
        return rk_step(fields, t, x, h, learned, reductions=reductions)
