"""Verdicts on figures of [K24] beside ours, from their intervals.

A claim (:class:`Claim`) is compared by its effect (a difference of two cells beside a paired difference of ours), by a
level (a cell beside a mean), by all cells of a table, or by its sign alone, where [K24] has no number or another
measure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.statistics import Interval
from lab.thesis import thesis

__all__ = ["Cell", "Claim", "Comparison", "Figure", "Value", "effect", "level", "sign"]

Value = Interval | float
Cell = tuple[str, str | int, str] | tuple[str, str | int, tuple[str, ...]]
"""Of [K24]: table, row, and column, or columns of which the mean counts."""
NEAR = 0.1
"""Share of a figure of [K24] within which one of ours is the same, where neither has an interval."""


def effect(ours: Interval, theirs: Interval) -> str:
    """What a paired difference says of one in [K24].

    >>> gain = Interval(7.0, 1.0, 50)
    >>> [effect(Interval(mean, 2.0, 20), gain) for mean in (6.0, 3.5, 12.0, 1.5, -3.0)]
    ['reproduced', 'smaller', 'larger', 'not reproduced', 'opposite']
    >>> none = Interval(0.1, 0.4, 50)
    >>> effect(Interval(3.0, 4.0, 5), gain), effect(Interval(0.5, 1.0, 5), none)
    ('open', 'none in either')
    >>> [effect(Interval(mean, 0.3, 5), none) for mean in (0.5, 2.0)]
    ['open', 'differs']
    """
    if not ours.sign and not theirs.sign:
        return "none in either"
    if not ours.sign or not theirs.sign:
        return "open" if ours.meets(theirs) else "differs" if ours.sign else "not reproduced"
    if ours.sign != theirs.sign:
        return "opposite"
    if ours.meets(theirs):
        return "reproduced"
    return "smaller" if abs(ours.mean) < abs(theirs.mean) else "larger"


def level(ours: Value, theirs: Value) -> str:
    """What a mean says of one in [K24]: whether the intervals meet, or the figures are within a tenth.

    >>> level(Interval(82.0, 2.7, 100), Interval(82.1, 2.6, 100)), level(53.0, 24.0), level(23.0, 24.0)
    ('within the intervals', 'higher', 'reproduced')
    """
    one, other = _interval(ours), _interval(theirs)
    if isinstance(ours, Interval):
        if one.meets(other):
            return "within the intervals"
    elif abs(ours - other.mean) <= NEAR * abs(other.mean):
        return "reproduced"
    return "higher" if one.mean > other.mean else "lower"


def sign(ours: Interval, theirs: int) -> str:
    """What a difference says of a claim that has a sign alone.

    >>> [sign(Interval(mean, 1.0, 5), 1) for mean in (2.0, 0.5, -2.0)]
    ['reproduced in sign', 'not reproduced', 'opposite']
    """
    return ("not reproduced", "reproduced in sign", "opposite")[ours.sign * theirs]


def _interval(value: Value) -> Interval:
    return value if isinstance(value, Interval) else Interval(value, 0.0, 2)


@dataclass(frozen=True)
class Figure:
    """One of ours: its text, empty where it is of many cells, and the verdict on it."""

    text: str
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A claim with the thesis' figure, ours as it has it, and ours with a control, if there is one.

    Attributes:
        claim: what is compared.
        theirs: figure of [K24] as text, or what it says.
        ours, control: figures.
        cells: of [K24] that are compared, as table, row and column.
    """

    claim: Claim
    theirs: str
    ours: Figure
    control: Figure | None
    cells: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Claim:
    """A claim of [K24].

    Attributes:
        table: of [K24], with "table", "section" or "Fig.".
        words: that say it.
        page: that tells more of ours, without its ending.
        conditions: of ours, where they are not those of [K24].
        headline: the claim in a few words, where it stands in the README too.
        digits: of its figures.
        beside: the figure to read it by: without the method, or of a control.
    """

    table: str
    words: str
    page: str
    conditions: str = ""
    headline: str = ""
    digits: int = 1
    beside: str = ""

    def effect(self, one: Cell, other: Cell, ours: Interval, control: Interval | None = None) -> Comparison:
        """By the difference of two cells of [K24]."""
        theirs = _difference(one, other)
        figures = [each and Figure(self._text(each), effect(each, theirs)) for each in (ours, control)]
        return self._compare(self._text(theirs), figures, one, other)

    def level(self, cell: Cell, ours: Value) -> Comparison:
        """By a cell of [K24]."""
        theirs = _value(cell)
        return self._compare(self._text(theirs), [Figure(self._text(ours), level(ours, theirs))], cell)

    def overhead(self, cell: Cell, ours: float) -> Comparison:
        """By what a ratio in a cell of [K24] is above 1, in percent: two ratios near 1 are alike without it."""
        more, theirs = (100 * (_interval(ratio).mean - 1) for ratio in (ours, _value(cell)))
        return self._compare(self._text(theirs), [Figure(self._text(more), level(more, theirs))], cell)

    def sign(self, theirs: int, ours: Interval, words: str) -> Comparison:
        """By what [K24] says without a number, in words."""
        return self._compare(words, [Figure(self._text(ours), sign(ours, theirs))])

    def below_one(self, ours: Interval, words: str) -> Comparison:
        """By a ratio that [K24] says, without a number, is below 1."""
        less = Interval(ours.mean - 1, ours.half_width, ours.n)
        return self._compare(words, [Figure(self._text(ours), sign(less, -1))])

    def sign_of(self, one: Cell, other: Cell, ours: Interval, measure: str) -> Comparison:
        """By the sign of a difference of two cells of [K24], which has another measure."""
        theirs = _difference(one, other)
        figure = Figure(self._text(ours), sign(ours, 1 if theirs.mean > 0 else -1))
        return self._compare(f"{self._text(theirs)} ({measure})", [figure], one, other)

    def cells(self, rows: Iterable[Mapping[str, Any]], name: str) -> Comparison:
        """By the cells of [K24] that stand in rows of ours, beside a mean in them."""
        meet = [row[name].meets(row["thesis"]) for row in rows]
        return self._compare("", [Figure("", f"{sum(meet)} of {len(meet)} within the intervals")])

    def _text(self, value: Value) -> str:
        return f"{value:z.{self.digits}f}"

    def _compare(self, theirs: str, figures: list[Figure | None], *cells: Cell) -> Comparison:
        ours, control, *_ = [*figures, None]
        assert ours is not None
        named = ((table, str(row), name) for table, row, names in cells for name in _names(names))
        return Comparison(self, theirs, ours, control, tuple(named))


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _value(cell: Cell) -> Value:
    table, row, names = cell
    values = [thesis(table, row, name) for name in _names(names)]
    if None in values:
        raise ValueError(f"cell must name a cell of thesis.json, got {cell}")
    return values[0] if len(values) == 1 else statistics.fmean(values)


def _difference(one: Cell, other: Cell) -> Interval:
    """The first less the second, whose errors are independent."""
    a, b = _interval(_value(one)), _interval(_value(other))
    return Interval(a.mean - b.mean, math.hypot(a.half_width, b.half_width), 2 if a.half_width else 1)
