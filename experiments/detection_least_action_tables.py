"""What the comparison of least action with plain training reports: pairs, rows, sentences, figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from detection_least_action_setup import LEAST_ACTION, PLAIN, Config
from detection_pretrained_detectors import FIRST
from scipy.optimize import linear_sum_assignment
from scipy.stats import t

from lab import plotting
from lab.experiment import Columns, Figures, Outcome, Row
from lab.results import groups
from lab.statistics import Interval, correlation, mean_interval, paired, paired_p_value

__all__ = ["AREAS", "COLUMNS", "LEAST", "MEAN", "adjusted", "details", "figures", "matched", "summarize", "verdict"]

LEAST = 4
"""Pairs below which no sign is claimed."""
MEAN = "mean of the attacks"
"""The row that decides, with noise left out and the first detector, as the thesis has it."""
AREAS = {
    "auroc": "AUROC (%)", "auroc_successful": "AUROC, successful (%)", "noise_auroc": "AUROC, noise against clean (%)"
}  # fmt: skip
CONSTANTS = {
    "block": "Lipschitz constant of a block's residue (theorem 6)",
    "path": "Lipschitz constant of all residues in the first state (theorems 7, 8)",
    "flow": "Lipschitz constant of the last state in the first",
    "slope": "difference of residues over that of first states (theorems 7, 8)",
    "apart": "distance of residues over that of two clean images",
}
"""What is measured on the paths, by its name in the results."""
SAID = ("clean", "noise", "attacked", "noise over clean", "attacked over clean")
"""Images of which the verdict speaks."""
FACTOR = "{{{0}[0]:.2f}} ({{{0}[1]:.2f}} to {{{0}[2]:.2f}})"
"""A value and the ends of its interval."""
DECIDES = {"measure": AREAS["auroc"], "noisy": False, "detector": FIRST, "images": MEAN}
ON_DATA = {"measure": CONSTANTS["block"], "images": "clean"}
OFF = ("noise", "attacked", "between", "uniform")


COLUMNS: Columns = {
    "measure": "{measure}",
    "noise counts as clean": "{noisy}",
    "images": "{images}",
    "detector": "{detector}",
    PLAIN: "{plain:.2f}",
    LEAST_ACTION: "{least_action:.2f}",
    "difference": "{difference:.2f}",
    "factor": FACTOR.format("factor"),
    "p": lambda row: f"{row['log_p' if 'factor' in row else 'p']:.2g}",
    "at equal accuracy": FACTOR.format("adjusted"),
}


def matched(plain: Sequence[float], least_action: Sequence[float], apart: float) -> list[tuple[int, int]]:
    """As many pairs as there can be whose accuracies differ by so much at most, and of these those nearest in sum.

    >>> matched([83.7, 83.3, 80.0], [83.1, 84.2, 83.4], 0.5)
    [(0, 2), (1, 0)]
    """
    differences = np.abs(np.subtract.outer(np.asarray(plain), np.asarray(least_action)))
    near = differences <= apart + 1e-9
    costs: Any = np.where(near, differences, 1e3 * (1 + differences.max()))
    chosen, partners = linear_sum_assignment(costs)
    return [(int(i), int(j)) for i, j in zip(chosen, partners, strict=True) if near[i, j]]


def adjusted(values: Sequence[float], least_action: Sequence[bool], accuracy: Sequence[float]) -> list[float] | None:
    """What least action adds in a regression of all networks on it and on accuracy, and its 95 % interval.

    None where there are too few networks.
    """
    X = np.column_stack([np.ones(len(values)), np.asarray(least_action, float), np.asarray(accuracy)])
    left = len(values) - 3
    if left < 1 or np.linalg.matrix_rank(X) < 3:
        return None
    inverse = np.linalg.inv(X.T @ X)
    fit = inverse @ X.T @ np.asarray(values)
    rest = np.asarray(values) - X @ fit
    half = float(t.ppf(0.975, left)) * math.sqrt(rest @ rest / left * inverse[1, 1])
    return [float(fit[1]), float(fit[1]) - half, float(fit[1]) + half]


def _networks(results: list[Row]) -> tuple[list[Row], list[Row]]:
    """Plain ones, and those with least action."""
    by = groups(results, "method")
    return by[PLAIN,], by[LEAST_ACTION,]


def _pairs(config: Config, results: list[Row]) -> list[tuple[Row, Row]]:
    plain, least = _networks(results)
    of_plain, of_least = ([100 * each["accuracy_of_others"] for each in of] for of in (plain, least))
    return [(plain[i], least[j]) for i, j in matched(of_plain, of_least, config.apart)]


def _measures(result: Row) -> list[tuple[Row, float]]:
    """Everything that is compared of a network, with what says what it is; constants as logarithms."""
    found: list[tuple[Row, float]] = []
    found += [({"measure": "test accuracy (%)"}, 100 * result["accuracy"]), ({"measure": "action"}, result["action"])]
    for name, measure in {"success": "attack succeeds (%)", "l2": "attack's L2"}.items():
        found += [({"measure": measure, "images": each["set"]}, each[name]) for each in result["attacks"]]
    for (noisy, detector), scores in groups(result["scores"], "noisy", "detector").items():
        for key, measure in AREAS.items():
            about = {"measure": measure, "noisy": noisy, "detector": detector}
            areas = [100 * score[key] for score in scores]
            found += [(about | {"images": score["tested"]}, area) for score, area in zip(scores, areas, strict=True)]
            found.append((about | {"images": MEAN}, float(np.nanmean(areas))))
    logs: dict[str, dict[str, float]] = {}
    for each in result["mechanism"]:
        logs.setdefault(each["quantity"], {})[each["points"]] = float(np.mean(each["log"]))
    for quantity, of in logs.items():
        about = {"measure": CONSTANTS[quantity]}
        found += [(about | {"images": points}, value) for points, value in of.items()]
        off = [points for points in OFF if "clean" in of and points in of]
        found += [(about | {"images": f"{points} over clean"}, of[points] - of["clean"]) for points in off]
    return found


def _key(about: Row) -> tuple[tuple[str, Any], ...]:
    return tuple(about.items())


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per measure: means over the pairs, their difference, and that of all networks at equal accuracy.

    Constants are geometric means over images and blocks, and their difference is that of logarithms. No pairs, no rows.
    """
    of = {result["name"]: {_key(about): value for about, value in _measures(result)} for result in results}
    pairs = _pairs(config, results)
    if not pairs:
        return []
    is_least = [result["method"] == LEAST_ACTION for result in results]
    accuracy = [100 * result["accuracy_of_others"] for result in results]
    rows: list[Row] = []
    for about, _ in _measures(results[0]):
        key = _key(about)
        plain, least = ([of[pair[k]["name"]][key] for pair in pairs] for k in (0, 1))
        logarithm = about["measure"] in CONSTANTS.values()
        shown = [np.exp(each).tolist() if logarithm else each for each in (plain, least)]
        row = about | {"plain": mean_interval(shown[0]), "least_action": mean_interval(shown[1])}
        difference, prefix = paired(least, plain), "log_" if logarithm else ""
        row[f"{prefix}difference"] = difference
        if len(pairs) > 1:
            row[f"{prefix}p"] = paired_p_value(least, plain)
        at_equal = adjusted([of[result["name"]][key] for result in results], is_least, accuracy)
        if logarithm:
            mean, half = difference.mean, 0.0 if math.isnan(difference.half_width) else difference.half_width
            row["factor"] = np.exp([mean, mean - half, mean + half]).tolist()
            at_equal = None if at_equal is None else np.exp(at_equal).tolist()
        rows.append(row | {"adjusted": at_equal})
    return rows


