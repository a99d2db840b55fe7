"""The tables of what was measured on a GPU."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tabulate import tabulate

__all__ = ["tables"]

Rows = list[dict[str, Any]]


def tables(measured: dict[str, Any]) -> str:
    """All of them."""
    measured = measured | {"kernels": [*measured.get("kernels", ()), *measured.get("compiled", ())[3:]]}
    made = {"kernels": kernels, "solves": solves, "waiting": waiting, "graphs": graphs, "trainings": trainings}
    return "\n\n".join(make(measured[name]) for name, make in made.items() if measured.get(name))


def kernels(rows: Rows) -> str:
    """Microseconds of the device, in brackets the time of a copy of as many bytes over it; a copy's in the first."""
    people = [
        who for who in ("this package", "operators", "plain", "compiled") if any(r.get("who") == who for r in rows)
    ]
    lines = [
        [f"copy, {row['size']}", "", f"{row['bytes'] / 1e6:.0f}", f"{1e6 * row['seconds']:.0f}"]
        for row in rows
        if row["operation"] == "copy"
    ]
    others = sorted((row for row in rows if row["operation"] != "copy"), key=_place)
    for (name, size, backward), group in groupby(others, lambda row: (row["operation"], row["size"], row["backward"])):
        by = {row["who"]: row for row in group}
        cells = [f"{1e6 * by[who]['seconds']:.0f} ({by[who]['of a copy']:.2f})" if who in by else "" for who in people]
        one = next(iter(by.values()))
        peaks = ", ".join(f"{by[who]['peak'] / 2**20:.0f}" for who in people if who in by)
        passes = "forward + backward" if backward else "forward"
        lines.append([f"{name}, {size}", passes, f"{one['bytes'] / 1e6:.0f}", *cells, peaks])
    return _table(lines, ["", "", "MB moved", *people, "peaks (MiB)"])


def _place(row: dict[str, Any]) -> tuple[str, int, bool]:
    return row["operation"], row["bytes"] // (1 + row["backward"]), row["backward"]


def solves(rows: Rows) -> str:
    """Time of a solve over that of its field calls; calls in brackets."""
    people = list(dict.fromkeys(row["who"] for row in rows))
    lines = []
    for (field, backward, method), group in groupby(rows, lambda row: (row["field"], row["backward"], row["method"])):
        by = {row["who"]: row for row in group}
        call = min(row["floor"] / row["evaluations"] for row in by.values())
        cells = [f"{by[who]['ratio']:.2f} ({by[who]['evaluations']})" if who in by else "" for who in people]
        passes = "forward + backward" if backward else "forward"
        lines.append([field, passes, method, f"{1e6 * call:.0f}", *cells])
    return _table(lines, ["field", "", "method", "one call (µs)", *people])


def waiting(rows: Rows) -> str:
    """Waits for the device and launches beside those of the field."""
    lines = [
        [
            row["field"], row["method"], row["who"], row["evaluations"], row["waits"],
            f"{row['launches'] - row['of the field']}", f"{row['of the field']}",
        ]
        for row in rows
    ]  # fmt: skip
    return _table(lines, ["field", "method", "", "field calls", "waits", "launches beside the field's", "the field's"])


def graphs(rows: Rows) -> str:
    """Ten steps of bs23 over thirty eager field calls."""
    lines = [[row["field"], row["who"], f"{1e6 * row['seconds']:.0f}", f"{row['ratio']:.2f}"] for row in rows]
    return _table(lines, ["field", "bs23, 10 steps", "µs", "over 30 field calls"])


def trainings(rows: Rows) -> str:
    """Seconds of an epoch, the best after the first."""
    lines = [
        [
            row["network"], row["precision"], row["who"], f"{min(row['seconds'][1:]):.2f}",
            f"{row['images a second']:.0f}", f"{row.get('peak', 0) / 2**20:.0f}", f"{100 * row['accuracy']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["network", "precision", "loop", "s an epoch", "images a second", "peak (MiB)", "test accuracy (%)"]
    return _table(lines, head)


def _table(lines: list[list[Any]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)
