"""Speeds as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from odenets.command.speed.solves import COLUMNS

__all__ = ["markdown", "ratio_table"]

KEYS = ("device", "field", "passes", "method")


def ratio_table(rows: Sequence[dict[str, Any]], keys: Sequence[str] = KEYS) -> str:
    """Time of a solve over that of its field calls, with its quartiles where rows have them; field calls in brackets.

    Args:
        rows: what was measured, grouped by the keys.
        keys: what has a column of its own, and makes a line.
    """
    rows = [row | {"passes": "forward + backward" if row["backward"] else "forward"} for row in rows]
    people = [who for who in COLUMNS if any(row["who"] == who for row in rows)]
    lines = []
    for names, group in groupby(rows, lambda row: tuple(row[key] for key in keys)):
        by = {row["who"]: row for row in group}
        call = min(row["floor"] / row["evaluations"] for row in by.values())
        lines.append([*names, f"{1e6 * call:.0f}", *(_cell(by[who]) if who in by else "" for who in people)])
    return markdown([*(key if key in ("field", "method") else "" for key in keys), "one call (µs)", *people], lines)


def _cell(row: dict[str, Any]) -> str:
    between = " [{:.2f}, {:.2f}]".format(*row["quartiles"]) if "quartiles" in row else ""
    return f"{row['ratio']:.2f}{between} ({row['evaluations']})"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it stands, too.

    >>> print(markdown(["", "h"], [["a", "0.25"]]))
    |     | h    |
    |-----|------|
    | a   | 0.25 |
    """
    widths = [max(3, *map(len, column)) for column in zip(heads, *lines, strict=True)]
    rows = [heads, *lines]
    texts = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])
