"""Linear multistep schemes, whose residue reads that of the block before: LM-ResNet and Adams-Bashforth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from odenets.errors import check_number
from odenets.schemes.scheme import Calls, Learned, Memory, Scheme, Velocity
from solvers import ButcherTableau, get_tableau
from solvers.tableaus import Row

__all__ = ["AdamsBashforth2", "LinearMultistep"]


class Mixing(Learned):
    """The number k by which a block of :class:`LinearMultistep` mixes the residue of the one before into its own."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.k = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def reset_parameters(self) -> None:
        """Take the first value again."""
        with torch.no_grad():
            self.k.fill_(self.start)


@dataclass(frozen=True)
class LinearMultistep(Scheme):
    """LM-ResNet: ``x_{m+1} = (1 - k_m) x_m + k_m x_{m-1} + h v_m(x_m)`` with a learned ``k_m`` in each block.

    In residues that is ``r_m = v_m(x_m) - k_m r_{m-1}``, which is also what is computed where step sizes differ. The
    first block takes a step of Euler's method. Where all k are the same the network follows ``(1 + k) x' = v``.
    Reference: Lu, Zhong, Li, Dong. Beyond finite layer neural networks. ICML 2018, eq. 3.

    Args:
        start: of all k, in (-1, 1); drawn from none, as 0 is a residual network.

    Raises:
        TypeError, ValueError: a start that is no number or not in (-1, 1).

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=LinearMultistep(), depth=3)
    >>> [block.fields[1].k.item() for block in flow.blocks]
    [0.0, 0.0, 0.0]
    """

    name: str = field(init=False, repr=False, default="lm")
    start: float = 0.0
    memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        start = check_number("start", self.start)
        if not -1 < start < 1:
            raise ValueError(f"start must be in (-1, 1), where the recurrence is stable, got {start}")
        super().__post_init__()

    @property
    def settings(self) -> str:
        """Its name, for k is in the state."""
        return self.name

    def learned(self, m: int, depth: int) -> nn.Module:
        """The number k of a block."""
        return Mixing(self.start)

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """``v(t, x) - k r`` with the residue r of the step before."""
        v, k = fields[0](t, x), learned.k.to(x.dtype)
        if memory is None:
            return v.add(k, alpha=0)  # so that every parameter has a gradient, as data parallelism expects
        return torch.addcmul(v, k, memory.value, value=-1)


@dataclass(frozen=True)
class AdamsBashforth2(Scheme):
    """Adams-Bashforth of two steps, ``x_{m+1} = x_m + h (3/2 v_m(x_m) - 1/2 v_{m-1}(x_{m-1}))``, of order 2.

    Its step has two stages, the velocity and that of the step before. Where step sizes differ, with
    ``w = h_m / h_{m-1}``, the weights are ``1 + w / 2`` and ``-w / 2``, so that the order stays. The first block takes
    a step of Euler's method. The weights of its actions, negative for what was a velocity before, add up to positive
    ones over a path of equal steps: 1/2 of the first velocity, 1, and 3/2 of the last.
    Reference: Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, III.1 and III.5.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=AdamsBashforth2(), depth=3)
    >>> [step.tableau.b for step in flow.steps(torch.ones(4, 2))]
    [(1.0,), (1.5, -0.5), (1.5, -0.5)]
    """

    name: str = field(init=False, repr=False, default="ab2")
    order: int = field(init=False, repr=False, default=2)
    c: Row = field(init=False, repr=False, default=(0.0, -1.0))
    a: tuple[Row, ...] = field(init=False, repr=False, default=((), (-1.0,)))
    b: Row = field(init=False, repr=False, default=(1.5, -0.5))
    memory: ClassVar[bool] = True

    def stages_of(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None
    ) -> tuple[tuple[Tensor, ...], ButcherTableau]:
        """The velocity, and behind the first step that of the step before."""
        calls = Calls()
        v = calls(fields[0], t, x, 0)
        calls.check(memory)
        if memory is None:
            return (v,), get_tableau("euler")
        return (v, memory.value), self if h == memory.h else _adams_bashforth(h / memory.h)


@lru_cache(maxsize=4096)
def _adams_bashforth(w: float) -> ButcherTableau:
    """Of a step w times as long as that before."""
    b = (1 + w / 2, -w / 2)
    return ButcherTableau(name="ab2", order=2, c=(0.0, -1 / w), a=((), (-1 / w,)), b=b)
