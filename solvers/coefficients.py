"""Coefficients of a method as tensors, to which gradients flow: what a step reads in the place of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from solvers.roots import RootFinder
from solvers.validation import real_dtype

if TYPE_CHECKING:
    from solvers.tableaus import ButcherTableau

__all__ = ["Coefficients", "HasCoefficients", "ImplicitCoefficients", "Output", "as_numbers_or_tensors"]


class Output(NamedTuple):
    """A solution obtained from the stages: its order, and one weight per stage, ``(stages,)``."""

    order: int
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """Those of an explicit method at one moment, with the attributes of a :class:`~solvers.ButcherTableau`.

    Attributes:
        name: of the method.
        order: its order.
        c: the nodes, one tensor without dimensions per stage.
        a: row ``i`` holds the weights of the earlier stages, ``(i,)``.
        b: weights of the solution, ``(stages,)``.
    """

    name: str
    order: int
    c: tuple[Tensor, ...]
    a: tuple[Tensor, ...]
    b: Tensor
    fsal: ClassVar[bool] = False
    explicit: ClassVar[bool] = True
    implicit: ClassVar[bool] = False
    structure: ClassVar[str] = ""
    low: ClassVar[None] = None
    dense: ClassVar[None] = None
    error_weights: ClassVar[None] = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.c)

    @property
    def interior(self) -> int:
        """Number of stages that the solution needs, all."""
        return len(self.c)

    @property
    def calls(self) -> int:
        """Field calls of a step."""
        return len(self.c)

    @property
    def inside_calls(self) -> int:
        """Field calls for states inside a step, one, of cubic Hermite."""
        return 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the embedded outputs, the solution's alone."""
        return (f"order{self.order}",)

    def solution(self, name: str) -> Output:
        """The solution, by its name.

        Raises:
            ValueError: there is no other.
        """
        if name not in self.outputs:
            raise ValueError(f"{self.name} has no output {name!r}; it has {self.outputs[0]}")
        return Output(self.order, self.b)

    def weights_at(self, theta: Any) -> tuple[Any, ...]:
        """None: a learned method has no interpolant.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} has no interpolant of its own; bs23, dopri5, dopri8 and kvaerno5 have")


@dataclass(frozen=True, slots=True, eq=False)
class ImplicitCoefficients(Coefficients):
    """Those of a diagonally implicit method: where a stage is implicit, its row of a has its own weight behind.

    Attributes:
        roots: how stages are found.
    """

    roots: RootFinder
    explicit: ClassVar[bool] = False
    implicit: ClassVar[bool] = True


class HasCoefficients(Protocol):
    """A method whose coefficients are computed, as those of :class:`~solvers.LearnedTableau`."""

    def coefficients(self) -> Coefficients:
        """Those of this moment."""
        ...


def as_numbers_or_tensors(tableau: Any, x: Tensor) -> ButcherTableau:
    """The method as a step from ``x`` reads it: a tableau as it is, a learned one by its coefficients of this moment.

    They are on the device of x, and the nodes, and so the times that a field gets, in its precision.
    """
    if not hasattr(tableau, "coefficients"):
        return tableau
    now = cast(HasCoefficients, tableau).coefficients()
    c = torch.stack(now.c).to(x.device, real_dtype(x)).unbind()
    a, b = tuple([row.to(x.device) for row in now.a]), now.b.to(x.device)
    return cast("ButcherTableau", Coefficients(now.name, now.order, c, a, b))
