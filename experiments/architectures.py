"""What do the architectures that come from numerical schemes do on one budget of parameters, and one of evaluations?

A network of each scheme is as wide as a number of parameters lets it be, or as deep as a number of field evaluations,
but for implicit steps, which take as many as they need. All are trained by Adam, at one learning rate or at that of
several which is best on validation images of a seed of its own. Told are, after the last epoch: accuracy on test images
as they are, with Gaussian noise, and after a step against the label by the sign of the gradient; what a training step
keeps in memory; how far the first states are missed, where they can be computed back; the action; and the largest step
size at which a training still learns.

    python experiments/architectures.py
    python experiments/architectures.py --dataset cifar10 --folder DIR --train-size 5000 --parameters 60000
        --channels 16 --flows 2 --stride 2 --epochs 12
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from architectures_setup import ARCHITECTURES, SIZES, Config, Job, epochs_of, train
from matplotlib.figure import Figure

from lab import plotting
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Row, command
from lab.results import best_settings, groups
from lab.statistics import mean_interval, paired, percent
from lab.training import parts_of

PLAIN = "ResNet (Euler)"


def jobs(config: Config) -> Jobs[Job]:
    """Learning rates to choose from; then every network and its step sizes."""
    networks = [
        (budget, name) for name in config.architectures for budget in config.budgets
        if budget != "evaluations" or not ARCHITECTURES[name].iterates
    ]  # fmt: skip
    networks.sort(key=lambda network: not ARCHITECTURES[network[1]].iterates)  # what takes longest begins first
    tuned: list[Row] = []
    if len(config.rates) > 1:
        tuned = yield [
            Job(name, budget, rate, 10_000, tuning=True)
            for budget, name in networks for rate in rates_of(config, name)
        ]  # fmt: skip
    rates = choose(config, tuned)
    sizes = [
        Job(name, "step size", rates[budget, name], config.seeds[0], size)
        for budget, name in networks if budget == config.budgets[0] for size in SIZES
    ]  # fmt: skip
    results = yield [
        *(Job(name, budget, rates[budget, name], seed) for seed in config.seeds for budget, name in networks),
        *sizes,
    ]
    return [*tuned, *results]


def rates_of(config: Config, architecture: str) -> list[float]:
    """Learning rates to choose from."""
    return [rate * ARCHITECTURES[architecture].rates for rate in config.rates]


def choose(config: Config, tuned: list[Row]) -> dict[tuple[str, ...], float]:
    """The learning rate of each architecture on each budget that is best on validation images."""
    if len(config.rates) == 1:
        return {(budget, name): rates_of(config, name)[0] for budget in config.budgets for name in config.architectures}
    best = best_settings(tuned, ("rate",), within=("budget", "architecture"), score=lambda row: [row["validation"]])
    return {place: settings["rate"] for place, settings in best.items()}


def largest_size(rows: list[Row]) -> float:
    """The largest factor up to which all trainings learn: end, and at half the validation accuracy at 1 or above."""
    plain = statistics.fmean(row["validation"] for row in rows if row["size"] == 1.0)
    largest = 0.0
    for (size,), its in sorted(groups(rows, "size").items()):
        if any(row["diverged"] or not row["validation"] >= plain / 2 > 0 for row in its):
            break
        largest = size
    return largest


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """A row per budget and architecture; differences to the residual network are paired over the seeds."""
    reported = groups((row for row in results if not row["tuning"]), "budget", "architecture")
    rows: list[Row] = []
    for budget in config.budgets:
        plain = _by_seed(reported.get((budget, PLAIN), []))
        for name in config.architectures:
            its = _by_seed(reported.get((budget, name), []))
            if not its:  # an implicit step takes as many evaluations as it needs
                continue
            lived = [row for row in its if not row["diverged"]]
            row: Row = {"budget": budget, "architecture": name, "rate": its[0]["rate"]}
            row["diverged"] = len(its) - len(lived)
            row["accuracy"] = percent(0.0 if one["diverged"] else one["test"] for one in its)
            if plain and name != PLAIN:
                other = percent(0.0 if one["diverged"] else one["test"] for one in plain)
                row["difference"] = paired([*row["accuracy"].values], [*other.values])
            if lived:
                first = lived[0]
                row |= {key: first[key] for key in ("parameters", "depth", "channels", "evaluations")}
                row["kib"] = first["memory"] / 1024
                if first["inverse"] is not None:
                    row["inverse"] = first["inverse"]
                row |= {key: percent(one[key] for one in lived) for key in ("noise", "attack")}
                row["action"] = mean_interval([one["action"] for one in lived])
                row["norms"] = [
                    statistics.fmean(values) for values in zip(*(one["norms"] for one in lived), strict=True)
                ]
            if sizes := reported.get(("step size", name)):
                row["largest"] = largest_size(sizes)
            rows.append(row)
    return rows


def _by_seed(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["seed"])


COLUMNS: Columns = {
    "one budget of": "{budget}",
    "architecture": "{architecture}",
    "parameters": "{parameters}",
    "blocks": "{depth}",
    "channels": "{channels}",
    "evaluations": "{evaluations}",
    "test accuracy (%)": "{accuracy:.2f}",
    "- ResNet": "{difference:.2f}",
    "with noise (%)": "{noise:.1f}",
    "attacked (%)": "{attack:.1f}",
    "memory (KiB)": "{kib:.0f}",
    "inverse error": "{inverse:.1e}",
    "action": "{action.mean:.3g}",
    "largest h": "{largest:g}",
    "learning rate": "{rate:g}",
    "diverged": lambda row: row["diverged"] or "",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """Which architectures differ from the residual network on the same budget, by 95 % intervals of paired seeds.

    The intervals are not corrected for how many architectures there are: of twenty that are no
    different one is told to be.
    """
    lines = []
    for (budget,), rows in groups(outcome.rows, "budget").items():
        signs = {1: "ahead of", -1: "behind", 0: "no different from"}
        differing = [row for row in rows if "difference" in row]
        for sign, word in signs.items():
            names = [row["architecture"] for row in differing if row["difference"].sign == sign]
            if names:
                lines.append(f"on one budget of {budget}, {word} the residual network: {', '.join(names)}")
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy against evaluations, and the norm of the state along the depth, for each budget."""
    made: Figures = {}
    for (budget,), rows in groups(outcome.rows, "budget").items():
        shown = [row for row in rows if "evaluations" in row]
        made[f"accuracy_{budget}"] = lambda shown=shown: plotting.accuracy_by_evaluations(shown)
        made[f"norms_{budget}"] = lambda shown=shown: _norms(shown)
    return made


def _norms(rows: list[Row]) -> Figure:
    return plotting.norms_along_depth({row["architecture"]: row["norms"] for row in rows})


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(
        config,
        seeds=(0,),
        epochs=1,
        short_epochs=1,
        train_size=200,
        test_size=100,
        rates=(0.1,),
        parameters=8000,
        blocks=2,
        evaluations=4,
    ),
    data=parts_of,
    train=train,
    selects=("seeds", "architectures", "budgets"),
    cost=epochs_of,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
