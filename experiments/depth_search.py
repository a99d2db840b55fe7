"""Ways to find a depth: one adaptive training against training several depths and choosing on validation data.

    python experiments/depth_search.py
    python experiments/depth_search.py --dataset cifar10 --folder DIR --train-size 5000 --features 16

The search trains a network of each depth and takes the one that is best on validation images; what it costs are the
field evaluations of all of them. Its cheaper rivals see the same trainings: successive halving drops the worse half
after a quarter and after half of the epochs; another trains ever deeper ones until the next is no better. An adaptive
network is trained once, from one block or from the deepest network's; its tolerance is fixed beforehand, and others
stand beside it, as does the choice among them, which costs all of their trainings. Doubled and stacked networks grow
from one block to the deepest network's without a choice. Checks of errors and the validation passes that choose are
counted. Every accuracy is that after the last epoch, on test images.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_depth_setup import DepthConfig, Job, train

from lab import plotting
from lab.config import check_any
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Row, command
from lab.results import groups
from lab.statistics import Interval, mean_interval, paired, paired_p_value, percent
from lab.training import parts_of


@dataclass(frozen=True)
class Config(DepthConfig):
    """What is trained.

    Attributes:
        depths: that the search trains.
        tolerances: of the adaptive networks; the rule's own is the one that counts.
        growing: whether networks are doubled and stacked as well.
    """

    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    tolerances: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    growing: bool = True
    output: Path = Path("runs/depth_search")

    def __post_init__(self) -> None:
        check_any(self, "seeds", "depths", "tolerances")
        if self.tolerance not in self.tolerances:
            raise ValueError(f"tolerances must hold the rule's own, {self.tolerance:g}, got {self.tolerances}")


def jobs(config: Config) -> Jobs[Job]:
    """A network of each depth, adaptive ones from the first and from the last, and those that grow."""
    first, last = min(config.depths), max(config.depths)
    kinds: list[dict[str, Any]] = [{"network": f"fixed {d}", "depth": d} for d in config.depths]
    for tolerance in config.tolerances:
        kinds += [
            {"network": f"adaptive from {d}, {tolerance:g}", "depth": d, "way": "adaptive", "tolerance": tolerance}
            for d in sorted({first, last})
        ]
    if config.growing:
        kinds += [{"network": f"{way} to {last}", "depth": last, "way": way} for way in ("doubling", "stacking")]
    common: dict[str, Any] = {
        "part": "search",
        "total_time": config.total_time,
        "tolerance": config.tolerance,
        "rate": config.learning_rate,
    }
    return (yield [Job(**common | kind, seed=seed) for seed in config.seeds for kind in kinds])


@dataclass(frozen=True)
class Way:
    """How one seed came to a network.

    Attributes:
        accuracy: on test images, as a share.
        depth: blocks of the network.
        spent: field evaluations, summed over samples, of all trainings, checks and choices.
    """

    accuracy: float
    depth: int
    spent: int


def alone(result: Row) -> Way:
    """A training that is taken as it is."""
    return Way(result["solution"], result["final_depth"], result["training_evaluations"] + result["check_evaluations"])


def search(trained: Sequence[Row], validation: int) -> Way:
    """All are trained, the best on validation images is taken; of equals the first."""
    best = max(trained, key=lambda r: r["validation"])
    spent = sum(alone(r).spent + validation * r["evaluations_per_forward"] for r in trained)
    return replace(alone(best), spent=spent)


def halving(trained: Sequence[Row], validation: int, epochs: int) -> Way:
    """Successive halving: the worse half goes after a quarter of the epochs, and of the rest after half of them."""
    left, spent, before = list(trained), 0, dict[str, int]()
    for end in (max(1, epochs // 4), max(1, epochs // 2), epochs):
        for r in left:
            now = r["spent"][end - 1]
            spent += now - before.get(r["name"], 0) + validation * r["evaluations_per_forward"]
            before[r["name"]] = now
        left.sort(key=lambda r, end=end: -r["validated"][end - 1])
        left = left[: max(1, len(left) // 2)]
    return replace(alone(left[0]), spent=spent)


def deepening(trained: Sequence[Row], validation: int) -> Way:
    """Ever deeper ones are trained, until one is no better than the best so far."""
    seen: list[Row] = []
    for r in sorted(trained, key=lambda r: r["final_depth"]):
        better = not seen or r["validation"] > max(s["validation"] for s in seen)
        seen.append(r)
        if not better:
            break
    return search(seen, validation)


def ways_of(config: Config, results: Sequence[Row], validation: int) -> dict[str, Way]:
    """Every way to a network, of one seed, whose trainings have all gone well."""
    fixed = [r for r in results if r["way"] == "fixed"]
    ways = {
        "search": search(fixed, validation),
        "successive halving": halving(fixed, validation, config.epochs),
        "deeper until no better": deepening(fixed, validation),
    }
    adaptive = [r for r in results if r["way"] == "adaptive"]
    for (start,), group in groups(adaptive, "depth").items():
        own = next(r for r in group if r["tolerance"] == config.tolerance)
        ways[f"adaptive from {start}"] = alone(own)
        if len(group) > 1:
            ways[f"adaptive from {start}, tolerance chosen"] = search(group, validation)
    ways |= {r["network"]: alone(r) for r in adaptive if r["tolerance"] != config.tolerance}
    return ways | {r["network"]: alone(r) for r in [*fixed, *results] if r["way"] != "adaptive"}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per way, over the seeds none of whose trainings diverged; differences to the search are paired."""
    validation = len(parts_of(config).validation)
    by_seed = groups(results, "seed")
    well = [group for group in by_seed.values() if not any(r["diverged"] for r in group)]
    if not well:
        raise ValueError("no seed is left whose networks all trained: lower learning_rate")
    ways = [ways_of(config, group, validation) for group in well]
    rows, searched = [], [each["search"] for each in ways]
    without = [statistics.fmean(r["without_flow"] for r in group if r["way"] == "fixed") for group in well]
    for name in ways[0]:
        of = [each[name] for each in ways]
        row: Row = {"way": name, "depths": [way.depth for way in of], "diverged": len(by_seed) - len(well)}
        row["accuracy"] = percent(way.accuracy for way in of)
        row["evaluations"] = mean_interval([way.spent for way in of])
        row["share"] = mean_interval([way.spent / other.spent for way, other in zip(of, searched, strict=True)])
        if name != "search":
            accuracies = [100 * way.accuracy for way in of], [100 * way.accuracy for way in searched]
            row["difference"] = paired(*accuracies)
            if len(of) > 1:
                row["p"] = paired_p_value(*accuracies)
        rows.append(row)
    rows.append({"way": "encoder and head of the fixed networks", "accuracy": percent(without)})
    return rows


