"""Figures of [K24] beside ours, and the verdict that their intervals give.

What is compared stands in ``experiments/pages/comparisons.toml``: a table of [K24], cells of it, and rows of committed
results, as [K24] has it and with a control. A comparison is of an effect (a difference of two cells beside a paired
difference), of a level (a cell beside a mean), or of a sign, where [K24] has no number or another measure.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lab import evidence
from lab.statistics import Interval
from lab.thesis import thesis

__all__ = ["Comparison", "Figure", "comparisons", "effect", "level", "sign"]

Value = Interval | float
NEAR = 0.1
"""Share of a figure of [K24] within which one of ours is the same, where neither has an interval."""


def effect(ours: Interval, theirs: Interval) -> str:
    """What a paired difference says of one in [K24].

    >>> gain = Interval(7.0, 1.0, 50)
    >>> [effect(Interval(mean, 2.0, 20), gain) for mean in (6.0, 3.5, 12.0, 1.5, -3.0)]
    ['reproduced', 'smaller', 'larger', 'not reproduced', 'opposite']
    >>> effect(Interval(3.0, 4.0, 5), gain), effect(Interval(0.5, 1.0, 5), Interval(0.1, 0.4, 50))
    ('open', 'none in either')
    """
    if not theirs.sign:
        return "differs" if ours.sign else "none in either"
    if not ours.sign:
        return "open" if ours.meets(theirs) else "not reproduced"
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
    """One of ours.

    Attributes:
        text: mean and interval, or how many cells meet.
        verdict: on it.
        how: it was had, where that is not as in [K24].
        runs: how many are behind it.
    """

    text: str
    verdict: str
    how: str
    runs: int


@dataclass(frozen=True)
class Comparison:
    """A claim of [K24] beside ours.

    Attributes:
        group: of claims.
        table: of [K24], with "table" or "section".
        claim: in words.
        conditions: of ours, where they are not those of [K24].
        theirs: its figure as text.
        ours: as it has it, and with the controls.
        page: that tells more, without its ending.
        results: that hold ours.
        headline: the claim in a few words, where it stands in the README too.
        cells: of its tables that are compared, as table, row and column.
    """

    group: str
    table: str
    claim: str
    conditions: str
    theirs: str
    ours: tuple[Figure, ...]
    page: str
    results: tuple[str, ...]
    headline: str
    cells: tuple[tuple[str, str, str], ...]

    @property
    def verdict(self) -> str:
        """On ours, as [K24] has it."""
        return self.ours[0].verdict


@cache
def comparisons() -> tuple[Comparison, ...]:
    """All that are written down, in their order."""
    text = (evidence.ROOT / "experiments/pages/comparisons.toml").read_text()
    return tuple(_compare(entry) for entry in tomllib.loads(text)["comparison"])


def _compare(entry: Mapping[str, Any]) -> Comparison:
    digits = entry.get("digits", 1)
    cells = [_cells(*cell) for cell in entry.get("thesis", ())]
    theirs = _theirs([_mean([thesis(*cell) for cell in each]) for each in cells])
    other = entry.get("measure")
    text = entry.get("said") or ("" if theirs is None else f"{theirs:z.{digits}f}{f' ({other})' if other else ''}")
    ours = tuple(_figure(each, theirs, entry, digits) for each in entry["ours"])
    words = {name: entry.get(name, "") for name in ("group", "claim", "conditions", "page", "headline")}
    if "{" in words["conditions"]:
        words["conditions"] = words["conditions"].format_map(_row(entry["ours"][0]))
    results = tuple(dict.fromkeys(each["result"] for each in entry["ours"] if "result" in each))
    return Comparison(
        **words, table=entry["table"], theirs=text, ours=ours, results=results,
        cells=tuple(cell for each in cells for cell in each),
    )  # fmt: skip


def _cells(table: str, row: Any, columns: Any) -> list[tuple[str, str, str]]:
    return [(table, str(row), column) for column in (columns if isinstance(columns, list) else [columns])]


def _mean(values: list[Any]) -> Value:
    if any(value is None for value in values):
        raise ValueError("a comparison must name cells that thesis.json holds")
    return values[0] if len(values) == 1 else statistics.fmean(values)


def _theirs(values: list[Value]) -> Value | None:
    """A cell, or the first less the second, whose errors are independent."""
    if len(values) < 2:
        return values[0] if values else None
    one, other = map(_interval, values)
    return Interval(one.mean - other.mean, math.hypot(one.half_width, other.half_width), 2 * (one.half_width > 0))


def _figure(own: Mapping[str, Any], theirs: Value | None, entry: Mapping[str, Any], digits: int) -> Figure:
    how = own.get("how", "")
    if "cells" in own:
        pairs = [(r[own["cells"]], r["thesis"]) for r in evidence.rows(own["result"], **own.get("where", {}))]
        met = sum(ours.meets(cell) for ours, cell in pairs if isinstance(cell, Interval))
        verdict = f"{met} of {len(pairs)} within the intervals"
        return Figure("", verdict, how, pairs[0][0].n)
    ours = _value(own)
    n = ours.n if isinstance(ours, Interval) else 0
    text = f"{ours:z.{digits}f}"
    if "sign" in entry:
        return Figure(text, sign(_interval(ours), entry["sign"]), how, n)
    assert theirs is not None
    if len(entry["thesis"]) == 1 or entry.get("kind") == "level":
        return Figure(text, level(ours, theirs), how, n)
    return Figure(text, effect(_interval(ours), _interval(theirs)), how, n)


def _value(own: Mapping[str, Any]) -> Value:
    """A cell of a result, an interval in a sentence, or a ratio in a table of benchmarks."""
    if "benchmark" in own:
        (line,) = (r for r in evidence.benchmark(own["benchmark"]) if r["time"] == own["time"])
        return float(line[own["column"]])
    if "sentence" in own:
        return evidence.sentence(own["result"], own["sentence"]).interval
    value = _row(own)[own["value"]]
    return value if "less" not in own else Interval(value.mean - own["less"], value.half_width, value.n)


def _row(own: Mapping[str, Any]) -> dict[str, Any]:
    return evidence.row(own["result"], **own.get("where", {}))
