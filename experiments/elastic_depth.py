"""Does least action make depth elastic? A trained network at fewer blocks without training, beside what rivals it.

Deep networks are trained plain, with the action, with stochastic depth, with the loss at random coarsenings, and with a
penalty on the change of weights from block to block. Then neighboring blocks merge, by the rule that serves each arm
best on validation images, and batch norm's statistics are recomputed. Beside them stand networks trained at each depth,
and every network without its blocks: what is retained is the share of what the blocks contribute,
``(acc_k - acc_0) / (acc_full - acc_0)``, since where blocks contribute nothing nothing can be lost.

    python experiments/elastic_depth.py
    python experiments/elastic_depth.py --dataset cifar10 --folder DIR --half --epochs 12 --tuning-epochs 4
        --batch-size 128 --learning-rate 0.2 --total-time 0 --validation-size 5000
        --arms plain action "stochastic depth" coarsening "weight change"

Digits, where depth pays little, are a demonstration only.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace

from elastic_depth_setup import ARMS, RULES, Config, Job, choices, epochs_of, parts_of, train
from matplotlib.figure import Figure

from lab import plotting
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Row, command
from lab.results import best_settings, groups
from lab.statistics import Interval, mean_interval, paired, paired_p_value, percent


def jobs(config: Config) -> Jobs[Job]:
    """What is chosen from, and what of the first seed needs no choice; then seed by seed what is reported."""
    deep, *others = config.depths
    chosen: dict[tuple[str, ...], Row] = {}

    def of_seed(seed: int, arms: Iterable[str]) -> list[Job]:
        deepest = [Job(arm, _setting(config, chosen, arm), deep, seed) for arm in arms]
        return [*deepest, *(Job("trained", 0.0, depth, seed) for depth in others)]

    choosing = [arm for arm in config.arms if len(choices(config, arm)) > 1]
    seeds = range(10_000, 10_000 + config.tuning)
    tuning = [
        Job(arm, setting, deep, seed, tuning=True)
        for arm in choosing
        for setting in choices(config, arm)
        for seed in seeds
    ]
    first = of_seed(config.seeds[0], (arm for arm in config.arms if arm not in (*choosing, "coarsening and action")))
    tuned = (yield [*first, *tuning])[len(first) :]
    chosen = choose(tuned)
    results: list[Row] = []
    for seed in config.seeds:
        results += yield of_seed(seed, config.arms)
    return [*tuned, *results]


def choose(tuned: list[Row]) -> dict[tuple[str, ...], Row]:
    """Per arm the setting with the best accuracy on validation images, over the full depth and all smaller ones."""
    return best_settings(tuned, ("setting",), within=("arm",), score=lambda row: [_score(row)])


def _score(row: Row) -> float:
    """Mean validation accuracy over all depths, by the rule that is best for the network."""
    coarse = max(statistics.fmean(a["validation"] for a in of.values()) for of in row["coarse"].values())
    n = len(next(iter(row["coarse"].values())))
    return (row["whole"]["validation"] + n * coarse) / (n + 1)


def _setting(config: Config, chosen: dict[tuple[str, ...], Row], arm: str) -> float:
    of = "action" if arm == "coarsening and action" else arm
    return chosen[of,]["setting"] if (of,) in chosen else choices(config, of)[0]


def best_rule(rows: list[Row]) -> str:
    """The rule by which an arm's networks have the best accuracy on validation images, over seeds and depths."""
    return max(
        RULES,
        key=lambda rule: statistics.fmean(a["validation"] for row in rows for a in row["coarse"][rule].values()),
    )


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per arm and number of blocks; differences to the plain network's are paired over the seeds."""
    of = groups((r for r in results if not r["tuning"]), "arm", "depth")
    of = {key: sorted(rows, key=lambda r: r["seed"]) for key, rows in of.items()}
    deep = config.depths[0]
    plain = of["plain", deep]
    span = [row["removed"]["test"] for row in plain], [row["whole"]["test"] for row in plain]
    rows = [_row("trained at each depth", deep, [r["whole"]["test"] for r in plain], span)]
    rows += [
        _row("trained at each depth", depth, [r["whole"]["test"] for r in its], span)
        for (arm, depth), its in of.items()
        if arm == "trained"
    ]
    reference: dict[int, list[float]] = {}
    for arm in config.arms:
        its = of[arm, deep]
        rule = best_rule(its)
        zero, full = [row["removed"]["test"] for row in its], [row["whole"]["test"] for row in its]
        shared = {"setting": its[0]["setting"], "rule": rule, "action": mean_interval([r["action"] for r in its])}
        each = {deep: full} | {d: [r["coarse"][rule][str(d)]["test"] for r in its] for d in config.coarse} | {0: zero}
        for depth, accuracy in each.items():
            row = _row(arm, depth, accuracy, (zero, full)) | shared
            kept = _retained(accuracy, (zero, full))
            if depth == deep:
                row |= {name: percent(r[name]["test"] for r in its) for name in ("noisy", "rounded")}
            if arm == "plain":
                reference[depth] = kept
            elif 0 < depth < deep:
                row |= {"difference": percent(a - b for a, b in zip(kept, reference[depth], strict=True))}
                if len(kept) > 1:
                    row["p"] = paired_p_value(kept, reference[depth])
            rows.append(row)
    return rows