COLUMNS: Columns = {
    "way": "{way}",
    "blocks": lambda row: " ".join(map(str, row["depths"])),
    "test accuracy (%)": "{accuracy:.2f}",
    "- search": "{difference:.2f}",
    "p": "{p:.2g}",
    "evaluations": lambda row: f"{row['evaluations'].mean / 1e3:,.0f} k",
    "of the search's": "{share:.2f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says of the target: at most 0.35 of the search's evaluations at an accuracy that is not below."""
    lines = []
    for row in outcome.rows:
        if "difference" not in row:
            continue
        difference: Interval = row["difference"]
        words = ("no difference to", "better than", "worse than")
        how = words[difference.sign] if difference.n > 1 else "one seed, beside"
        lines.append(
            f"{row['way']}: {how} the search ({difference:.2f} points) for {row['share'].mean:.2f} of its evaluations"
        )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy against cost, of every way."""
    return {"cost": lambda: plotting.ways_against_cost(outcome.rows)}


def quick(config: Config) -> Config:
    """Two seeds, three depths, two epochs."""
    return replace(config, seeds=(0, 1), depths=(1, 2, 4), tolerances=(3e-3,), epochs=3, train_size=300, max_depth=8)


EXPERIMENT = Experiment.of(
    __name__,
    train=train,
    data=parts_of,
    selects=("seeds", "depths", "tolerances", "growing", "tolerance", "learning_rate", "total_time"),
    cost=lambda config, job: config.epochs,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
