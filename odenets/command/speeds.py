"""``odenets bench``: the speed table of this machine."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import typer

import odenets
from odenets.command.devices import chosen, name_of, system
from odenets.command.mistakes import Mistake
from odenets.command.speed.fields import FIELDS
from odenets.command.speed.solves import ATOL, PEERS, ROWS, RTOL, STEPS, missing_peers
from odenets.command.speed.table import ratio_table
from odenets.command.speed.timing import cases, measure

__all__ = ["show"]

QUICK = ("euler", "bosh3", "dopri5")
SECONDS, QUICK_SECONDS = 120.0, 15.0
WIDTH = 32
"""Letters of a line of the progress."""


def show(seconds: float | None, *, quick: bool, device: str, threads: int, backward: bool, as_json: bool) -> None:
    """Measure for about so many seconds, and print the table.

    Raises:
        Mistake: a device that is not here, or seconds that are not finite.
    """
    place, before = chosen(device), torch.get_num_threads()
    names, methods = (FIELDS[:1], QUICK) if quick else (FIELDS, tuple(ROWS))
    alone = place.type == "cpu" and threads == 1
    seconds = seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS
    if not math.isfinite(seconds):
        raise Mistake(f"--seconds must be finite, got {seconds}")
    try:
        torch.set_num_threads(threads)
        measured = cases(names, methods, place, backward)
        measure(measured, seconds, clock=time.process_time if alone else time.perf_counter, tell=_tell)
    finally:
        torch.set_num_threads(before)
        _clear()
    rows = [case.row for case in measured]
    machine = _machine(place, threads) | {"clock": "processor time" if alone else "wall time"}
    facts = {"machine": machine, "backward": backward, "missing": missing_peers(), "rows": rows}
    typer.echo(json.dumps(facts, indent=1) if as_json else _text(facts))


def _machine(device: torch.device, threads: int) -> dict[str, Any]:
    versions = {"odenets": odenets.__version__, "torch": torch.__version__}
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": name_of(device), "kind": str(device), "threads": threads, "versions": versions,
        "python": platform.python_version(), "system": system(),
    }  # fmt: skip


def _text(facts: dict[str, Any]) -> str:
    machine, rows = facts["machine"], facts["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['clock'].capitalize()} of a solve{' with its backward pass' if facts['backward'] else ''} over that "
        f"of its field calls alone: medians of {min(row['rounds'] for row in rows)} interleaved rounds [quartiles] "
        f"(field calls). {STEPS} steps, or rtol {RTOL:g} and atol {ATOL:g} for bosh3 and dopri5.",
        "",
        ratio_table(rows, ("field", "method")),
        "",
        f"{machine['device']}, {machine['kind']}, threads of torch: {machine['threads']}; Python {machine['python']}, "
        f"{versions}; {machine['system']}",
    ]
    for name, line in facts["missing"].items():
        lines.append(f"{name} is not installed: {line}")
    return "\n".join(lines)


def _tell(count: int, left: float) -> None:
    """In a terminal, how long it takes still."""
    if sys.stderr.isatty():
        typer.echo(f"\r{f'round {count}, {left:.0f} s left':{WIDTH}}", err=True, nl=False)


def _clear() -> None:
    """In a terminal, an empty line where that stood."""
    if sys.stderr.isatty():
        typer.echo(f"\r{'':{WIDTH}}\r", err=True, nl=False)
