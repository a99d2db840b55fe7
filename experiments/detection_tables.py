"""What the detection experiment found: rows, tables, sentences, figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from detection_setup import TRAJECTORY, Config

from lab.statistics import mean_interval, paired_p_value
from lab.tables import table
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


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, what was seen and tested, and kind of features; means over seeds.

    Differences in the area under the curve are to the trajectory of the same networks, paired.
    """
    rows = []
    for method in config.methods:
        of = sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])
        keys = dict.fromkeys((s["seen"], s["tested"], s["kind"]) for s in of[0]["scores"])
        for seen, tested, kind in keys:
            found = [score_of(r, seen, tested, kind) for r in of]
            row: dict[str, Any] = {"method": method, "seen": seen, "tested": tested, "kind": kind}
            for name in ("accuracy", "auroc", "fpr95", "detected", "detected_successful", "false_positives"):
                values = [100 * s[name] for s in found if s[name] == s[name]]
                row[name] = mean_interval(values) if values else None
            if config.noisy:
                row["noisy_false_positives"] = mean_interval([100 * s["noisy_false_positives"] for s in found])
            if set(config.modes) - {"general"}:
                row["over_general"] = mean_interval([100 * (s["auroc"] - s["general_auroc"]) for s in found])
            if kind == TRAJECTORY:  # of the networks, not of what is seen of them
                row["network_accuracy"] = mean_interval([100 * r["accuracy"] for r in of])
                rates = [100 * made["success"] for r in of for made in r["attacks"] if made["attack"] == tested]
                row |= {"fooled": mean_interval(rates)} if rates else {}
            else:
                one, other = (
                    [100 * s["auroc"] for s in ss]
                    for ss in (found, [score_of(r, seen, tested, TRAJECTORY) for r in of])
                )
                row["difference"] = mean_interval([a - b for a, b in zip(one, other, strict=True)])
                row["p"] = paired_p_value(one, other)
            rows.append(row | (_of_thesis(config, row) if config.dataset == "cifar10" else {}))
    return rows


def _of_thesis(config: Config, row: dict[str, Any]) -> dict[str, float | None]:
    """Accuracy of ResNet-110 in the thesis; where foreign images are told from clean ones, of those seen alone."""
    tested = Path(row["tested"]).stem
    known = THESIS.get((config.setting, row["method"], row["kind"]), {})
    found: dict[str, float | None] = {}
    if config.setting != "ood" or row["seen"] == row["tested"]:
        found["thesis"] = known.get(tested)
    if config.setting == "seen" and row["kind"] == TRAJECTORY:
        found["thesis_successful"] = THESIS_SUCCESSFUL.get(row["method"], {}).get(tested)
    return found


def score_of(result: dict[str, Any], seen: str, tested: str, kind: str) -> dict[str, Any]:
    """The scores of a job for one comparison."""
    return next(s for s in result["scores"] if (s["seen"], s["tested"], s["kind"]) == (seen, tested, kind))


COLUMNS: dict[str, Any] = {
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


def verdict(config: Config, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for method in config.methods:
        of = sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])
        lines.append(f"{method}: accuracy {mean_interval([100 * r['accuracy'] for r in of]):.1f} % on the pool")
        for i, made in enumerate(of[0]["attacks"]):
            rates = [100 * r["attacks"][i]["success"] for r in of]
            lines.append(f"{method}: {made['attack']} fools {mean_interval(rates):.1f} % of what was right")
        pairs = dict.fromkeys((s["seen"], s["tested"]) for s in of[0]["scores"])
        for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != TRAJECTORY):
            per_seed = [
                [statistics.fmean(100 * score_of(r, *pair, k)["auroc"] for pair in pairs) for r in of]
                for k in (kind, TRAJECTORY)
            ]
            found = mean_interval([a - b for a, b in zip(*per_seed, strict=True)])
            what = ("as", "better than", "worse than")[found.sign]
            lines.append(
                f"{method}: {kind} detect {what} the trajectory, {found:.1f} points of AUROC over all comparisons, "
                f"p = {paired_p_value(*per_seed):.2g}"
            )
        if set(config.modes) - {"general"}:
            for kind in dict.fromkeys(row["kind"] for row in rows):
                gains = [
                    statistics.fmean(100 * (s["auroc"] - s["general_auroc"]) for s in r["scores"] if s["kind"] == kind)
                    for r in of
                ]
                lines.append(
                    f"{method}: the modes chosen give {kind} {mean_interval(gains):.1f} points of AUROC over the "
                    "general detector"
                )
    if len(config.methods) > 1:
        first, *others = config.methods
        for method in others:
            pair = [
                [statistics.fmean(100 * s["auroc"] for s in r["scores"] if s["kind"] == TRAJECTORY) for r in of]
                for of in (
                    sorted((r for r in results if r["method"] == m), key=lambda r: r["seed"]) for m in (method, first)
                )
            ]
            found = mean_interval([a - b for a, b in zip(*pair, strict=True)])
            lines.append(
                f"trajectory: {method} over {first} {found:.1f} points of AUROC over all comparisons, "
                f"p = {paired_p_value(*pair):.2g}"
            )
    return lines


