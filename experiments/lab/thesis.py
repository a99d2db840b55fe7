"""The figures of [K24]'s tables (``thesis.json``), which stand beside those of the experiments."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lab.statistics import Interval

__all__ = ["beside_thesis", "tables_of_thesis", "thesis"]


@cache
def tables_of_thesis() -> dict[str, dict[str, Any]]:
    """All that is written down, by table or section."""
    return json.loads(Path(__file__).with_name("thesis.json").read_text())


def thesis(table: str, row: str | int, column: str) -> Any:
    """A cell of a table or section: a number, an interval over runs, or None where [K24] has no such cell.

    >>> thesis("9", 8, "TRGL"), f"{thesis('11', 1000, 'sequential TRGL'):.2f}", thesis("9", 8, "TRGL*")
    (48, '51.34 ± 0.90', None)
    """
    cells = tables_of_thesis().get(table, {"columns": (), "rows": ()})
    rows: dict[str, Any] = {str(name): values for name, *values in cells["rows"]}
    value = dict(zip(cells["columns"][1:], rows.get(str(row), ()), strict=False)).get(column)
    return Interval(*value, n=cells["runs"]) if isinstance(value, list) else value


def beside_thesis(ours: Interval, table: str, row: str | int, column: str) -> dict[str, Any]:
    """[K24]'s interval and whether ours meets it, for a row of results; empty where it states none."""
    theirs = thesis(table, row, column)
    return {"thesis": theirs, "meets": ours.meets(theirs)} if isinstance(theirs, Interval) else {}
