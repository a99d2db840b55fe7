"""What the detection experiment reports: rows, tables, sentences, figures."""

from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detection_setup import TRAJECTORY, Config
from matplotlib.figure import Figure

from lab.experiment import Columns, Figures, Outcome, Row
from lab.results import groups
from lab.statistics import Interval, mean_interval, paired, paired_p_value, percent
from lab.thesis import thesis
from odenets import plotting
from odenets.detection import FALSE_POSITIVE_RATES

MEASURES = ("accuracy", "auroc", "fpr95", "detected", "detected_successful", "false_positives")
COLUMNS: Columns = {
    "network": "{method}",
    "seen": lambda row: Path(row["seen"]).stem,
    "tested": lambda row: Path(row["tested"]).stem,
    "features": "{kind}",
    "AUROC": "{auroc:.1f}",
    "- trajectory": "{difference:.1f}",
    "p": "{p:.2g}",
    "accuracy": "{accuracy:.1f}",
    "thesis (ResNet-110)": "{thesis:g}",
    "FPR at 95 % TPR": "{fpr95:.1f}",
    "detected": "{detected:.1f}",
    "of successful": "{detected_successful:.1f}",
    "thesis: of successful": "{thesis_successful:g}",
    "false positives": "{false_positives:.1f}",
    "of noisy": "{noisy_false_positives:.1f}",
}
ADAPTIVE_COLUMNS: Columns = {
    "network": "{method}",
    "attack": "{attack}",
    "detected before (%)": "{detected_before:.1f}",
    "evade": "{evading} of {starts}",
    "evaded (%)": "{evaded:.1f}",
    "thesis (ResNet-110)": "{thesis:g}",
    "L2 distance": "{l2.mean:.2f}",
}
TIMING_COLUMNS = {"": "{what}", "ms per image": "{milliseconds:.3f}", "over a forward pass": "{over_forward:.2f}"}
TABLES = {"seen": "12", "unseen": "13", "ood": "14"}
"""Of [K24], by network and features: accuracy (%) of ResNet-110 on CIFAR-10, with attacks whose images were clipped
before normalization, parts that overlapped, and the best of several detectors on test."""


def columns(config: Config) -> Columns:
    """Of the table of a setting."""
    return {"adaptive": ADAPTIVE_COLUMNS, "timing": TIMING_COLUMNS}.get(config.setting, COLUMNS)


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """The rows of a setting, means over seeds."""
    if config.setting == "timing":
        return timing_rows(results)
    rows_of = adaptive_rows if config.setting == "adaptive" else comparison_rows
    return [row for (method,), of in groups(results, "method").items() for row in rows_of(config, method, of)]


