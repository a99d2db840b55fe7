"""What the study of foreign images reports: rows, table, sentences, a figure."""

from __future__ import annotations

from functools import partial
from typing import Any

from ood_scores import COVERAGE, LAST, PATH
from ood_setup import NEAR, Config

from lab import plotting
from lab.experiment import Columns, Figures, Outcome, Row
from lab.results import groups
from lab.statistics import paired, paired_p_value, percent

__all__ = ["BEST", "COLUMNS", "JOINED", "figures", "summarize", "verdict"]

BEST, JOINED = "best of the last layer", "joined"
COLUMNS: Columns = {
    "foreign images": "{images}",
    "score": "{score}",
    "AUROC": "{auroc:.2f}",
    "FPR at 95 % TPR": "{fpr95:.2f}",
    f"- {BEST}": "{difference:.2f}",
    "p": "{p:.2g}",
    "chosen": "{chosen}",
}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per foreign set and score, means over the splits in percent; "far" is the mean over the far sets.

    Differences are to what is the best score of the last layer where it is chosen, on the same splits, paired.
    """
    rows: list[Row] = []
    scores = groups((score for r in results for score in r.get("scores", ())), "images")
    first = [key for key in ((NEAR,), ("far",)) if key in scores]
    for (name,), of_all in {key: scores[key] for key in (*first, *scores)}.items():
        by_score = groups(of_all, "score")
        best = percent(score["auroc"] for score in by_score[BEST,])
        for (score,), of in by_score.items():
            row: Row = {"images": name, "score": score}
            row |= {key: percent(each[key] for each in of) for key in ("auroc", "fpr95")}
            variants = [each["variant"] for each in of if each["variant"]]
            counts = {variant: variants.count(variant) for variant in dict.fromkeys(variants)}
            row["chosen"] = "; ".join(f"{v} ({n})" for v, n in counts.items()) or None
            if score != BEST and best.n > 1:
                row["difference"] = paired(row["auroc"].values, best.values)
                row["p"] = paired_p_value(row["auroc"].values, best.values)
            rows.append(row)
    return rows


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the trajectory tells alone, and what it adds to the best score of the last layer."""
    lines = []
    for (name,), rows in groups(outcome.rows, "images").items():
        by = {row["score"]: row for row in rows}
        gain = by[JOINED].get("difference")
        lines.append(
            f"{name}: the trajectory alone {by[PATH]['auroc']:.2f}, the best of the last layer {by[BEST]['auroc']:.2f} "
            f"({by[BEST]['chosen']}), joined {by[JOINED]['auroc']:.2f}"
            + (f", {gain:.2f} points: it {('adds nothing', 'adds', 'takes away')[gain.sign]}" if gain else "")
        )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Areas under the curve of all scores, near and far."""
    series: dict[str, dict[str, Any]] = {}
    for row in outcome.rows:
        if row["images"] in (NEAR, "far") and row["score"] in (*LAST, COVERAGE, PATH, JOINED):
            series.setdefault(row["images"], {})[row["score"]] = row["auroc"]
    return {"auroc": partial(plotting.categories, series, xlabel="area under the curve (%)")}
