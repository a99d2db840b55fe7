"""Plans: in which order modules train, which of them in which epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Self

from torch import nn

from odenets.module_wise.modules import ModuleWise

__all__ = ["ORDERS", "Order", "Plan", "Visit"]

Order = Literal["parallel", "sequential", "end-to-end", "checkpointed"]
ORDERS = ("parallel", "sequential", "end-to-end", "checkpointed")


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One epoch: of which module, None for all; which epoch of its own; whether it ends a visit to it."""

    module: int | None = None
    epoch: int
    lap: int = 0
    last: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All epochs of a training: ``epochs`` of each module per lap, or of all."""

    order: Order
    K: int
    epochs: list[int]
    laps: int

    @classmethod
    def of(cls, K: int, epochs: int | Sequence[int], order: Order, laps: int) -> Self:
        """The plan of some epochs of each module, or of all.

        Raises:
            TypeError: epochs or laps that are no whole numbers.
            ValueError: arguments out of range.
        """
        several = [*epochs] if isinstance(epochs, Sequence) and not isinstance(epochs, str) else [epochs]
        numbers: list[Any] = [laps, *several]
        if any(isinstance(number, bool) or not isinstance(number, Integral) for number in numbers):
            raise TypeError(f"epochs and laps must be whole numbers, got epochs={epochs!r} and laps={laps!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be 'parallel', 'sequential', 'end-to-end' or 'checkpointed', got {order!r}")
        if laps < 1 or (laps > 1 and order != "sequential"):
            raise ValueError(f"laps must be at least 1, and 1 where the order is not sequential, got {laps}")
        number = K if order == "sequential" else 1
        counts = [int(several[0])] * number if isinstance(epochs, Integral) else [*map(int, several)]
        if len(counts) != number or min(counts) < 0:
            raise ValueError(
                f"epochs must be one number that is not negative, or in the sequential order one per module "
                f"({K}), got {epochs}"
            )
        return cls(order=order, K=K, epochs=counts, laps=int(laps))

    @property
    def whole(self) -> bool:
        """Whether the network is trained end to end."""
        return self.order in ("end-to-end", "checkpointed")

    @property
    def visits(self) -> list[Visit]:
        """All epochs in order."""
        if self.order != "sequential":
            return [Visit(epoch=e) for e in range(self.epochs[0])]
        return [
            Visit(module=k, epoch=lap * n + e, lap=lap, last=e == n - 1)
            for lap in range(self.laps)
            for k, n in enumerate(self.epochs)
            for e in range(n)
        ]

    def units(self, network: ModuleWise) -> Sequence[nn.Module]:
        """What has an optimizer of its own: each module, or all parts with the last head."""
        modules = network.modules_in_order
        return [nn.ModuleList([*(m.part for m in modules), modules[-1].head])] if self.whole else modules

    def trained(self, visit: Visit) -> dict[int, int]:
        """The modules whose loss falls in an epoch, with the numbers of their optimizers."""
        if self.whole:
            return {self.K - 1: 0}
        return {k: k for k in (range(self.K) if visit.module is None else [visit.module])}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to agree with."""
        return {"plan": [self.laps, *self.epochs], "order": self.order}

    def check_state(self, state: dict[str, Any]) -> None:
        """That a checkpoint is one of this plan; another number of epochs is one where all modules train at once.

        Raises:
            ValueError: it is not.
        """
        if "order" not in state:
            raise ValueError(
                "the checkpoint is of another version of odenets, whose trainings are not taken up: begin anew"
            )
        if state["order"] != self.order:
            raise ValueError(f"order must be that of the checkpoint, {state['order']!r}, got {self.order!r}")
        if self.order == "sequential" and state["plan"] != [self.laps, *self.epochs]:
            raise ValueError(
                f"epochs and laps must be those of the checkpoint, {state['plan'][1:]} and {state['plan'][0]}, got "
                f"{self.epochs} and {self.laps}"
            )