def by_comparison(of: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Scores of all seeds by what is seen and tested and by kind of features, that of the trajectory first."""
    return groups((scores for r in of for scores in r["scores"]), "seen", "tested", "kind")


def fooled_by(of: list[Row]) -> dict[str, Interval]:
    """By attack how much of what was right it fools (%)."""
    attacks = groups((attack for r in of for attack in r["attacks"]), "attack")
    return {name: percent(attack["success"] for attack in each) for (name,), each in attacks.items()}


def comparison_rows(config: Config, method: str, of: list[Row]) -> list[Row]:
    """One row per what was seen and tested, and kind of features.

    Differences in the area under the curve are to the trajectory of the same networks, paired.
    """
    rows: list[Row] = []
    fooled = fooled_by(of)
    trajectory: dict[tuple[str, str], tuple[float, ...]] = {}
    for (seen, tested, kind), scores in by_comparison(of).items():
        row: Row = {"method": method, "seen": seen, "tested": tested, "kind": kind}
        for name in MEASURES:
            values = [s[name] for s in scores if not math.isnan(s[name])]
            row[name] = percent(values) if values else None
        if config.noisy:
            row["noisy_false_positives"] = percent(s["noisy_false_positives"] for s in scores)
        if set(config.modes) - {"general"}:
            row["over_general"] = percent(s["auroc"] - s["general_auroc"] for s in scores)
        aurocs = row["auroc"].values
        if kind == TRAJECTORY:  # of the networks, not of what is seen of them
            trajectory[seen, tested] = aurocs
            row["network_accuracy"] = percent(r["accuracy"] for r in of)
            row |= {"fooled": fooled[tested]} if tested in fooled else {}
        else:
            other = trajectory[seen, tested]
            row |= {"difference": paired(aurocs, other), "p": paired_p_value(aurocs, other)}
        rows.append(row | (_of_thesis(config, row) if config.dataset == "cifar10" else {}))
    return rows


def _of_thesis(config: Config, row: Row) -> Row:
    """Accuracy of ResNet-110 in [K24]; where foreign images are told from clean ones, of those seen alone."""
    tested, beside = Path(row["tested"]).stem, {}
    if config.setting != "ood" or row["seen"] == row["tested"]:
        beside["thesis"] = thesis(TABLES[config.setting], f"{row['method']}, {row['kind']}", tested)
    if config.setting == "seen" and row["kind"] == TRAJECTORY:
        beside["thesis_successful"] = thesis("38", row["method"], tested)
    return beside


def adaptive_rows(config: Config, method: str, of: list[Row]) -> list[Row]:
    """Of what the detector knows, the share that attacks turn into images which fool network and detector."""
    rows: list[Row] = []
    for attack in dict.fromkeys(name for r in of for name in r["evaded"]):
        begun = [r for r in of if attack in r["evaded"]]
        row: Row = {"method": method, "attack": attack}
        row["detected_before"] = percent(r["detected_successful"] for r in of)
        row["starts"] = sum(r["starts"] for r in begun)
        row["evading"] = sum(round(r["evaded"][attack] * r["starts"]) for r in begun)
        row["evaded"] = percent(r["evaded"][attack] for r in begun)
        row["l2"] = mean_interval([r["l2"][attack] for r in begun])
        rows.append(row | ({"thesis": thesis("5.4.5", method, attack)} if config.dataset == "cifar10" else {}))
    return rows


def timing_rows(results: list[Row]) -> list[Row]:
    """Median milliseconds per image of each kind of features, and over those of a forward pass."""
    names = list(results[0]["seconds"])
    medians = {name: statistics.median(t / r["images"] for r in results for t in r["seconds"][name]) for name in names}
    forward = medians["forward pass"]
    return [{"what": name, "milliseconds": 1e3 * t, "over_forward": t / forward} for name, t in medians.items()]


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    if config.setting == "timing":
        t = {row["what"]: row["milliseconds"] for row in outcome.rows}
        ratio = (t["Mahalanobis"] + t["Mahalanobis, statistics"]) / t[TRAJECTORY]
        words = f"Mahalanobis with its statistics takes {ratio:.1f} times the trajectory's time"
        return [words + " (thesis: 145 s / 66 s = 2.2)"]
    if config.setting == "adaptive":
        return [
            f"{r['method']}, {r['attack']}: {r['evading']} of {r['starts']} detected successful images evade; "
            f"{r['detected_before'].mean * (1 - r['evaded'].mean / 100):.1f} % of the successful ones are still "
            "detected"
            for r in outcome.rows
        ]
    lines = []
    rows = groups(outcome.rows, "method", "kind")
    aurocs = {key: _over_comparisons(of, "auroc") for key, of in rows.items()}

    def points(one: list[float], other: list[float]) -> str:
        p = paired_p_value(one, other)
        return f"{paired(one, other):.1f} points of AUROC over all comparisons, p = {p:.2g}"

    for method, fooled in outcome.detail("fooled").items():
        plain, *others = (kind for of, kind in rows if of == method)
        lines.append(f"{method}: accuracy {rows[method, plain][0]['network_accuracy']:.1f} % on the pool")
        lines += [f"{method}: {attack} fools {rate:.1f} % of what was right" for attack, rate in fooled.items()]
        for kind in others:
            one, other = aurocs[method, kind], aurocs[method, plain]
            what = ("as", "better than", "worse than")[paired(one, other).sign]
            lines.append(f"{method}: {kind} detect {what} the trajectory, {points(one, other)}")
        for kind in (plain, *others) if set(config.modes) - {"general"} else ():
            gain = mean_interval(_over_comparisons(rows[method, kind], "over_general"))
            lines.append(f"{method}: the modes chosen give {kind} {gain:.1f} points of AUROC over the general detector")
    first, *more = config.methods
    return lines + [
        f"trajectory: {method} over {first} {points(aurocs[method, TRAJECTORY], aurocs[first, TRAJECTORY])}"
        for method in more
    ]


def _over_comparisons(rows: list[Row], name: str) -> list[float]:
    """Per seed the mean over all comparisons."""
    return [statistics.fmean(values) for values in zip(*(row[name].values for row in rows), strict=True)]


def details(config: Config, results: list[Row]) -> dict[str, Any]:
    """By method what attacks fool, and receiver operating characteristics by comparison and kind of features."""
    if config.setting in ("adaptive", "timing"):
        return {}
    of_methods = {method: of for (method,), of in groups(results, "method").items()}
    curves: dict[str, Any] = {method: {} for method in of_methods}
    for method, of in of_methods.items():
        for (seen, tested, kind), scores in by_comparison(of).items():
            title = Path(tested).stem if seen == tested else f"{Path(tested).stem}, fitted on {Path(seen).stem}"
            mean = np.mean([s["curve"] for s in scores], 0).round(4)
            curves[method].setdefault(title, {})[kind] = mean.tolist()
    return {"fooled": {method: fooled_by(of) for method, of in of_methods.items()}, "curves": curves}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Receiver operating characteristics averaged over the seeds, a figure per method and a panel per comparison."""

    def draw(method: str) -> Figure:
        return plotting.operating_characteristics(outcome.detail("curves")[method], FALSE_POSITIVE_RATES)

    methods = () if config.setting in ("adaptive", "timing") else config.methods
    return {method.replace(" ", "_"): partial(draw, method) for method in methods}
