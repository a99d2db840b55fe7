"""Rows, columns and sentences of the claims of [K24, section 6.2.1], over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lab.experiment import Columns, Outcome, Row
from lab.results import groups
from lab.statistics import Interval, mean_interval, paired, paired_p_value, percent

__all__ = ["COLUMNS", "summarize", "verdict"]

SCHEMES = ("euler", "midpoint", "order2", "order3", "ensemble")
PASSES = {"schemes": "ensemble", "full_passes": "passes"}
"""How the ensemble is called that is made from the last block on, and that of a pass for each scheme."""


def summarize(config: Any, results: list[Row]) -> list[Row]:
    """One row per part, network and total time: means over the seeds with their 95 % intervals (%).

    Differences are paired over the seeds that have trained in both.
    """
    reported = [r for r in results if not r["tuning"]]
    rows = []
    for (part, network, total_time), group in groups(reported, "part", "network", "total_time").items():
        trained = [r for r in group if not r["diverged"]]
        row: Row = {"part": part, "network": network, "total_time": total_time, "seeds": len(group)}
        row |= {"diverged": len(group) - len(trained), "final_depths": [r["final_depth"] for r in trained]}
        row |= {name: group[0][name] for name in ("rate", "weight", "multipliers", "way", "tolerance")}
        if trained:
            row |= _row_of(trained)
            row |= _difference("", trained, _rival(reported, group[0]), lambda r: r["solution"])
            row |= _ratios(trained, _rival(reported, group[0]))
        rows.append(row)
    return rows


def _row_of(trained: Sequence[Row]) -> Row:
    """Means over the seeds of one network."""
    row: Row = {name: statistics.fmean(r[name] for r in trained) for name in ("parameters", "seconds")}
    for name in ("evaluations_per_forward", "evaluations_with_error"):
        row[name] = statistics.fmean(r[name] for r in trained)
    row["evaluations"] = statistics.fmean(map(_spent, trained))
    row["checks"] = statistics.fmean(r["check_evaluations"] for r in trained)
    for name in ("validation", "solution", "without_flow"):
        row[name] = percent(r[name] for r in trained)
    if "errors" in trained[0]:
        row["error"] = mean_interval([statistics.fmean(r["errors"]) for r in trained])
        row["relative_error"] = mean_interval([r["relative_error"] for r in trained])
    for kind, name in PASSES.items():
        if kind in trained[0]:
            row[kind] = {scheme: percent(r[kind][scheme] for r in trained) for scheme in trained[0][kind]}
            carried = trained[0]["forward"] or "order3"
            row |= _difference(
                f"{name}_",
                [r | {"solution": r[kind]["ensemble"]} for r in trained],
                [r | {"solution": r["schemes"][carried]} for r in trained],
                lambda r: r["solution"],
            )
    return row


def _rival(reported: Sequence[Row], of: Row) -> list[Row]:
    """The trainings that a network is compared with: those of its part that are the usual ones."""
    kind: dict[str, Callable[[Row], bool]] = {
        "depth": lambda r: r["way"] == "fixed" and r["solver"] == "bs23" and r["depth"] > 1,
        "orders": lambda r: r["solver"] == "euler" and r["together"] == 1,
        "action": lambda r: r["way"] == of["way"] and not r["weight"] and not r["multipliers"],
    }
    rivals = [r for r in reported if r["part"] == of["part"] and kind.get(of["part"], lambda r: False)(r)]
    usual = max(((r["depth"], -r["tolerance"]) for r in rivals), default=None)
    rivals = [r for r in rivals if (r["depth"], -r["tolerance"]) == usual and r["network"] != of["network"]]
    return [r for r in rivals if not r["diverged"]]


def _difference(name: str, ours: Sequence[Row], theirs: Sequence[Row], value: Callable[[Row], float]) -> Row:
    """Points of accuracy between trainings of the same seeds, and the p-value."""
    one, other = ({r["seed"]: 100 * value(r) for r in each} for each in (ours, theirs))
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return {}
    pairs = [one[s] for s in seeds], [other[s] for s in seeds]
    row: Row = {f"{name}difference": paired(*pairs)}
    return row | ({f"{name}p": paired_p_value(*pairs)} if len(seeds) > 1 else {})


def _ratios(ours: Sequence[Row], theirs: Sequence[Row]) -> Row:
    """Over the usual network, by seed: field evaluations, checks included; errors of the blocks where as many are."""
    if ours[0]["part"] not in ("depth", "action"):
        return {}
    values: dict[str, Callable[[Row], float]] = {"share": _spent}
    if ours[0]["part"] == "action" and ours[0]["way"] == "fixed":
        values["error_ratio"] = lambda r: statistics.fmean(r["errors"])
    row: Row = {}
    for name, value in values.items():
        one, other = ({r["seed"]: value(r) for r in each} for each in (ours, theirs))
        ratios = [one[s] / other[s] for s in one if s in other]
        row |= {name: mean_interval(ratios)} if ratios else {}
    return row


def _spent(result: Row) -> int:
    return result["training_evaluations"] + result["check_evaluations"]


def _scheme(kind: str, name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[kind][name].mean:.2f}"


COLUMNS: Columns = {
    "part": "{part}",
    "network": "{network}",
    "T": "{total_time:g}",
    "diverged": "{diverged} of {seeds}",
    "blocks": lambda row: " ".join(map(str, row["final_depths"])),
    "lr": "{rate:g}",
    "test accuracy (%)": "{solution:.2f}",
    "difference": "{difference:.2f}",
    "p": "{p:.2g}",
    "without flow": "{without_flow.mean:.2f}",
    **{name: _scheme("schemes", name) for name in SCHEMES},
    "ensemble - carried": "{ensemble_difference:.2f}",
    **{f"pass {name}": _scheme("full_passes", name) for name in SCHEMES},
    "ensemble of passes - carried": "{passes_difference:.2f}",
    "error": "{error.mean:.2g}",
    "of the usual one's": "{error_ratio:.2f}",
    "over displacement": "{relative_error.mean:.2g}",
    "parameters": "{parameters:,.0f}",
    "evals/forward": "{evaluations_per_forward:.1f}",
    "with errors": "{evaluations_with_error:.1f}",
    "training evals": lambda row: f"{row['evaluations'] / 1e3:,.0f} k",
    "of the usual evals": "{share:.2f}",
    "seconds": "{seconds:.1f}",
}


def verdict(config: Any, outcome: Outcome) -> list[str]:
    """What the table says of the claims, in sentences."""
    lines = []
    for part in config.parts:
        lines += _SENTENCES[part](config, [row for row in outcome.rows if row["part"] == part])
    return lines


def _words(difference: Interval) -> str:
    return f"{('no difference', 'better', 'worse')[difference.sign]} ({difference:.2f} points)"


def _of_depth(config: Any, rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["way"] != "fixed" and "difference" in row:
            lines.append(
                f"{row['network']}: {_words(row['difference'])} beside the deepest fixed network, training evaluations "
                f"with checks {row['share']:.2f} of its"
            )
    grown = next(row for row in rows if row["network"] == "adaptive from 1")
    return [*lines, f"adaptive from 1: ends at {' '.join(map(str, grown['final_depths']))} blocks"]


def _of_long(config: Any, rows: Sequence[Row]) -> list[str]:
    return [f"T = {r['total_time']:g}, {r['network']}: diverged {r['diverged']} of {r['seeds']}" for r in rows]


def _of_orders(config: Any, rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "difference" in row:
            lines.append(f"{row['network']}: {_words(row['difference'])} beside Euler blocks of as many evaluations")
    for row in rows:
        if "ensemble_difference" in row:
            lines.append(
                f"{row['network']}, ensemble less what it carries on: {_words(row['ensemble_difference'])} in one "
                f"pass, {_words(row['passes_difference'])} by a pass for each scheme"
            )
    return lines


def _of_action(config: Any, rows: Sequence[Row]) -> list[str]:
    """Of each weight, and which is chosen: the largest at which validation loses at most half a point."""
    lines = []
    for row in rows:
        if "difference" in row:
            blocks = f"blocks {' '.join(map(str, row['final_depths']))}, evaluations {row['share']:.2f}"
            what = f"errors {row['error_ratio']:.2f}" if "error_ratio" in row else blocks
            lines.append(f"{row['network']}: {what} of the plain network's, {_words(row['difference'])}")
    adaptive = [row for row in rows if row["way"] == "adaptive" and not row["multipliers"] and "validation" in row]
    plain = min(adaptive, key=lambda row: (row["weight"], row["tolerance"]), default=None)
    if plain is not None and not plain["weight"]:
        near = [r for r in adaptive if r["weight"] and r["validation"].mean >= plain["validation"].mean - 0.5]
        chosen = max(near, key=lambda row: row["weight"], default={"network": "none"})
        lines.append(f"chosen on validation, as the largest that loses at most 0.5 points there: {chosen['network']}")
    return lines


_SENTENCES: dict[str, Callable[[Any, Sequence[Row]], list[str]]] = {
    "depth": _of_depth,
    "long": _of_long,
    "orders": _of_orders,
    "action": _of_action,
}
