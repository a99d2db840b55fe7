"""FractalNet: columns of steps of the block's size, of its halves and of its quarters, joined where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from odenets.errors import check_count
from odenets.schemes.probability import check_probability
from odenets.schemes.scheme import Calls, Learned, Memory, Scheme, Velocity
from solvers import ButcherTableau
from solvers.tableaus import Embedded

__all__ = ["Fractal"]

_MOST = 8  # columns, of 255 fields a block


class Paths(Learned):
    """Draws the paths of a fractal block in training mode.

    Args:
        drop: probability with which a join loses each of its inputs; one stays.
        single: probability that a pass takes one column instead.
    """

    def __init__(self, drop: float, single: float) -> None:
        super().__init__()
        self.drop, self.single = drop, single

    def column(self, columns: int) -> int | None:
        """The one column that a pass takes, or None for all."""
        if not (self.training and self.single) or torch.rand(()) >= self.single:
            return None
        return int(torch.randint(columns, ()))

    def keeps(self, columns: Sequence[int]) -> list[int]:
        """Which of the columns a join keeps."""
        if not (self.training and self.drop) or len(columns) == 1:
            return [*columns]
        draws = torch.rand(len(columns))
        kept = [c for c, draw in zip(columns, draws.tolist(), strict=True) if draw >= self.drop]
        return kept or [columns[int(draws.argmax())]]


@dataclass(frozen=True)
class Fractal(Scheme):
    """FractalNet's blocks: column c crosses a block in ``2^(c - 1)`` cells, and cells that end together are joined.

    A join is the mean. A cell is a step of Euler's method over its share of h, so that every column, and any way
    through the block, is an integrator of its own for the fields that it meets; published cells have no shortcut,
    ``cells="plain"``. The columns' residues, which the last join averages, are the stages of a step; its embedded
    error is against the shallowest of them. Fields on paths that are dropped get no gradient
    (``find_unused_parameters`` of torch's data parallelism).
    Reference: Larsson, Maire, Shakhnarovich. FractalNet: ultra-deep neural networks without residuals. ICLR 2017.

    Args:
        columns: how many; a block has ``2^columns - 1`` fields.
        drop: in training, the probability with which each join loses each of its inputs (local drop-path); one stays.
        single: in training, the probability that a pass takes one column of the block alone (global drop-path, which
            is published for one column of the whole network).
        cells: "euler", ``x + h v(x)``, or "plain", ``v(x)``.
        only: a column, from 1, which is taken alone; None for all. :meth:`column` makes such a network.

    Raises:
        TypeError, ValueError: columns that are no number from 1 to 8, probabilities out of [0, 1), other cells, or a
            column that is not there.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=Fractal(columns=3), depth=2)
    >>> shallow = flow.of(flow.blocks, solver=flow.tableau.column(1))  # of the same weights
    >>> flow.evaluations, shallow.evaluations
    (14, 2)
    """

    name: str = field(init=False, repr=False, default="fractal")
    columns: int = 3
    drop: float = 0.0
    single: float = 0.0
    cells: str = "euler"
    only: int | None = None

    def __post_init__(self) -> None:
        check_count("columns", self.columns, 1)
        if self.columns > _MOST:
            raise ValueError(f"columns must be at most {_MOST}, of {2**_MOST - 1} fields a block, got {self.columns}")
        check_probability("drop", self.drop)
        check_probability("single", self.single)
        if self.cells not in ("euler", "plain"):
            raise ValueError(f"cells must be 'euler' or 'plain', got {self.cells!r}")
        if self.only is not None:
            check_count("only", self.only, 1)
        if (self.only or 1) > self.columns:
            raise ValueError(f"only must be one of the columns 1 to {self.columns}, got {self.only}")
        self.adopt(_joined(self.columns if self.only is None else 1))
        super().__post_init__()

    @property
    def uses(self) -> tuple[int, ...]:
        """Each field once, but for those of columns that are left out."""
        return tuple([int(self.only in (None, c + 1)) for c in range(self.columns) for _ in range(2**c)])

    @property
    def draws(self) -> bool:
        """Where paths are dropped."""
        return max(self.drop, self.single) > 0

    @property
    def settings(self) -> str:
        """What is left when no paths are dropped."""
        return repr(replace(self, drop=0.0, single=0.0))

    def column(self, c: int) -> Fractal:
        """The scheme of the column ``c`` alone, from 1, the shallowest, for blocks of this one.

        Raises:
            TypeError, ValueError: there is no such column.
        """
        return replace(self, only=c)

    def learned(self, m: int, depth: int) -> nn.Module:
        """What draws the paths of a block in training mode."""
        return Paths(self.drop, self.single)

    def stages_of(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None
    ) -> tuple[tuple[Tensor, ...], ButcherTableau]:
        """The residue of every column that the last join reads, and their mean."""
        single = self.only and self.only - 1
        if single is None:
            single = learned.column(self.columns)
        first = {single: 0} if self.only else {c: 2**c - 1 for c in range(self.columns) if single in (None, c)}
        calls, moved, cells = Calls(), dict.fromkeys(first, None), 2 ** max(first)
        own: list[Tensor] = []
        for i in range(1, cells + 1):  # the places where cells end, those of the deepest column
            ending = [c for c in first if i % (cells >> c) == 0]
            kept = learned.keeps(ending)
            own = []
            for c in kept:
                length, before = (cells >> c) / cells, moved[c]
                place = first[c] + (i * 2**c) // cells - 1
                v = calls(
                    fields[place], t + h * (i / cells - length), x if before is None else x.add(before, alpha=h), place
                )
                own.append(self._cell(x, before, v, length, h))
            if i < cells:
                joined = own[0] if len(own) == 1 else torch.stack(own).mean(0)
                moved |= dict.fromkeys(ending, joined)
        calls.check(None)
        if self.only is None and self.draws and learned.training:
            return tuple(own), _joined(len(own), "fractal, of which paths are dropped in training mode,", False)
        return tuple(own), self

    def _cell(self, x: Tensor, before: Tensor | None, v: Tensor, length: float, h: float) -> Tensor:
        """How far a cell ends from x, over h, of its velocity and how far it began."""
        if self.cells == "plain":
            return (v - x) / h
        if before is None:
            return v if length == 1 else v * length
        return before.add(v, alpha=length)


@cache
def _joined(columns: int, name: str = "fractal", each_too: bool = True) -> ButcherTableau:
    """The mean of so many residues, and each of them too."""
    zeros, each = (0.0,) * columns, (1 / columns,) * columns
    of = [(f"column{c + 1}", Embedded(1, tuple([float(c == i) for i in range(columns)]))) for c in range(columns)]
    embedded = (*of, ("joined", Embedded(1, each))) if columns > 1 and each_too else ()
    a = tuple(zeros[:i] for i in range(columns))
    return ButcherTableau(name, 1, zeros, a, each, embedded, "column1" if embedded else None)
