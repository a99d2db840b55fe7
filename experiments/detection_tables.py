"""What the detection experiment reports: rows, tables, sentences, figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from detection_setup import TRAJECTORY, Config

from lab.experiment import Columns, Figures, Row
from lab.outcome import Outcome
from lab.results import groups
from lab.statistics import mean_interval, paired, paired_p_value, percent
from odenets import plotting
from odenets.detection import FALSE_POSITIVE_RATES

_SEEN = ("FGM", "APGD", "BIM", "AA", "DF", "CW", "HSJ", "BA")


def _of(attacks: tuple[str, ...], *values: float) -> dict[str, float]:
    return dict(zip(attacks, values, strict=True))


# of ResNet-110 on CIFAR-10, by setting, network and features: accuracy (%), tables 12 to 14; there with attacks whose
# images were clipped before they were normalized, parts that overlapped, and the best of several detectors on test
THESIS: dict[tuple[str, str, str], dict[str, float]] = {
    ("seen", "vanilla", TRAJECTORY): _of(_SEEN, 97.1, 94.1, 97.5, 88.9, 99.9, 98.0, 99.9, 96.6),
    ("seen", "least action", TRAJECTORY): _of(_SEEN, 98.7, 97.5, 99.3, 94.1, 99.8, 98.0, 99.9, 97.0),
    ("seen", "vanilla", "Mahalanobis"): _of(_SEEN, 87.8, 82.1, 86.8, 80.5, 91.5, 85.6, 85.5, 80.2),
    ("seen", "least action", "Mahalanobis"): _of(_SEEN, 95.6, 90.7, 95.4, 90.0, 96.7, 93.4, 94.6, 89.6),
    ("seen", "vanilla", "scenes"): _of(_SEEN, 94.6, 94.3, 95.0, 88.8, 99.8, 93.9, 99.7, 92.1),
    ("unseen", "vanilla", TRAJECTORY): _of(_SEEN[1:], 89.32, 96.02, 85.1, 91.02, 93.18, 93.0, 90.92),
    ("unseen", "vanilla", "Mahalanobis"): _of(_SEEN[1:], 77.34, 77.24, 72.12, 80.12, 79.92, 79.7, 79.32),
    ("unseen", "vanilla", "scenes"): _of(_SEEN[1:], 92.08, 93.88, 51.82, 51.4, 50.84, 52.12, 59.88),
    ("ood", "vanilla", TRAJECTORY): {"cifar100": 98.3},
    ("ood", "least action", TRAJECTORY): {"cifar100": 98.3},
    ("ood", "reverse cross-entropy", TRAJECTORY): {"cifar100": 98.42},
    ("ood", "vanilla", "Mahalanobis"): {"cifar100": 86.88},
    ("ood", "least action", "Mahalanobis"): {"cifar100": 94.84},
    ("ood", "reverse cross-entropy", "Mahalanobis"): {"cifar100": 94.82},
}
# the same networks' trajectory detectors on seen attacks: share of the successful ones that is detected (%), table 38
THESIS_SUCCESSFUL = {
    "vanilla": _of(_SEEN[:7], 97.7, 99.3, 98.3, 100, 100, 98.6, 100),
    "least action": _of(_SEEN[:7], 98.6, 99.4, 99.6, 100, 99.9, 98.7, 99.9),
}
# of their successful images of CW that are detected, the share (%) that attacks bring past the detector, section 5.4.5
THESIS_EVADED = {
    ("vanilla", "black box"): 16.5,
    ("least action", "black box"): 6.8,
    ("least action", "features"): 14.0,
}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """The rows of a setting, means over seeds."""
    if config.setting == "timing":
        return timing_rows(results)
    return (adaptive_rows if config.setting == "adaptive" else comparison_rows)(config, results)


def of_method(results: list[Row], method: str) -> list[Row]:
    """The results of a method, by seed."""
    return sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])


def score_of(result: dict[str, Any], seen: str, tested: str, kind: str) -> dict[str, Any]:
    """The scores of a job for one comparison."""
    return next(s for s in result["scores"] if (s["seen"], s["tested"], s["kind"]) == (seen, tested, kind))


def comparison_rows(config: Config, results: list[Row]) -> list[Row]:
    """One row per method, what was seen and tested, and kind of features.

    Differences in the area under the curve are to the trajectory of the same networks, paired.
    """
    rows = []
    for method in config.methods:
        of = of_method(results, method)
        for seen, tested, kind in groups(of[0]["scores"], "seen", "tested", "kind"):
            scores = [score_of(r, seen, tested, kind) for r in of]
            row: Row = {"method": method, "seen": seen, "tested": tested, "kind": kind}
            for name in ("accuracy", "auroc", "fpr95", "detected", "detected_successful", "false_positives"):
                values = [s[name] for s in scores if s[name] == s[name]]
                row[name] = percent(values) if values else None
            if config.noisy:
                row["noisy_false_positives"] = percent(s["noisy_false_positives"] for s in scores)
            if set(config.modes) - {"general"}:
                row["over_general"] = percent(s["auroc"] - s["general_auroc"] for s in scores)
            if kind == TRAJECTORY:  # of the networks, not of what is seen of them
                row["network_accuracy"] = percent(r["accuracy"] for r in of)
                rates = [attack["success"] for r in of for attack in r["attacks"] if attack["attack"] == tested]
                row |= {"fooled": percent(rates)} if rates else {}
            else:
                one = [100 * s["auroc"] for s in scores]
                other = [100 * score_of(r, seen, tested, TRAJECTORY)["auroc"] for r in of]
                row |= {"difference": paired(one, other), "p": paired_p_value(one, other)}
            rows.append(row | (_of_thesis(config, row) if config.dataset == "cifar10" else {}))
    return rows


def _of_thesis(config: Config, row: dict[str, Any]) -> dict[str, float | None]:
    """Accuracy of ResNet-110 in the thesis; where foreign images are told from clean ones, of those seen alone."""
    tested = Path(row["tested"]).stem
    known = THESIS.get((config.setting, row["method"], row["kind"]), {})
    figures: dict[str, float | None] = {}
    if config.setting != "ood" or row["seen"] == row["tested"]:
        figures["thesis"] = known.get(tested)
    if config.setting == "seen" and row["kind"] == TRAJECTORY:
        figures["thesis_successful"] = THESIS_SUCCESSFUL.get(row["method"], {}).get(tested)
    return figures


def adaptive_rows(config: Config, results: list[Row]) -> list[Row]:
    """Of what the detector knows, the share that attacks turn into images which fool network and detector."""
    rows: list[Row] = []
    for method in config.methods:
        of = of_method(results, method)
        rate = percent(r["detected_successful"] for r in of)
        for attack in dict.fromkeys(name for r in of for name in r["evaded"]):
            begun = [r for r in of if attack in r["evaded"]]
            row = {"method": method, "attack": attack, "detected_before": rate}
            row["starts"] = sum(r["starts"] for r in begun)
            row["evading"] = sum(round(r["evaded"][attack] * r["starts"]) for r in begun)
            row["evaded"] = percent(r["evaded"][attack] for r in begun)
            row["l2"] = mean_interval([r["l2"][attack] for r in begun])
            if config.dataset == "cifar10":
                row["thesis"] = THESIS_EVADED.get((method, attack))
            rows.append(row)
    return rows


def timing_rows(results: list[Row]) -> list[Row]:
    """Median milliseconds per image of each kind of features, and over those of a forward pass."""
    names = list(results[0]["seconds"])
    medians = {name: statistics.median(t / r["images"] for r in results for t in r["seconds"][name]) for name in names}
    forward = medians["forward pass"]
    return [{"what": name, "milliseconds": 1e3 * t, "over_forward": t / forward} for name, t in medians.items()]


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
TIMING_COLUMNS: Columns = {
    "": "{what}",
    "ms per image": "{milliseconds:.3f}",
    "over a forward pass": "{over_forward:.2f}",
}


def columns(config: Config) -> Columns:
    """Of the table of a setting."""
    return {"adaptive": ADAPTIVE_COLUMNS, "timing": TIMING_COLUMNS}.get(config.setting, COLUMNS)


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    if config.setting == "timing":
        t = {row["what"]: row["milliseconds"] for row in outcome.rows}
        ratio = (t["Mahalanobis"] + t["Mahalanobis, statistics"]) / t[TRAJECTORY]
        words = f"Mahalanobis with its statistics takes {ratio:.1f} times the trajectory's time"
        return [f"{words} (thesis: 145 s / 66 s = 2.2)"]
    if config.setting == "adaptive":
        return [
            f"{r['method']}, {r['attack']}: {r['evading']} of {r['starts']} detected successful images evade; "
            f"{r['detected_before'].mean * (1 - r['evaded'].mean / 100):.1f} % of the successful ones are still "
            "detected"
            for r in outcome.rows
        ]
    lines = [
        line for method in config.methods for line in _of_networks(config, method, of_method(outcome.results, method))
    ]
    first, *others = config.methods
    for method in others:
        one, other = (aurocs(of_method(outcome.results, m), TRAJECTORY) for m in (method, first))
        lines.append(
            f"trajectory: {method} over {first} {paired(one, other):.1f} points of AUROC over all comparisons, "
            f"p = {paired_p_value(one, other):.2g}"
        )
    return lines


def aurocs(of: list[Row], kind: str, name: str = "auroc") -> list[float]:
    """Per seed the area under the curve of a kind of features (%), mean over all comparisons."""
    return [statistics.fmean(100 * s[name] for s in r["scores"] if s["kind"] == kind) for r in of]


def _of_networks(config: Config, method: str, of: list[Row]) -> list[str]:
    """What is said of the networks of a method."""
    lines = [f"{method}: accuracy {percent(r['accuracy'] for r in of):.1f} % on the pool"]
    for i, attack in enumerate(of[0]["attacks"]):
        rate = percent(r["attacks"][i]["success"] for r in of)
        lines.append(f"{method}: {attack['attack']} fools {rate:.1f} % of what was right")
    kinds = [kind for (kind,) in groups(of[0]["scores"], "kind")]
    for kind in kinds:
        if kind == TRAJECTORY:
            continue
        one, other = aurocs(of, kind), aurocs(of, TRAJECTORY)
        difference = paired(one, other)
        what = ("as", "better than", "worse than")[difference.sign]
        lines.append(
            f"{method}: {kind} detect {what} the trajectory, {difference:.1f} points of AUROC over all comparisons, "
            f"p = {paired_p_value(one, other):.2g}"
        )
    if set(config.modes) - {"general"}:
        for kind in kinds:
            gain = paired(aurocs(of, kind), aurocs(of, kind, "general_auroc"))
            lines.append(f"{method}: the modes chosen give {kind} {gain:.1f} points of AUROC over the general detector")
    return lines


def details(config: Config, results: list[Row]) -> dict[str, Any]:
    """Receiver operating characteristics, by method, comparison and kind of features, averaged over the seeds."""
    if config.setting in ("adaptive", "timing"):
        return {}
    curves: dict[str, Any] = {}
    for method in config.methods:
        of = of_method(results, method)
        for seen, tested, kind in groups(of[0]["scores"], "seen", "tested", "kind"):
            mean = np.mean([score_of(r, seen, tested, kind)["curve"] for r in of], 0)
            title = Path(tested).stem if seen == tested else f"{Path(tested).stem}, fitted on {Path(seen).stem}"
            curves.setdefault(method, {}).setdefault(title, {})[kind] = mean.round(4).tolist()
    return {"curves": curves}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Receiver operating characteristics, a figure per method and a panel per comparison."""
    if config.setting in ("adaptive", "timing"):
        return {}
    return {
        method.replace(" ", "_"): lambda method=method: plotting.operating_characteristics(
            outcome.detail("curves")[method], FALSE_POSITIVE_RATES
        )
        for method in config.methods
    }
