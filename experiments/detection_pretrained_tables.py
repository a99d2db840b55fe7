"""What the study of detection on trained networks reports: rows, table, sentences, a figure."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from detection_pretrained_detectors import FIRST
from detection_pretrained_setup import Config

from lab import plotting
from lab.experiment import Columns, Figures, Outcome, Row
from lab.results import groups
from lab.statistics import mean_interval, paired, paired_p_value

__all__ = ["AREAS", "COLUMNS", "MEANS", "best_rival", "details", "figures", "summarize", "verdict"]

AREAS = ("auroc", "noise_auroc")
"""Of the scores of :func:`detection_pretrained_detectors.compare`, those whose intervals are reported."""
MEANS = (
    "auroc_successful", "auroc_noise", "auroc_exchanged", "detected", "detected_successful", "false_positives",
    "noise_detected", "exchanged_detected",
)  # fmt: skip
"""And those whose means are."""
OWN = ("eq. 34", "separation")
"""How the names of detectors by trajectories begin."""
COLUMNS: Columns = {
    "noise counts as clean": "{noisy}",
    "fitted on": "{seen}",
    "tested on": "{tested}",
    "detector": "{detector}",
    "AUROC": "{auroc:.1f}",
    f"- {FIRST}": "{difference:.1f}",
    "p": "{p:.2g}",
    "of successful": "{auroc_successful:.1f}",
    "against noise": "{auroc_noise:.1f}",
    "against exchanged": "{auroc_exchanged:.1f}",
    "noise against clean": "{noise_auroc:.1f}",
    "detected": "{detected:.1f}",
    "successful detected": "{detected_successful:.1f}",
    "false positives": "{false_positives:.1f}",
    "noise detected": "{noise_detected:.1f}",
    "exchanged detected": "{exchanged_detected:.1f}",
}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per what noise counts as, what was seen and tested, and detector: means over the splits, in percent.

    Differences in the area under the curve are to the first detector on the same splits, paired. With noise left out,
    detectors are tested on what they were fitted on alone.
    """
    scores = groups((score for r in results if "scores" in r for score in r["scores"]), "noisy", "seen", "tested")
    rows: list[Row] = []
    for (noisy, seen, tested), of_all in scores.items():
        if seen != tested and not noisy:
            continue
        first: tuple[float, ...] = ()
        for (detector,), of in groups(of_all, "detector").items():
            row: Row = {"noisy": noisy, "seen": seen, "tested": tested, "detector": detector}
            for name in (*AREAS, *MEANS):
                values = [round(100 * score[name], 2) for score in of if not math.isnan(score[name])]
                mean = mean_interval(values) if values else None
                row[name] = mean if mean is None or name in AREAS else round(mean.mean, 2)
            if detector == FIRST:
                first = row["auroc"].values
            elif len(first) > 1:
                row["difference"] = paired(row["auroc"].values, first)
                row["p"] = paired_p_value(row["auroc"].values, first)
            rows.append(row)
    return rows


def best_rival(rows: list[Row]) -> Row:
    """Of one comparison the row of the detector without the trajectory that has the largest area under the curve."""
    return max((row for row in rows if not row["detector"].startswith(OWN)), key=lambda row: row["auroc"].mean)


def details(config: Config, results: list[Row]) -> dict[str, Any]:
    """What the attacks do, those that know of a detector too, and how often what was chosen."""
    of_job = ("tuning", "attack", "features")
    attacks = [{k: v for k, v in r.items() if k not in (*of_job, "adaptive", "eps")} for r in results if "set" in r]
    adaptive = [{k: v for k, v in r.items() if k not in of_job} for r in results if "starts" in r]
    chosen: dict[str, dict[str, int]] = {}
    for r in results:
        for score in r.get("scores", ()):
            of = chosen.setdefault(score["detector"], {})
            of[score["chosen"]] = of.get(score["chosen"], 0) + 1
    return {"attacks": attacks, "adaptive": adaptive, "chosen": chosen}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the attacks do, and for each comparison how far the detectors by trajectories are from the first row."""
    attacks = outcome.detail("attacks")
    lines = [f"{config.network}: accuracy {100 * attacks[0]['accuracy']:.1f} % on the pool"]
    lines += [
        f"{a['set']} fools {100 * a['success']:.1f} % of what was right, noise of its size "
        f"{100 * a['noise_success']:.1f} %, its changes of other images {100 * a['exchanged_success']:.1f} %; "
        f"L2 {a['l2']:.3f} and {a['noise_l2']:.3f}, {a['images']} images"
        for a in attacks
    ]
    for (noisy, seen, tested), rows in groups(outcome.rows, "noisy", "seen", "tested").items():
        by = {row["detector"]: row for row in rows}
        first, own, rival = by[FIRST]["auroc"], by["separation"], best_rival(rows)
        left = 100 - first.mean
        gain = f" ({100 * (own['auroc'].mean - first.mean) / left:.0f} % of the distance to 100)" if left > 0.5 else ""
        lines.append(
            f"fitted on {seen}, tested on {tested}, noise {'clean' if noisy else 'left out'}: {FIRST} {first:.1f}, "
            f"separation {own['auroc']:.1f}{gain}, {rival['detector']} {rival['auroc']:.1f}"
        )
    for a in (each for each in outcome.detail("adaptive") if each["starts"]):
        lines.append(
            f"{a['adaptive']} detects {100 * a['detected']:.1f} % of {a['seen']}; of {a['starts']} of these, attacked "
            f"anew within {a['eps']:g}, {100 * a['evaded']:.0f} % evade, "
            f"{100 * a['evaded_rounded']:.0f} % at 8 bits"
        )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Areas under the curve by what is fitted on and tested, where noise counts as clean."""
    series: dict[str, dict[str, Any]] = {}
    for (seen, tested), rows in groups((row for row in outcome.rows if row["noisy"]), "seen", "tested").items():
        title = tested if seen == tested else f"{tested}, fitted on {seen}"
        by = {row["detector"]: row for row in rows}
        shown = {name: by[name] for name in (FIRST, "separation")} | {"best of the others": best_rival(rows)}
        for name, row in shown.items():
            series.setdefault(name, {})[title] = row["auroc"]
    return {"auroc": partial(plotting.categories, series, xlabel="area under the curve (%), noise counts as clean")}
