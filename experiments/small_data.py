"""What the action buys on few images [K24, tables 1, 2 and 18], every method at its own best learning rate.

Three methods train ResNet-9 on a few labeled images: the plain network, a fixed weight of the action, and multipliers
that grow. [K24] trains all at one learning rate, with a lambda that multiplies the loss and so the step, and reports
the highest accuracy over epochs on test images. Here each method's learning rate and weight are chosen on validation
images; the accuracy is that after the last epoch on all test images, over instances that share their images and weights
at the start, so that differences are paired; and beside it stands the accuracy with batch norm's statistics recomputed
on the training images, since after few steps the running ones lag behind the weights. The protocol of [K24] has rows of
its own. Other conditions, where the action may help: labels with noise, deeper and wider networks, none with batch norm
in its blocks, a bad start.

    python experiments/small_data.py
    python experiments/small_data.py --dataset mnist --folder DIR --sizes 100
    python experiments/small_data.py --conditions "label noise" deep wide "no batch norm" "bad start" --sizes 100
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

from small_data_setup import METHODS, PROTOCOL, WAYS, Config, Job, epochs_of, parts_of, train

from lab.experiment import Columns, Experiment, Jobs, Outcome, Row, command
from lab.results import best_settings, groups
from lab.statistics import mean_interval, paired, paired_p_value
from lab.thesis import beside_thesis

TABLES = {"digits": "", "mnist": "1", "cifar10": "18"}  # of [K24]
PROTOCOL_SETTINGS = {"learning_rate": 0.01, "weight": 0.0}


def seed_groups(config: Config, first: int, number: int) -> list[tuple[int, ...]]:
    """Seeds from the first on, in groups that are trained together."""
    seeds = range(first, first + number)
    return [tuple(seeds[i : i + config.together]) for i in range(0, number, config.together)]


def candidates(config: Config, condition: str, size: int) -> list[Job]:
    """Every method at every learning rate and weight, to choose from."""
    weights = {"vanilla": (0.0,), "fixed weight": config.weights, "least action": config.lambdas}
    return [
        Job(condition, size, method, rate, weight, seeds, tuning=True)
        for method in METHODS
        for rate in config.learning_rates
        for weight in weights[method]
        for seeds in seed_groups(config, 10_000, config.tuning)
    ]


def choose(tuned: list[Row]) -> dict[tuple[str, str], Row]:
    """Per method, and per way of taking batch norm's statistics, the settings best on validation images."""
    names = ("learning_rate", "weight")
    return {
        (method, way): settings
        for way in WAYS
        for (method,), settings in best_settings(tuned, names, within=("method",), score=itemgetter(way)).items()
    }


def reported(config: Config, condition: str, size: int, chosen: dict[tuple[str, str], Row]) -> list[Job]:
    """The jobs whose test accuracy is reported, each only once."""
    ways: dict[tuple[str, float, float], tuple[str, ...]] = {(method, 0.01, 0.0): WAYS for method in PROTOCOL}
    for (method, way), settings in chosen.items():
        key = (method, settings["learning_rate"], settings["weight"])
        ways[key] = (*ways.get(key, ()), way)
    return [
        Job(condition, size, *each, seeds, tuning=False, ways=ways[each])
        for each in sorted(ways)
        for seeds in seed_groups(config, 0, config.instances)
    ]


def jobs(config: Config) -> Jobs[Job]:
    """What is chosen from, unless the protocol of [K24] stands alone; then what is reported."""
    places = [(condition, size) for condition in config.conditions for size in config.sizes]
    tuned = []
    if not config.protocol_only:
        tuned = yield [job for place in places for job in candidates(config, *place)]
    at = groups(tuned, "condition", "size")
    results = yield [job for place in places for job in reported(config, *place, choose(at.get(place, [])))]
    return [*tuned, *results]


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per condition, size, method and way, differences to the plain network paired over the instances."""
    kinds = [(METHODS, "last", "running"), (METHODS, "recalibrated", "recomputed")]
    kinds += [(PROTOCOL, "max", "running, max over epochs"), (PROTOCOL, "last", "running")]
    kinds += [(PROTOCOL, "recalibrated", "recomputed")]
    rows = []
    for (condition, size), group in groups(results, "condition", "size").items():
        chosen = choose([r for r in group if r["tuning"]])
        of = groups((r for r in group if not r["tuning"]), "method", "learning_rate", "weight")
        for methods, way, shown in kinds:
            if methods == METHODS and not chosen:
                continue
            plain: list[float] = []
            for method in methods:
                settings = chosen.get((method, way), PROTOCOL_SETTINGS)
                seeds = sorted(of[method, settings["learning_rate"], settings["weight"]], key=lambda r: r["seeds"])
                accuracy = [100 * value for r in seeds for value in r[way]]
                row = {"condition": condition, "size": size, "method": method, "statistics": shown, **settings}
                row["accuracy"] = mean_interval(accuracy)
                statistic = "last" if way == "max" else way
                row["action"] = mean_interval([value for r in seeds for value in r[f"action_{statistic}"]])
                if plain:
                    row |= {"difference": paired(accuracy, plain), "p": paired_p_value(accuracy, plain)}
                plain = plain or accuracy
                if condition == "standard" and way == "max":
                    kind = method.removeprefix("thesis: ").removesuffix(", divided")
                    row |= beside_thesis(row["accuracy"], TABLES[config.dataset], size, kind)
                rows.append(row)
    return rows


COLUMNS: Columns = {
    "condition": "{condition}",
    "images": "{size}",
    "method": "{method}",
    "batch norm": "{statistics}",
    "lr": "{learning_rate:g}",
    "weight": lambda row: f"{row['weight']:g}" if row["weight"] else "",
    "test accuracy": "{accuracy:.2f}",
    "- vanilla": "{difference:.2f}",
    "p": "{p:.2g}",
    "action": "{action.mean:.3g}",
    "thesis": "{thesis:.2f}",
    "meets": "{meets}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    what = ("no difference to", "better than", "worse than")
    return [
        f"{row['condition']}, {row['size']} images, {row['method']} ({row['statistics']} statistics): "
        f"{what[row['difference'].sign]} the plain network, {row['difference']:.2f} points, p = {row['p']:.2g}"
        for row in outcome.rows
        if "difference" in row
    ]


def quick(config: Config) -> Config:
    """One size, few instances and epochs."""
    config = replace(config, sizes=(50,), instances=2, tuning=2, epochs=2, protocol_epochs=2)
    return replace(config, learning_rates=(0.03,), weights=(1.0,), lambdas=(1.0,))


EXPERIMENT = Experiment.of(
    __name__,
    data=parts_of,
    train=train,
    selects=(
        *("sizes", "conditions", "instances", "tuning", "learning_rates", "weights", "lambdas"),
        *("protocol_only", "together"),
    ),
    cost=lambda config, job: epochs_of(config, job) * len(job.seeds),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
