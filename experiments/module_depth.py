"""Where greedy modules stagnate, and what the action does there [K24, figs 18, 42 and 43].

The accuracy after each module, with the action and without, under conditions that might make early modules overfit and
late ones add nothing or harm: modules in sequence, one classifier for all, many modules, few images, labels with noise.
Learning rate and tau are chosen for each on validation images, by the last module; the figures show test images, after
the last epoch, over seeds that share images and weights. And the accuracy of the last module over tau.

    python experiments/module_depth.py
    python experiments/module_depth.py --dataset mnist --folder DIR --conditions standard sequential --seeds 5
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from lab import images
from lab.config import ImageConfig, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Row, Run, command
from lab.modules import accuracies, accuracy_row, difference, in_modules, over_modules, sgd_in_modules
from lab.plotting import intervals
from lab.results import best_settings, groups
from lab.statistics import Interval, percent
from odenets import initialize
from odenets.module_wise import ModuleWise, greedy, trgl
from odenets.training import datasets
from odenets.training.data import Batches, TensorData


@dataclass(frozen=True)
class Condition:
    """What greedy modules are trained under.

    Attributes:
        modules: of one block each.
        size: training images.
        schedule: in which order modules are trained.
        same_head: one classifier for all modules.
        label_noise: share of the training labels that are drawn anew from all classes.
    """

    modules: int = 10
    size: int = 200
    schedule: Literal["parallel", "sequential"] = "parallel"
    same_head: bool = False
    label_noise: float = 0.0


CONDITIONS = {
    "standard": Condition(),
    "sequential": Condition(schedule="sequential"),
    "same head": Condition(same_head=True),
    "same head, sequential": Condition(same_head=True, schedule="sequential"),
    "20 modules": Condition(modules=20),
    "few images": Condition(size=50),
    "label noise": Condition(label_noise=0.4),
}


@dataclass(frozen=True)
class Config(ImageConfig):
    """What to train.

    Attributes:
        conditions: standard, sequential, same head, same head, sequential, 20 modules, few images, label noise.
        seeds: that are reported.
        tuning: seeds, of other images and weights, on which learning rate and tau are chosen.
        epochs: of a parallel training, and of each module in a sequential one.
        batch_size: of training.
        learning_rates, taus: tried.
        validation_size: images to choose on.
    """

    conditions: tuple[str, ...] = tuple(CONDITIONS)
    seeds: int = 5
    tuning: int = 2
    epochs: int = 20
    batch_size: int = 50
    learning_rates: tuple[float, ...] = (0.01, 0.05)
    taus: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    validation_size: int = 300
    output: Path = Path("runs/module_depth")

    def __post_init__(self) -> None:
        if unknown := set(self.conditions) - set(CONDITIONS):
            raise ValueError(f"conditions must be among {'; '.join(CONDITIONS)}, got {', '.join(sorted(unknown))}")
        check_at_least(self, 2, "seeds", "tuning")


@dataclass(frozen=True)
class Job:
    """One training; tau is 0 where there is no action (VanGL)."""

    condition: str
    learning_rate: float
    tau: float
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{_file_name(self.condition)}/lr{self.learning_rate:g}_tau{self.tau:g}_seed{self.seed}"


def _file_name(condition: str) -> str:
    return condition.replace(", ", "_").replace(" ", "_")


def parts_of(config: Config) -> tuple[TensorData, TensorData, TensorData]:
    """Images to draw training images from, validation and test images."""
    return images.pool_validation_test(config.dataset, config.folder, config.validation_size)


def training_images(pool: TensorData, condition: Condition, seed: int) -> TensorData:
    """The training images of a seed, with the condition's label noise."""
    return images.mislabel(datasets.subsample(pool, condition.size, seed=seed), condition.label_noise, seed)


