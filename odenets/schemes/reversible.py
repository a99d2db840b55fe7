"""Reversible schemes: steps that are sequences of shears of two parts of a state, and can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from odenets.schemes.scheme import Memory, Scheme, Velocity
from solvers.gradients.shears import Shear

__all__ = ["CoupledHalves", "ReversibleScheme", "VelocityState"]


@dataclass(frozen=True)
class ReversibleScheme(Scheme):
    """A scheme whose step is a sequence of shears, ``part <- scale part + weight v(other part)``, each of which undoes.

    A subclass says which (:meth:`shears`) and what the parts are: :class:`CoupledHalves` of the state, or the state and
    a velocity beside it (:class:`VelocityState`).

    Args:
        reversible: whether gradients undo the steps, so that a plain call keeps two parts of a state whatever the
            depth, and a training step costs one more pass forward. Calls that measure steps keep them in any case, as
            do those that ``torch.func`` transforms, and compiled ones leave it to the compiler. False is
            backpropagation, which also has second derivatives and takes half precision.

    Raises:
        TypeError: reversible that is neither True nor False.

    >>> import odenets
    >>> isinstance(odenets.schemes.RevNet(), ReversibleScheme), odenets.schemes.RevNet(reversible=False).reversible
    (True, False)
    """

    reversible: bool = field(default=True, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.reversible, bool):
            raise TypeError(f"reversible must be True or False, got {self.reversible!r}")
        super().__post_init__()

    def shears(self, t: float, h: float, before: float | None) -> tuple[Shear, ...]:
        """Those of a step.

        Args:
            t: time at its start.
            h: its size.
            before: the size of the step before, where there is one.

        Returns:
            The shears, in the order in which they are taken.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define shears(t, h, before)")

    def parts(self, x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """The two parts of a state ``x`` ``(B, *S)`` and of the ``value`` of the memory, None at the start.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define parts(x, value)")

    def whole(self, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The state that has these ``parts``, and the value of its memory.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define whole(parts)")


@dataclass(frozen=True)
class CoupledHalves(ReversibleScheme):
    """Shears of the two halves of the state's dimension 1, one by a field of the other.

    A block has two fields of half the channels, which come in turns. A subclass defines :meth:`couplings`.

    >>> import odenets
    >>> odenets.schemes.RevNet().couplings()
    ((0, 1.0, 0.0, 0), (1, 1.0, 0.0, 1))
    """

    def couplings(self) -> tuple[tuple[int, float, float, int], ...]:
        """Of each shear which half it moves, by how much of h, from when in it, and by which velocity.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define couplings()")

    def shears(self, t: float, h: float, before: float | None) -> tuple[Shear, ...]:
        """Those of :meth:`couplings`."""
        return tuple([Shear(i, 1 - i, 1.0, h * w, t + h * c, call) for i, w, c, call in self.couplings()])

    def fields_see(self, x: Tensor) -> Tensor:
        """The first half.

        Raises:
            ValueError: there are no two halves.
        """
        return self.parts(x, None)[0]

    def parts(self, x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """The halves of the state, ``(B, C / 2, ...)``.

        Raises:
            ValueError: there are no two halves.
        """
        if x.ndim < 2 or x.shape[1] % 2:
            raise ValueError(
                f"x must have an even number of channels with solver={self.name!r}, whose halves move each other, got "
                f"shape {tuple(x.shape)}: let the encoder make one more, or odenets.schemes.InjectivePadding"
            )
        first, second = x.chunk(2, 1)
        return first, second

    def whole(self, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The halves behind each other."""
        return torch.cat(parts, 1), None

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The residues of the halves, each by velocities at where the shears before lead."""
        halves, moved = self.parts(x, None), [None, None]
        for i, w, c, call in self.couplings():
            r, other = moved[i], moved[1 - i]
            place = halves[1 - i] if other is None else halves[1 - i].add(other, alpha=h)
            v: Any = fields[call](t + h * c, place)
            moved[i] = (v if w == 1 else v * w) if r is None else r.add(v, alpha=w)  # type: ignore[union-attr]
        return torch.cat(moved, 1)  # type: ignore[arg-type]  # each half has moved


@dataclass(frozen=True)
class VelocityState(ReversibleScheme):
    """A velocity r beside the state, ``r_m = scale r_{m-1} + weight v(t, x_m)`` and ``x_{m+1} = x_m + h r_m``.

    It is the residue, and the memory of a step. At the start it is 0. A subclass defines :meth:`rates`.

    >>> import odenets
    >>> odenets.schemes.Momentum(0.5).rates(1.0, 1.0)
    (0.5, 0.5)
    """

    memory: ClassVar[bool] = True

    def rates(self, h: float, before: float | None) -> tuple[float, float]:
        """The scale and the weight, of a step of size ``h`` and the one ``before`` it, None at the start.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rates(h, before)")

    def shears(self, t: float, h: float, before: float | None) -> tuple[Shear, ...]:
        """One of the velocity by the field at the state, and one of the state by the velocity."""
        scale, weight = self.rates(h, before)
        return Shear(1, 0, scale, weight, t, 0), Shear(0, 1, 1.0, h)

    def parts(self, x: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state and the velocity."""
        return x, torch.zeros_like(x) if value is None else value

    def whole(self, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same."""
        return parts

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The velocity behind the first shear."""
        scale, weight = self.rates(h, None if memory is None else memory.h)
        v = fields[0](t, x)
        if memory is None or scale == 0:
            return v if weight == 1 else v * weight
        return (memory.value if scale == 1 else memory.value * scale).add(v, alpha=weight)