def details(config: Config, results: list[Row]) -> dict[str, Any]:
    """All networks with what decides and their constant on the data, those that are paired, constants by block."""
    names = ("name", "method", "seed", "accuracy", "accuracy_of_others", "action")
    blocks: dict[str, dict[str, list[list[float]]]] = {}
    for result in results:
        for each in result["mechanism"]:
            if each["quantity"] == "block":
                blocks.setdefault(each["points"], {}).setdefault(result["method"], []).append(each["log"])
    networks: list[Row] = []
    for result in results:
        of = {_key(about): value for about, value in _measures(result)}
        network = {name: result[name] for name in names}
        networks.append(network | {"area": of[_key(DECIDES)], "constant": math.exp(of[_key(ON_DATA)])})
    return {
        "networks": networks,
        "pairs": [[one["name"], other["name"]] for one, other in _pairs(config, results)],
        "blocks": blocks,
    }


def _sign(difference: Interval, pairs: int) -> str:
    """What may be said of a difference."""
    if pairs < LEAST:
        return "no sign is claimed of so few"
    return ("no difference can be told", "it raises it", "it lowers it")[difference.sign]


def _said(network: Row) -> str:
    accuracy = 100 * network["accuracy_of_others"]
    return f"{network['method']}, seed {network['seed']} ({accuracy:.2f} %, action {network['action']:.2f})"


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """Pairs, whether least action raises detection, and what it does to the constants."""
    pairs = outcome.detail("pairs")
    lines = [
        f"{len(pairs)} pairs within {config.apart:g} points of clean accuracy on the test images that are not attacked"
        + (f", below {LEAST}: no sign is claimed" if len(pairs) < LEAST else "")
    ]
    networks = {network["name"]: network for network in outcome.detail("networks")}
    for i, pair in enumerate(pairs, 1):
        one, other = (networks[name] for name in pair)
        lines.append(f"pair {i}: {_said(one)} and {_said(other)}")
    if alone := [
        _said(each) for name, each in networks.items() if name not in {name for pair in pairs for name in pair}
    ]:
        lines.append(f"without a partner: {', '.join(alone)}")
    lower = sum(networks[other]["action"] < networks[one]["action"] for one, other in pairs)
    lines.append(f"the action is lower with least action in {lower} of {len(pairs)} pairs")
    if len(networks) > 2:
        logs = [math.log(network["action"]) for network in networks.values()]
        for key, words in {
            "area": f"area under the curve of {FIRST}",
            "constant": f"{CONSTANTS['block']}, clean",
        }.items():
            r, p = correlation(logs, [network[key] for network in networks.values()])
            about = f"over all {len(logs)} networks, correlation with the logarithm of the action"
            lines.append(f"{about}, {words}: {r:.2f} (p = {p:.2g})")
    for row in outcome.rows:
        if row["measure"] == AREAS["auroc"] and row["images"] == MEAN:
            noise = "clean" if row["noisy"] else "left out"
            lines.append(
                f"{row['detector']}, noise {noise}: {row['least_action']:.2f} with least action, {row['plain']:.2f} "
                f"plain, {row['difference']:.2f} points: {_sign(row['difference'], len(pairs))}"
            )
    for row in outcome.rows:
        if "factor" in row and row["images"] in SAID:
            lines.append(
                f"{row['measure']}, {row['images']}: {FACTOR.format('factor').format_map(row)} times with least "
                f"action: {_sign(row['log_difference'], len(pairs))}"
            )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Areas under the curve of the first detector by attack, and constants of blocks by images."""
    areas: dict[str, dict[str, Interval]] = {PLAIN: {}, LEAST_ACTION: {}}
    constants: dict[str, dict[str, Interval]] = {PLAIN: {}, LEAST_ACTION: {}}
    for row in outcome.rows:
        if row["measure"] == AREAS["auroc"] and row.get("detector") == FIRST:
            title = f"{row['images']}, noise {'clean' if row['noisy'] else 'left out'}"
            areas[PLAIN][title], areas[LEAST_ACTION][title] = row["plain"], row["least_action"]
        if row["measure"] == CONSTANTS["block"] and "over" not in row["images"]:
            constants[PLAIN][row["images"]] = row["plain"]
            constants[LEAST_ACTION][row["images"]] = row["least_action"]
    if not outcome.rows:
        return {}
    return {
        "auroc": partial(plotting.categories, areas, xlabel=f"area under the curve (%), {FIRST}"),
        "constants": partial(plotting.categories, constants, xlabel="local Lipschitz constant of a block's residue"),
    }