def build(config: Config, condition: Condition, pool: TensorData, seed: int) -> ModuleWise:
    """One block per module, with the seed's weights."""
    network = images.resnet9(pool, seed, depth=condition.modules)
    modules = in_modules(network, condition.modules, pool, same_head=condition.same_head)
    return initialize(modules, "orthogonal", 0.1)


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train the modules of a job."""
    condition = CONDITIONS[job.condition]
    pool, validation, test = parts_of(config)
    part = training_images(pool, condition, job.seed)
    batches = Batches(part, config.batch_size, seed=job.seed, crop=0 if config.dataset == "digits" else 4)
    network = build(config, condition, pool, job.seed)
    options = {"objective": trgl(job.tau) if job.tau else greedy(), "epochs": config.epochs, "report": report}
    rows = sgd_in_modules(network, batches, job.learning_rate, condition.schedule, **options)
    last = {row["module"]: row["train_accuracy"] for row in rows}
    results = accuracies(network, batches, validation, None if job.tuning else test)
    return results | {"train": [last[k + 1] for k in range(network.K)]}


def jobs(config: Config) -> Jobs[Job]:
    """Every learning rate and tau under every condition; then what is reported."""
    return (yield choose(config, (yield candidates(config))))


def candidates(config: Config) -> list[Job]:
    """Every learning rate and tau under every condition, to choose from."""
    return [
        Job(condition, rate, tau, 10_000 + seed, tuning=True)
        for condition in config.conditions
        for rate in config.learning_rates
        for tau in (0.0, *config.taus)
        for seed in range(config.tuning)
    ]


def best(tuned: list[Row], condition: str, taus: tuple[float, ...]) -> tuple[float, float]:
    """Learning rate and tau that served the last module best on validation images."""
    results = [r for r in tuned if r["condition"] == condition and r["tau"] in taus]
    names = ("learning_rate", "tau")
    (chosen,) = best_settings(results, names, within=(), score=lambda r: r["validation"][-1:]).values()
    return chosen["learning_rate"], chosen["tau"]


def choose(config: Config, tuned: list[Row]) -> list[Job]:
    """What is reported: with the action and without, and under the first condition every tau."""
    first = config.conditions[0]
    ways = [(c, taus) for c in config.conditions for taus in ((0.0,), config.taus)]
    ways[2:2] = [(first, (tau,)) for tau in config.taus]
    settings = dict.fromkeys((condition, *best(tuned, condition, taus)) for condition, taus in ways)
    return [Job(*each, seed, tuning=False) for each in settings for seed in range(config.seeds)]


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """Two rows per condition, without the action and with it, differences paired over the seeds."""
    rows = []
    for (condition,), group in groups(results, "condition").items():
        # what is best without the action comes first, then what is best with it; more taus follow them
        plain, action, *_ = groups(group, "learning_rate", "tau").values()
        for method, of in (("VanGL", plain), ("TRGL", action)):
            row: Row = {"condition": condition, "method": method, **accuracy_row(of)}
            row["stagnation"] = percent(r["test"][-1] - max(r["test"]) for r in of)
            row["trained"] = percent(r["train"][0] for r in of)
            if method == "TRGL":
                for name, key, k in (("first", "test", 0), ("last", "test", -1), ("recalibrated", "recalibrated", -1)):
                    row[f"{name}_difference"], row[f"{name}_p"] = difference(of, plain, key, k)
            rows.append(row)
    return rows


COLUMNS: Columns = {
    "condition": "{condition}",
    "method": "{method}",
    "lr": "{learning_rate:g}",
    "tau": lambda row: f"{row['tau']:g}" if row["tau"] else "",
    "first module": "{first:.2f}",
    "first - VanGL": "{first_difference:.2f}",
    "last module": "{last:.2f}",
    "last - VanGL": "{last_difference:.2f}",
    "p": "{last_p:.2g}",
    "last - best module (on test)": "{stagnation:.2f}",
    "last, recomputed statistics": "{recalibrated:.2f}",
    "recomputed - VanGL": "{recalibrated_difference:.2f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: differences are called so where their 95 % interval leaves out 0."""
    lines = []
    for row in outcome.rows:
        if row["method"] == "VanGL":
            gain = row["last"].mean - row["first"].mean
            lines.append(f"{row['condition']}: VanGL goes {gain:+.2f} points from the first module to the last")
            continue
        for name in ("first", "last"):
            points = row[f"{name}_difference"]
            what = ("as good as", "above", "below")[points.sign]
            lines.append(f"{row['condition']}: the {name} module of TRGL is {what} VanGL's, {points:.2f} points")
    return lines


def details(config: Config, results: list[Row]) -> Row:
    """The accuracy of the last module by tau, under the first condition."""
    first = [r for r in results if r["condition"] == config.conditions[0]]
    by_tau = {tau: group for (tau,), group in groups(first, "tau").items()}
    # a tau can be reported at two learning rates only if two methods chose it; the one of its tau is the last
    return {"by_tau": {f"{t:g}": percent(r["test"][-1] for r in of[-config.seeds :]) for t, of in by_tau.items()}}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Accuracy over modules under each condition [K24, figs 18 and 42], and over tau under the first [K24, fig. 43]."""

    def over_tau() -> Figure:
        by_tau: dict[str, Interval] = outcome.detail("by_tau")
        series = {
            "TRGL": [(t, by_tau[f"{t:g}"]) for t in config.taus],
            "VanGL": [(t, by_tau["0"]) for t in config.taus],
        }
        return intervals(series, xlabel="tau", ylabel="test accuracy of the last module (%)", logarithmic=True)

    conditions = groups(outcome.rows, "condition").items()
    return {f"fig_18_{_file_name(c)}": over_modules(rows) for (c,), rows in conditions} | {"fig_43": over_tau}


def cost(config: Config, job: Job) -> int:
    """Epochs of all modules together."""
    condition = CONDITIONS[job.condition]
    return config.epochs * (condition.modules if condition.schedule == "sequential" else 1)


def quick(config: Config) -> Config:
    """One condition, few seeds and epochs."""
    config = replace(config, conditions=("few images",), seeds=2, tuning=2, epochs=1)
    return replace(config, learning_rates=(0.05,), taus=(0.1, 1.0))


EXPERIMENT = Experiment.of(
    __name__,
    selects=("conditions", "seeds", "tuning", "learning_rates", "taus"),
    settings=lambda config, job: asdict(CONDITIONS[job.condition]),
    keys=("name", "seed"),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
