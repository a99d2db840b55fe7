"""Do steps of each sample's own size spend evaluations better than one depth for all, chance, or early exits?

Trained networks, plain ones and some trained at random coarsenings, are used with fewer evaluations than they have:
by neighboring blocks merged for all samples alike, by steps of each sample's own size, whose tolerance is chosen on
validation images for a mean number of evaluations, by the same steps dealt to the samples at random, and by exits
behind every block at a confidence chosen likewise. Of each way the variant is taken that is best on validation images.
Accuracies are those on test images at equal mean evaluations, paired over the seeds; whether the blocks contribute at
all is told by the network without them.

    python experiments/sample_steps.py
    python experiments/sample_steps.py --dataset cifar10 --folder DIR --train-size 6000 --solver euler --batch-size 128
        --learning-rate 0.1
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from sample_steps_setup import EXITS, RULES, STEPS, Config, Job, train

from lab import plotting
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Row, command
from lab.results import groups
from lab.statistics import mean_interval, paired_p_value, percent
from lab.training import parts_of

WAYS = {
    "steps per sample": "steps per sample",
    "merged for all": "merged for all samples",
    "at random": "dealt at random",
    "exit": "early exit",
}
SHOWN = 5
"""Rows of a budget that come first: steps per sample, and what they are compared with."""


def jobs(config: Config) -> Jobs[Job]:
    """Every arm, seed by seed."""
    results: list[Row] = []
    for seed in config.seeds:
        results += yield [Job(arm, seed) for arm in config.arms]
    return results


def variants(row: Row) -> dict[str, dict[str, dict[str, Row | None]]]:
    """By way and variant, what a network has at each budget."""
    samples = row["samples"]
    return {
        "steps per sample": samples,
        "merged for all": row["uniform"],
        "at random": samples,
        "exit": row["exit"],
    }


def best(rows: list[Row], way: str) -> str:
    """The variant of a way with the best accuracy on validation images, over seeds and budgets, that all networks have.

    Args:
        rows: results of an arm.
        way: one of the ways.
    """
    scores = {}
    for name in variants(rows[0])[way]:
        found = [each for row in rows for each in variants(row)[way][name].values()]
        if all(found):
            scores[name] = statistics.fmean(each["validation"] for each in found if each)
    return max(scores, key=scores.__getitem__)


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """A row for each arm, budget and way; the differences of steps per sample to the others are paired over the seeds.

    The steps at random are compared with the same steps, the others with those that are best on validation images.
    Budgets are followed by the mean over them.
    """
    rows: list[Row] = []
    for (arm,), group in groups(results, "arm").items():
        its = sorted(group, key=lambda r: r["seed"])
        whole = [100 * r["whole"]["test"] for r in its]
        rows.append({"arm": arm, "way": "all blocks", "budget": config.depth, "accuracy": mean_interval(whole)}
                    | {"evaluations": float(its[0]["evaluations"])})  # fmt: skip
        chosen = best(its, "steps per sample")
        names = [("steps per sample", chosen), ("at random", chosen), ("merged for all", best(its, "merged for all"))]
        names += [("exit", name) for name in EXITS]
        for other in (name for name in STEPS if name != chosen and all(all(r["samples"][name].values()) for r in its)):
            names += [("steps per sample", other), ("at random", other)]
        names += [("merged for all", rule) for rule in RULES if ("merged for all", rule) not in names]
        for budget in (*config.budgets, None):
            own: dict[str, list[float]] = {}
            for way, name in names:
                found = _at(its, way, name, config.budgets if budget is None else (budget,))
                row = {"arm": arm, "way": way, "variant": name, "budget": budget or "mean"} | found
                values = [*found["accuracy"].values]
                if way == "steps per sample":
                    own[name] = values
                else:
                    one = own[name if way == "at random" else chosen]
                    row["difference"] = mean_interval([a - b for a, b in zip(one, values, strict=True)])
                    if len(one) > 1:
                        row["p"] = paired_p_value(one, values)
                rows.append(row)
        removed = percent(r["removed"]["test"] for r in its)
        rows.append({"arm": arm, "way": "no blocks", "budget": 0, "accuracy": removed, "evaluations": 0.0})
    return rows


def _at(rows: list[Row], way: str, name: str, budgets: Sequence[int]) -> Row:
    """Accuracy and evaluations of a variant, means over budgets for each seed."""
    of: list[list[Any]] = [[variants(row)[way][name][str(d)] for d in budgets] for row in rows]
    key = "random" if way == "at random" else "test"
    found: Row = {"accuracy": percent(statistics.fmean(each[key] for each in its) for its in of)}
    if way == "merged for all":
        found["evaluations"] = statistics.fmean(budgets) * rows[0]["evaluations"] / rows[0]["depth"]
    for measured in ("evaluations", "spread", "rejected", "first"):
        if all(measured in each for its in of for each in its):
            found[measured] = statistics.fmean(each[measured] for its in of for each in its)
    return found


COLUMNS: Columns = {
    "trained": "{arm}",
    "blocks": "{budget}",
    "way": "{way}",
    "variant": "{variant}",
    "test accuracy (%)": "{accuracy:.2f}",
    "evaluations": "{evaluations:.2f}",
    "spread": "{spread:.2f}",
    "rejected": "{rejected:.2f}",
    "steps per sample -": "{difference:.2f}",
    "p": "{p:.2g}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What steps per sample have before each of the others, in the mean over the budgets."""
    words = ("no different from", "ahead of", "behind")
    lines = []
    for (arm,), rows in groups(outcome.rows, "arm").items():
        mean = [row for row in rows if row["budget"] == "mean"]
        own = mean[0]
        whole, removed = (next(r for r in rows if r["way"] == way)["accuracy"] for way in ("all blocks", "no blocks"))
        lines.append(f"{arm}: {whole:.2f} % with all blocks, {removed:.2f} without any")
        for row in mean[1:SHOWN]:
            word = words[row["difference"].sign] if row["difference"].n > 1 else "one seed beside"
            lines.append(
                f"{arm}, steps per sample ({own['variant']}): {word} {WAYS[row['way']]} ({row['variant']}), "
                f"{row['difference']:.2f} points"
            )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy over evaluations by the best variant of each way, for each way to train."""

    def of(arm: str) -> Figure:
        rows = [row for row in outcome.rows if row["arm"] == arm]
        shown = [(row["way"], row["variant"]) for row in rows if row["budget"] == "mean"][:SHOWN]
        series: dict[str, list[tuple[float, Any]]] = {f"{WAYS[way]}: {variant}": [] for way, variant in shown}
        for row in rows:
            if row["budget"] in config.budgets and (row["way"], row["variant"]) in shown:
                series[f"{WAYS[row['way']]}: {row['variant']}"].append((row["evaluations"], row["accuracy"]))
        return plotting.intervals(series, xlabel="mean evaluations of a sample", ylabel="test accuracy (%)")

    return {arm: lambda arm=arm: of(arm) for arm in config.arms}


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(
        config, seeds=(0, 1), epochs=1, train_size=200, test_size=100, depth=4, budgets=(2, 3), rounds=4, permutations=1
    ),
    data=parts_of,
    train=train,
    selects=("seeds", "arms"),
    cost=lambda config, job: config.epochs,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
