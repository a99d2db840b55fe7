"""What the neural-ODE experiment found: rows, table, sentences."""

from __future__ import annotations

import statistics
from typing import Any

from lab.statistics import mean_interval


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way and objective: means over the seeds, accuracy with its 95 % interval, median time of epochs."""
    rows = []
    for way, action in dict.fromkeys((r["way"], r["action"]) for r in results):
        group = [r for r in results if (r["way"], r["action"]) == (way, action)]
        row: dict[str, Any] = {"way": way, "action": action, "parameters": group[0]["parameters"]}
        row["test"] = mean_interval([r["test"] for r in group])
        for name in ("forward", "backward", "peak_memory", "state_error", "action_error", "action_value"):
            row[name] = statistics.fmean(r[name] for r in group)
        row["epoch_seconds"] = statistics.median(r["epoch_seconds"] for r in group)
        row["cost"] = {name: statistics.fmean(r["cost"][name] for r in group) for name in group[0]["cost"]}
        rows.append(row)
    return rows


COLUMNS: dict[str, Any] = {
    "solved by": "{way}",
    "objective": lambda row: "+ action" if row["action"] else "",
    "test accuracy (%)": lambda row: f"{100 * row['test']:.2f}",
    "evals forward": "{forward:.1f}",
    "evals backward": "{backward:.1f}",
    "s/epoch": "{epoch_seconds:.2f}",
    "peak MB": lambda row: f"{row['peak_memory'] / 1e6:.1f}",
    "action costs evals": lambda row: f"{100 * row['cost']['evaluations']:+.0f} %",
    "and time": lambda row: f"{100 * row['cost']['seconds']:+.0f} %",
    "action": "{action_value:.3f}",
    "its error": lambda row: f"{100 * row['action_error']:.1g} %",
    "state error (tolerances)": "{state_error:.2f}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: flows beside torchdiffeq with the same method, and what the action costs."""
    found = {(row["way"], row["action"]): row for row in rows}
    names = {"bosh3": "bs23", "dopri5": "dopri5"}
    lines = []
    for (way, action), theirs in found.items():
        who, method = way.split()
        ours = found.get((f"flow {names.get(method)}", action))
        if who == "flow" or ours is None:
            continue
        share = {name: 100 * ours[name] / theirs[name] for name in ("epoch_seconds", "peak_memory")}
        calls = [row["forward"] + row["backward"] for row in (ours, theirs)]
        meet = "the intervals meet" if ours["test"].meets(theirs["test"]) else "the intervals do not meet"
        meet = "one seed, no interval" if ours["test"].n == 1 else meet
        lines.append(
            f"{ours['way']} beside {way}{', with the action' * action}: {100 * calls[0] / calls[1]:.0f} % of its "
            f"evaluations, {share['epoch_seconds']:.0f} % of its time, {share['peak_memory']:.0f} % of its memory; "
            f"accuracy {100 * ours['test']:.2f} beside {100 * theirs['test']:.2f} %, {meet}"
        )
    for way in dict.fromkeys(row["way"] for row in rows):
        costs = [row["cost"] for row in rows if row["way"] == way]
        evaluations = [f"{100 * cost['evaluations']:+.0f} %" for cost in costs]
        seconds = [f"{100 * cost['seconds']:+.0f} %" for cost in costs]
        lines.append(
            f"the action costs {way} {' and '.join(evaluations)} evaluations, {' and '.join(seconds)} time "
            "(on networks trained without and with it)"
        )
    return lines
