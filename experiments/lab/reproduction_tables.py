"""Tables of the reproduction: comparisons by group, how often each verdict is given, what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from lab import tables
from lab.reproduction import comparisons
from lab.thesis import tables_of_thesis

__all__ = ["compared", "counts", "headlines", "not_run"]


def compared(group: str) -> str:
    """The comparisons of a group as a table; its control, of which there is one at most, is a heading.

    Raises:
        ValueError: no comparison is of the group, or its controls are of several kinds.
    """
    chosen = [comparison for comparison in comparisons() if comparison.group == group]
    controls = {figure.how for comparison in chosen for figure in comparison.ours[1:]}
    if not chosen or len(controls) > 1:
        raise ValueError(f"group must have comparisons with one control, got {group!r} with controls {controls}")
    columns: dict[str, Callable[[Any], object]] = {
        "where": lambda row: f"[{row['of'].table}](experiments/{row['of'].page}.md)",
        "what": lambda row: row["of"].claim + (f" ({row['of'].conditions})" if row["of"].conditions else ""),
        "thesis": lambda row: row["of"].theirs,
        "ours": lambda row: row["of"].ours[0].text,
        "verdict": lambda row: f"**{row['of'].verdict}**",
    }
    for control in controls:
        columns[control] = lambda row: "; ".join(figure.text for figure in row["of"].ours[1:])
        columns["verdict on it"] = lambda row: "; ".join(f"**{figure.verdict}**" for figure in row["of"].ours[1:])
    return tables.table([{"of": comparison} for comparison in chosen], columns)


def counts(group: str = "", control: bool = False) -> dict[str, int]:
    """How often each verdict is given: on ours as [K24] has it, or with the control where there is one."""
    verdicts = Counter()
    for comparison in comparisons():
        if comparison.group.startswith(group) and comparison.theirs and len(comparison.ours) > control:
            verdicts[comparison.ours[control].verdict] += 1
    return dict(verdicts.most_common())


def headlines() -> str:
    """The table of README: a few claims, with the control where there is one."""
    columns: dict[str, Callable[[Any], object]] = {
        "the thesis says": lambda row: row["of"].headline,
        "thesis": lambda row: row["of"].theirs,
        "ours": lambda row: row["of"].ours[0].text,
        "verdict": lambda row: row["of"].ours[0].verdict,
        "with a control": lambda row: "; ".join(
            f"{figure.text} ({figure.how}): {figure.verdict}" for figure in row["of"].ours[1:]
        ),
    }
    return tables.table([{"of": comparison} for comparison in comparisons() if comparison.headline], columns)


def not_run() -> list[dict[str, str]]:
    """Tables of [K24], and rows of tables that were run, with which nothing is compared."""
    cells = {(table, row) for comparison in comparisons() for table, row, _ in comparison.cells}
    missing = []
    for name, each in tables_of_thesis().items():
        rows = [str(row[0]) for row in each["rows"]]
        lacking = [row for row in rows if (name, row) not in cells]
        if lacking and "." not in name:  # sections have no rows of their own
            what = "all" if len(lacking) == len(rows) else f"{each['columns'][0]}: {'; '.join(lacking)}"
            missing.append({"table": name, "title": each["title"], "rows": what})
    return missing
