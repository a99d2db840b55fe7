"""Tables of the reproduction: comparisons by group, how often each verdict is given, what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from lab import tables
from lab.comparisons import CONTROLS, comparisons
from lab.reproduction import Claim
from lab.thesis import tables_of_thesis

__all__ = ["compared", "counts", "headlines", "not_run"]


def compared(group: str) -> str:
    """The comparisons of a group as a table."""

    columns: dict[str, Callable[[Any], object]] = {
        "where": lambda row: f"[{row['of'].claim.table}](experiments/{row['of'].claim.page}.md)",
        "what": lambda row: " ".join(filter(None, (row["of"].claim.words, _in_brackets(_conditions(row["of"].claim))))),
        "thesis": lambda row: row["of"].theirs,
        "ours": lambda row: row["of"].ours.text,
        "verdict": lambda row: f"**{row['of'].ours.verdict}**",
        CONTROLS[group]: lambda row: row["of"].control.text if row["of"].control else "",
        "verdict on it": lambda row: f"**{row['of'].control.verdict}**" if row["of"].control else "",
    }
    return tables.table([{"of": comparison} for comparison in comparisons()[group]], columns)


def counts(table: str | None = None, control: bool = False) -> dict[str, int]:
    """How often each verdict is given, on all or on a table: on ours as [K24] has it, or with the control if any."""
    every = [
        comparison
        for each in comparisons().values()
        for comparison in each
        if comparison.theirs and table in (None, comparison.claim.table)
    ]
    figures = [comparison.control if control else comparison.ours for comparison in every]
    return dict(Counter(figure.verdict for figure in figures if figure).most_common())


def headlines() -> str:
    """The table of README: a few claims, where ours differ in their conditions, and the control where there is one."""
    columns: dict[str, Callable[[Any], object]] = {
        "the thesis says": lambda row: row["of"].claim.headline,
        "thesis": lambda row: row["of"].theirs,
        "ours": lambda row: row["of"].ours.text,
        "verdict": lambda row: row["of"].ours.verdict,
        "conditions of ours": lambda row: row["of"].claim.conditions,
        "with a control": lambda row: row["control"],
    }
    rows = []
    for group, each in comparisons().items():
        for comparison in each:
            control = comparison.control
            words = f"{control.text} {_in_brackets(CONTROLS[group])}: {control.verdict}" if control else ""
            words = words or comparison.claim.beside
            rows += [{"of": comparison, "control": words}] if comparison.claim.headline else []
    return tables.table(rows, columns)


def _conditions(claim: Claim) -> str:
    return "; ".join(filter(None, (claim.conditions, claim.beside)))


def _in_brackets(words: str) -> str:
    return f"({words})" if words else ""


def not_run() -> list[dict[str, str]]:
    """Tables of [K24], and rows of tables that were run, with which nothing is compared."""
    compared = {(t, row) for each in comparisons().values() for comparison in each for t, row, _ in comparison.cells}
    missing = []
    for name, each in tables_of_thesis().items():
        rows = [str(row[0]) for row in each["rows"]]
        lacking = [row for row in rows if (name, row) not in compared]
        if lacking and "." not in name:  # sections have no rows of their own
            what = "all" if len(lacking) == len(rows) else f"{each['columns'][0]}: {'; '.join(lacking)}"
            missing.append({"table": name, "title": each["title"], "rows": what})
    return missing
