"""How few evaluations a neural ODE can do with, at the same accuracy, while its flow goes on doing the work.

A classifier whose encoder and head can do nothing alone is trained plain, with the action of its flow, with the
embedded error that the solver estimates (Pal et al. 2021), with both, with the acceleration along its paths (the
regularizer R_2 of Kelly et al. 2020, read off the stages), and over shorter total times, the simplest rival. None of
the penalties evaluates the field once more. Counted are the field's evaluations in a pass over test images at rtol =
atol = 1e-3 and 1e-5, by the method that it was trained with and by dopri5, which it was not.

A penalty may make a flow cheap by letting it do nothing. So the accuracy with the flow removed stands beside every
other: what the flow contributes is the difference. "no flow" is a network trained without one.

The rule of choice, written down before the runs: of the settings of an arm, the one with the fewest evaluations at
1e-5 on validation images among those whose validation accuracy is at most one standard error of the plain network's
below it, and whose contribution is at least 80 % of the plain one's; where there is none, the setting with the highest
validation accuracy. What the same rule without the contribution chooses is marked too. Differences and ratios are
paired over seeds. The target: at most 0.6 of the plain evaluations at 1e-5, an accuracy whose difference to the plain
one is not below 0, at least 80 % of its contribution, and fewer evaluations than a shorter total time.

    python experiments/evaluations.py
    python experiments/evaluations.py --dataset mnist --folder DIR --train-size 2500 --test-size 2000 --epochs 10
    python experiments/evaluations.py --dataset cifar10 --folder DIR --train-size 5000 --test-size 2000 --choosing 2
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from evaluations_setup import Config, Job, parts_of, train, tried
from matplotlib.figure import Figure

from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Row, command
from lab.plotting import intervals
from lab.results import groups
from lab.statistics import Interval, mean_interval, paired, percent

EVALUATIONS = "evaluations_1e-05"
ACCURACY = "1e-05"
COUNTS = {"ratio_loose": "evaluations_0.001", "ratio": EVALUATIONS, "ratio_dopri5": "evaluations_dopri5"}
SHARE, TARGET = 0.8, 0.6  # of the plain contribution, of the plain evaluations


def jobs(config: Config) -> Jobs[Job]:
    """Every setting on the seeds that choose, then the chosen ones on the others."""
    first = config.seeds[: config.choosing or None]
    every = [(arm, setting) for arm in config.arms for setting in tried(config, arm)]
    results = yield [Job(arm, seed, **setting) for seed in first for arm, setting in every]
    wanted = {(arm, name) for arm, of in chosen(results).items() for name in of.values()}
    wanted |= {("plain", row["setting"]) for row in results if row["arm"] == "plain"}
    rest = [Job(arm, seed, **setting) for seed in config.seeds[len(first) :] for arm, setting in every]
    more = (yield [job for job in rest if (job.arm, job.setting) in wanted]) if rest else []
    return sorted([*results, *more], key=lambda r: (config.arms.index(r["arm"]), r["seed"]))


def contribution(row: Row, part: str) -> float:
    """Accuracy that is lost without the flow."""
    return row[f"{part}_{ACCURACY}"] - row[f"{part}_without"]


def chosen(results: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Per arm the setting that the rule chooses, "rule", and that without the contribution, "accuracy alone"."""
    arms = groups(results, "arm")
    plain = arms["plain",]
    accuracy = [r[f"validation_{ACCURACY}"] for r in plain]
    error = statistics.stdev(accuracy) / len(accuracy) ** 0.5 if len(accuracy) > 1 else 0.0
    enough = SHARE * statistics.fmean(contribution(r, "validation") for r in plain)
    choices: dict[str, dict[str, str]] = {}
    for (arm,), of in arms.items():
        means = []
        for (setting,), rows in groups(of, "setting").items():
            right = statistics.fmean(r[f"validation_{ACCURACY}"] for r in rows)
            does = statistics.fmean(contribution(r, "validation") for r in rows)
            evaluations = statistics.fmean(r[f"validation_{EVALUATIONS}"] for r in rows)
            means.append((setting, right, does, evaluations))
        right = [each for each in means if each[1] >= statistics.fmean(accuracy) - error]
        ways = {"rule": [each for each in right if each[2] >= enough], "accuracy alone": right}
        best = max(means, key=lambda each: each[1])
        choices[arm] = {way: min(of, key=lambda each: each[3], default=best)[0] for way, of in ways.items()}
    return choices


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per setting, beside the plain network of the same seeds."""
    first = config.seeds[: config.choosing or None]
    choices = chosen([r for r in results if r["seed"] in first])
    plain = {r["seed"]: r for r in results if r["arm"] == "plain"}
    rows = []
    for (arm, setting), of in groups(results, "arm", "setting").items():
        beside = [plain[r["seed"]] for r in of]
        row: Row = {"arm": arm, "setting": setting}
        row["chosen"] = ", ".join(way for way, name in choices[arm].items() if name == setting)
        for name in ("validation", "test"):
            row[name] = percent(r[f"{name}_{ACCURACY}"] for r in of)
        row["loose"] = percent(r["test_0.001"] for r in of)
        row["without"] = percent(r["test_without"] for r in of)
        row["contribution"] = percent(contribution(r, "test") for r in of)
        row["seconds"] = mean_interval([r["seconds"] for r in of])
        row["training_evaluations"] = mean_interval([r["training_evaluations"] for r in of])
        for name in (*COUNTS.values(), "action", "acceleration"):
            row[name] = mean_interval([r[f"test_{name}"] for r in of])
        right = [[100 * r[f"test_{ACCURACY}"] for r in rows] for rows in (of, beside)]
        row["difference"] = paired(*right)
        pairs = list(zip(of, beside, strict=True))
        row["share"] = percent(contribution(r, "test") / (contribution(b, "test") or math.nan) for r, b in pairs)
        if row[EVALUATIONS].mean:
            for short, name in COUNTS.items():
                row[short] = mean_interval([r[f"test_{name}"] / b[f"test_{name}"] for r, b in pairs])
        row["time"] = mean_interval([r["seconds"] / b["seconds"] for r, b in pairs])
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "trained": "{arm}",
    "setting": "{setting}",
    "chosen": "{chosen}",
    "accuracy (%)": "{test:.2f}",
    "- plain": "{difference:.2f}",
    "without flow": "{without:.1f}",
    "flow's share": lambda row: f"{row['share']:.0f} %",
    "evals 1e-3": lambda row: f"{row['evaluations_0.001'].mean:.1f}",
    "evals 1e-5": lambda row: f"{row[EVALUATIONS].mean:.1f}",
    "of plain": lambda row: f"{row['ratio']:.2f}" if "ratio" in row else "",
    "dopri5 1e-5": lambda row: f"{row['ratio_dopri5']:.2f}" if "ratio" in row else "",
    "s": "{seconds.mean:.1f}",
    "action": "{action.mean:.3g}",
    "acceleration": "{acceleration.mean:.3g}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says of each arm, in sentences."""
    rows = {row["arm"]: row for row in outcome.rows if "rule" in row["chosen"].split(", ") and "ratio" in row}
    rival = rows.get("shorter time")
    lines = []
    for arm, row in rows.items():
        if arm == "plain":
            continue
        parts = {
            f"{row['ratio']:.2f} of the plain evaluations at 1e-5": row["ratio"].mean <= TARGET,
            f"accuracy {row['difference']:.2f} points from plain": row["difference"].sign >= 0,
            f"{row['share']:.0f} % of the plain contribution": row["share"].mean >= 100 * SHARE,
        }
        if rival is not None and rival is not row:
            ahead = paired(row[EVALUATIONS].values, rival[EVALUATIONS].values)
            parts[f"{ahead:.1f} evaluations from a shorter time's"] = ahead.sign < 0
        what = "the target is reached" if all(parts.values()) and rival is not row else "the target is not reached"
        told = "; ".join(f"{words} ({'yes' if held else 'no'})" for words, held in parts.items())
        lines.append(f"{arm}, {row['setting']}: {what}: {told}")
    return lines


def trade_off(rows: Sequence[Row]) -> Figure:
    """Accuracy over evaluations, a line per arm."""
    series: dict[str, list[tuple[float, Interval]]] = {}
    for row in sorted((row for row in rows if "ratio" in row), key=lambda row: row[EVALUATIONS].mean):
        series.setdefault(row["arm"], []).append((row[EVALUATIONS].mean, row["test"]))
    return intervals(series, xlabel="evaluations at 1e-5", ylabel="test accuracy (%)")


def figures(config: Config, outcome: Outcome) -> Figures:
    """What accuracy the evaluations buy."""
    return {"trade_off": lambda: trade_off(outcome.rows)}


def quick(config: Config) -> Config:
    """Two seeds, one setting of an arm, an epoch."""
    config = replace(config, seeds=config.seeds[:2], epochs=1, train_size=200, test_size=100, features=8)
    return replace(config, times=(0.5,), actions=(0.1,), errors=(100.0,), accelerations=(1.0,))


EXPERIMENT = Experiment.of(
    __name__,
    data=parts_of,
    train=train,
    selects=("arms", "times", "actions", "errors", "accelerations", "seeds", "choosing"),
    cost=lambda config, job: config.epochs,
    keys=("arm", "setting", "seed"),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
