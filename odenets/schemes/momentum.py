"""Momentum ResNet: steps along a running mean of velocities."""

from __future__ import annotations

from dataclasses import dataclass, field

from odenets.errors import check_number
from odenets.schemes.reversible import VelocityState

__all__ = ["Momentum"]


@dataclass(frozen=True)
class Momentum(VelocityState):
    """Momentum ResNet: ``r_m = gamma r_{m-1} + (1 - gamma) v_m(x_m)`` and ``x_{m+1} = x_m + h r_m``, from rest.

    With gamma = 0 it is a residual network. As h goes to 0 with gamma as it is, so is what it follows, ``x' = v``; with
    ``eps = h / (1 - gamma)`` fixed it is ``eps x'' + x' = v``. It is undone by ``x_m = x_{m+1} - h r_m`` and
    ``r_{m-1} = (r_m - (1 - gamma) v_m(x_m)) / gamma``.
    Reference: Sander, Ablin, Blondel, Peyre. Momentum residual neural networks. ICML 2021, arXiv:2102.07870.

    Args:
        gamma: how much of the velocity is kept, in [0, 1).
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`. On the way back rounding grows by ``1 / gamma`` a
            block. The published network keeps the bits that are lost; here a pair of states is kept before they are
            missed, in float32 every 51 blocks with gamma = 0.9, every 8 with 0.5, and every one with 0.

    Raises:
        TypeError, ValueError: a gamma that is no number, or not in [0, 1).

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=Momentum(0.9), depth=10)
    >>> [round(step.residue.norm().item() / flow.blocks[0].fields[0](0, step.x0).norm().item(), 6)
    ...  for step in flow.steps(torch.ones(1, 2))][:1]
    [0.1]
    """

    name: str = field(init=False, repr=False, default="momentum")
    gamma: float = 0.9

    def __post_init__(self) -> None:
        gamma = check_number("gamma", self.gamma)
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}: 0 is a residual network")
        super().__post_init__()

    def rates(self, h: float, before: float | None) -> tuple[float, float]:
        """``gamma`` and ``1 - gamma``."""
        return self.gamma, 1 - self.gamma
