"""Rows of an experiment as a table to look at, a format for each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

import numpy as np

__all__ = ["check_columns", "table"]

Row = Mapping[str, Any]


def check_columns(columns: Mapping[str, str | Callable[[Row], object]]) -> None:
    """Raise ValueError where the format of a column names no value of the row."""
    for heading, format in columns.items():
        if not callable(format) and not any(name for _, name, _, _ in Formatter().parse(format)):
            raise ValueError(f"column {heading!r} must be a format that names a value, as '{{x:.2f}}', got {format!r}")


def table(rows: Iterable[Row], columns: Mapping[str, str | Callable[[Row], object]]) -> str:
    """A Markdown table.

    Args:
        rows: values by name.
        columns: for each heading a format of those values, or a function of the row. A cell whose values are missing or
            None stays empty, a format shows a truth value as yes or no, and a column without any cell is left out.

    Raises:
        ValueError: a format names no value.

    >>> print(table([{"n": 1, "x": 0.5}, {"n": 2, "ok": True}], {"n": "{n}", "x": "{x:.2f}", "ok": "{ok}", "y": "{y}"}))
    | n   | x    | ok   |
    |-----|------|------|
    | 1   | 0.50 |      |
    | 2   |      | yes  |
    """
    from tabulate import tabulate

    check_columns(columns)
    cells = [[_cell(row, format) for format in columns.values()] for row in rows]
    shown = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    headings = [heading for i, heading in enumerate(columns) if i in shown]
    return tabulate([[line[i] for i in shown] for line in cells], headings, tablefmt="github", disable_numparse=True)


def _cell(row: Row, format: str | Callable[[Row], object]) -> str:
    values = {name: value for name, value in row.items() if value is not None}
    if not callable(format):
        values = {name: ("no", "yes")[bool(v)] if isinstance(v, bool | np.bool_) else v for name, v in values.items()}
    try:
        return str(format(values)) if callable(format) else format.format_map(values)
    except KeyError:
        return ""