def figures(config: Config, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Receiver operating characteristics, a figure per method and a panel per comparison, averaged over the seeds."""
    found = {}
    for method in config.methods:
        of = [r for r in results if r["method"] == method]
        curves: dict[str, dict[str, np.ndarray]] = {}
        for s in of[0]["scores"]:
            seen, tested = (Path(name).stem for name in (s["seen"], s["tested"]))
            mean = np.mean([score_of(r, s["seen"], s["tested"], s["kind"])["curve"] for r in of], 0)
            title = tested if seen == tested else f"{tested}, fitted on {seen}"
            curves.setdefault(title, {})[s["kind"]] = mean
        found[method.replace(" ", "_")] = plotting.operating_characteristics(curves, FALSE_POSITIVE_RATES)
    return found


def adaptive_rows(config: Config, results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Of what the detector knows, the share that attacks turn into images which fool network and detector."""
    rows: list[dict[str, Any]] = []
    for method in config.methods:
        of = sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])
        rate = mean_interval([100 * r["detected_successful"] for r in of])
        for way in dict.fromkeys(name for r in of for name in r["evaded"]):
            begun = [r for r in of if way in r["evaded"]]
            row = {"method": method, "attack": way, "detected_before": rate, "starts": sum(r["starts"] for r in begun)}
            row["evading"] = sum(round(r["evaded"][way] * r["starts"]) for r in begun)
            row["evaded"] = mean_interval([100 * r["evaded"][way] for r in begun])
            row["l2"] = mean_interval([r["l2"][way] for r in begun])
            if config.dataset == "cifar10":
                row["thesis"] = THESIS_EVADED.get((method, way))
            rows.append(row)
    columns = {
        "network": "{method}",
        "attack": "{attack}",
        "detected before (%)": "{detected_before:.1f}",
        "evade": "{evading} of {starts}",
        "evaded (%)": "{evaded:.1f}",
        "thesis (ResNet-110)": "{thesis:g}",
        "L2 distance": "{l2.mean:.2f}",
    }
    lines = [
        f"{r['method']}, {r['attack']}: {r['evading']} of {r['starts']} detected successful images evade; "
        f"{r['detected_before'].mean * (1 - r['evaded'].mean / 100):.1f} % of the successful ones are still detected"
        for r in rows
    ]
    return rows, table(rows, columns), lines


def timing_rows(config: Config, results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Median milliseconds per image of each kind of features, and over those of a forward pass."""
    names = list(results[0]["seconds"])
    medians = {name: statistics.median(t / r["images"] for r in results for t in r["seconds"][name]) for name in names}
    rows = [
        {"what": name, "milliseconds": 1e3 * t, "over_forward": t / medians["forward pass"]}
        for name, t in medians.items()
    ]
    columns = {"": "{what}", "ms per image": "{milliseconds:.3f}", "over a forward pass": "{over_forward:.2f}"}
    ratio = (medians["Mahalanobis"] + medians["Mahalanobis, statistics"]) / medians[TRAJECTORY]
    lines = [
        f"Mahalanobis with its statistics takes {ratio:.1f} times the trajectory's time (thesis: 145 s / 66 s = 2.2)"
    ]
    return rows, table(rows, columns), lines
