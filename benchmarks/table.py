"""The tables of a saved benchmark run.

python -m benchmarks.table FILE.json
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.solves import COLUMNS

__all__ = ["memory_table", "ratio_table", "reduction_table"]

Info = dict[str, Any]


def ratio_table(rows: list[Info]) -> str:
    """Median time of a solve over that of its field calls, by field, passes and method; field calls in brackets."""

    def key(row: Info) -> tuple[str, str, str, str]:
        return row["device"], row["field"], "forward + backward" if row["backward"] else "forward", row["method"]

    lines = []
    for (device, field, passes, method), group in groupby(rows, key):
        found = {row["who"]: row for row in group}
        cells = [f"{found[who]['ratio']:.2f} ({found[who]['evaluations']})" if who in found else "" for who in COLUMNS]
        call = min(row["floor"] / row["evaluations"] for row in found.values())
        lines.append([device, field, passes, method, f"{1e6 * call:.0f}", *cells])
    return _table(lines, ["", "field", "", "method", "one call (µs)", *COLUMNS])


def memory_table(rows: list[Info]) -> str:
    """Bytes of ten steps of bs23 over those of their thirty field calls."""
    lines = []
    for row in rows:
        left, peak = (row[f"solve {what}"] / row[f"calls {what}"] for what in ("left", "peak"))
        size = f"{row['calls peak'] / 2**20:.1f}"
        lines.append([row["device"], row["field"], row["who"], size, f"{left:.2f}", f"{peak:.2f}"])
    return _table(lines, ["", "field", "bs23, 10 steps", "calls (MiB)", "left by forward", "peak with backward"])


def reduction_table(rows: list[Info]) -> str:
    """Median time over that of plain sums of as many operands, by operation, size, passes and threads."""
    peers = list(dict.fromkeys(row["who"] for row in rows))

    def key(row: Info) -> tuple[str, str, str, str, int]:
        passes = "forward + backward" if row["backward"] else "forward"
        return row["device"], row["operation"], row["size"], passes, row["threads"]

    lines = []
    for (*names, threads), group in groupby(sorted(rows, key=key), key):
        found = {row["who"]: row for row in group}
        cells = [f"{found[who]['ratio']:.2f}" if who in found else "" for who in peers]
        lines.append([*names, str(threads), f"{1e3 * min(row['floor'] for row in found.values()):.2f}", *cells])
    return _table(lines, ["", "operation", "size", "", "threads", "sums (ms)", *peers])


def _table(lines: list[list[str]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main(path: str) -> None:
    """Print the tables and where they were measured."""
    rows = [benchmark["extra_info"] for benchmark in json.loads(Path(path).read_text())["benchmarks"]]
    if reduced := [row for row in rows if "reduction" in row]:
        print("Time over the time of plain sums of the operands, medians of interleaved rounds.\n")
        print(reduction_table(reduced) + "\n")
    if timed := [row for row in rows if "ratio" in row and "reduction" not in row]:
        print("Time over the time of the field calls alone (how many), medians of interleaved rounds, one thread.\n")
        print(ratio_table(timed) + "\n")
    if remembered := [row for row in rows if "memory" in row]:
        print("Memory over that of the field calls alone, the graph for the backward pass included.\n")
        print(memory_table(remembered) + "\n")
    machine = rows[0]["machine"]
    commit = f"commit {machine['commit']}" + (", modified" if machine["modified"] else "")
    print(f"{machine['device']}, torch {machine['versions']['torch']}, {commit}")


if __name__ == "__main__":
    main(sys.argv[1])