def _retained(accuracy: list[float], span: tuple[list[float], list[float]]) -> list[float]:
    """The share of the contribution of the blocks that is left, per seed."""
    return [(a - zero) / (full - zero) if full != zero else 0.0 for a, zero, full in zip(accuracy, *span, strict=True)]


def _row(arm: str, blocks: int, accuracy: list[float], span: tuple[list[float], list[float]]) -> Row:
    return {
        "arm": arm,
        "blocks": blocks,
        "accuracy": percent(accuracy),
        "retained": percent(_retained(accuracy, span)),
    }


COLUMNS: Columns = {
    "trained": "{arm}",
    "weight": lambda row: f"{row['setting']:g}" if row["setting"] else "",
    "merged": "{rule}",
    "blocks": "{blocks}",
    "test accuracy (%)": "{accuracy:.2f}",
    "retained (%)": "{retained:.1f}",
    "- plain": "{difference:.1f}",
    "p": "{p:.2g}",
    "noisy images": "{noisy:.2f}",
    "rounded weights": "{rounded:.2f}",
    "action": "{action.mean:.3g}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What depth pays, and what each arm retains against the plain network."""
    at = {(row["arm"], row["blocks"]): row for row in outcome.rows}
    deep, least = config.depths[0], config.depths[-1]
    trained = [at["trained at each depth", depth]["accuracy"] for depth in (deep, least)]
    gain = paired(trained[0].values, trained[1].values)
    lines = [f"depth pays {gain:.2f} points from {least} to {deep} blocks, at {trained[0]:.2f} %"]
    words = ("no difference is shown to", "more than", "less than")
    for arm in (arm for arm in config.arms if arm != "plain"):
        for depth in config.coarse:
            row = at[arm, depth]
            difference: Interval = row["difference"]
            word = words[difference.sign] if difference.n > 1 else "one seed, beside"
            lines.append(
                f"{arm}, blocks {depth}: {row['retained']:.1f} % are retained, {word} the plain network "
                f"({difference:.1f} points)"
            )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy, and what is retained of the contribution of the blocks, over their number."""
    by_arm = {arm: rows for (arm,), rows in groups(outcome.rows, "arm").items()}

    def over_blocks(name: str, ylabel: str) -> Figure:
        series = {arm: [(r["blocks"], r[name]) for r in rows if r["blocks"]] for arm, rows in by_arm.items()}
        return plotting.intervals(series, xlabel="blocks", ylabel=ylabel, logarithmic=True)

    return {
        "accuracy": lambda: over_blocks("accuracy", "test accuracy (%)"),
        "retained": lambda: over_blocks("retained", "retained contribution (%)"),
    }


def quick(config: Config) -> Config:
    """Two seeds, one epoch, two arms."""
    return replace(config, seeds=(0, 1), epochs=1, train_size=200, test_size=200, arms=ARMS[:2], weights=(0.1,))


EXPERIMENT = Experiment.of(
    __name__,
    data=parts_of,
    train=train,
    selects=("seeds", "arms", "weights", "drops", "changes", "tuning"),
    cost=lambda config, job: epochs_of(config, job),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
