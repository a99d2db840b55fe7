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

from odenets.command.speed.table import ratio_table

__all__ = ["memory_table", "network_table", "reduction_table", "step_table"]

Info = dict[str, Any]


def memory_table(rows: list[Info]) -> str:
    """Bytes of ten steps of bs23 over those of their thirty field calls."""
    lines = []
    for row in rows:
        left, peak = (row[f"solve {what}"] / row[f"calls {what}"] for what in ("left", "peak"))
        size = f"{row['calls peak'] / 2**20:.1f}"
        lines.append([row["device"], row["field"], row["who"], size, f"{left:.2f}", f"{peak:.2f}"])
    return _table(lines, ["", "field", "bs23, 10 steps", "calls (MiB)", "left by forward", "peak with backward"])


def reduction_table(rows: list[Info]) -> str:
    """Median milliseconds of each operation, and its bandwidth over that of its floor, a plain sum or a copy."""
    peers = list(dict.fromkeys(row["who"] for row in rows))

    def key(row: Info) -> tuple[str, str, str, str, int]:
        passes = "forward + backward" if row["backward"] else "forward"
        return row["device"], row["operation"], row["size"], passes, row["threads"]

    def cell(row: Info) -> str:
        fraction = row["bytes"] / row["floor_bytes"] / row["ratio"]
        return f"{1e3 * row['ratio'] * row['floor']:.2f} ({fraction:.2f})"

    lines = []
    for (*names, threads), group in groupby(sorted(rows, key=key), key):
        found = {row["who"]: row for row in group}
        one = min(found.values(), key=lambda row: row["floor"])
        speed = f"{one['floor_bytes'] / one['floor'] / 1e9:.0f}"
        cells = [cell(found[who]) if who in found else "" for who in peers]
        lines.append([*names, str(threads), f"{one['bytes'] / 1e6:.0f}", speed, *cells])
    return _table(lines, ["", "operation", "size", "", "threads", "MB moved", "floor (GB/s)", *peers])


def network_table(rows: list[Info]) -> str:
    """Time of a network with a measure over the time of the same without."""
    lines = [
        [row["device"], row["operation"], row["size"], f"{1e3 * row['floor']:.1f}", f"{row['ratio']:.3f}"]
        for row in rows
    ]
    return _table(lines, ["", "ResNet-9", "", "without (ms)", "with / without"])


def step_table(rows: list[Info]) -> str:
    """Time of a training step in modules over that of another way to take it, by the number of modules."""

    def key(row: Info) -> tuple[str, str, str, str]:
        return row["device"], row["step"], row["who"], row["over"]

    counts = sorted({row["K"] for row in rows})
    lines = []
    for (device, network, who, over), group in groupby(sorted(rows, key=key), key):
        found = {row["K"]: f"{row['ratio']:.3f}" for row in group}
        lines.append([device, network, f"{who} / {over}", *(found.get(K, "") for K in counts)])
    return _table(lines, ["", "", "time", *(f"K = {K}" for K in counts)])


def adapted_table(rows: list[Info]) -> str:
    """Time of a model's features, or of the search for its steps, in its forward passes."""
    lines = [
        [row["device"], row["adapted"], row["what"], f"{1e3 * row['floor']:.1f}", f"{row['ratio']:.3f}"] for row in rows
    ]
    return _table(lines, ["", "model", "", "forward pass (ms)", "in forward passes"])


def _table(lines: list[list[str]], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main(path: str) -> None:
    """Print the tables and where they were measured."""
    rows = [benchmark["extra_info"] for benchmark in json.loads(Path(path).read_text())["benchmarks"]]
    if reduced := [row for row in rows if "reduction" in row]:
        print(
            "Milliseconds, and in brackets bandwidth over that of the floor, medians of interleaved rounds. "
            "The floor is a plain sum of the operands for a reduction on a CPU, a copy of the bytes for all else.\n"
        )
        print(reduction_table(reduced) + "\n")
    if measured := [row for row in rows if "measured_network" in row]:
        print(network_table(measured) + "\n")
    if steps := [row for row in rows if "step" in row]:
        print(step_table(steps) + "\n")
    if adapted := [row for row in rows if "adapted" in row]:
        print(adapted_table(adapted) + "\n")
    others = {"reduction", "measured_network", "step", "adapted"}
    if timed := [row for row in rows if "ratio" in row and not others & set(row)]:
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
