"""Least action in two dimensions [K24, tables 19 to 22, sections 3.2.2, 5.4.1 and F.5].

Points of two concentric circles are to be carried to the two sides of a fixed line, ``x1 + x2 = -20``, by a residual
network whose blocks have two hidden units. A hundred instances, each with points and weights of its own, are trained
together. [K24] reports the highest accuracy over all epochs on the test points; beside it stands what can be had:
the accuracy after the last epoch, and that after the epoch chosen on other points, both on a thousand new points.

    python experiments/circles.py
    python experiments/circles.py --tables 20 --instances 20
    python experiments/circles.py --dataset moons
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lab.config import Config as CommonConfig
from lab.config import check_among, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Row, Run, command
from lab.statistics import mean_interval, paired, percent
from lab.thesis import beside_thesis, thesis
from odenets import Flow, MLPField, Network, initialize, plotting
from odenets.checkpoints import load_weights, save_weights
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy, Objective
from odenets.transport import moves, states_of

METHODS = ("resnet", "fixed lambda", "lap")
NORMS = ("plain", "batch norm")
PERFECT = ("train", "test")
"""Data sets on which a network is to be right, three epochs running."""


@dataclass(frozen=True)
class Setting:
    """What a table trains: points, blocks, initialization, and the weight of its fixed lambda."""

    points: int
    blocks: int
    initial: Literal["kaiming", "normal"]
    weight: float


SETTINGS = {
    "19": Setting(1000, 1, "kaiming", 0.005),
    "20": Setting(1000, 100, "kaiming", 0.09),
    "21": Setting(50, 9, "kaiming", 0.04),
    "22": Setting(1000, 9, "normal", 0.04),
    "epochs": Setting(1000, 2, "kaiming", 0.01),
    "figures": Setting(1000, 9, "kaiming", 0.07),
}


@dataclass(frozen=True)
class Config(CommonConfig):
    """What to train.

    Attributes:
        tables: of [K24], 19 to 22; "epochs" for the epochs to 100 % of F.5.2, "figures" for its well initialized
            network of nine blocks.
        instances: per cell.
        epochs: at most; an instance ends after three epochs without a fault on training and test points.
        dataset: circles or moons.
        batch_size: of training.
    """

    tables: tuple[str, ...] = ("19", "21", "22", "epochs", "figures")
    instances: int = 100
    epochs: int = 100
    dataset: Literal["circles", "moons"] = "circles"
    batch_size: int = 10
    output: Path = Path("runs/circles")

    def __post_init__(self) -> None:
        check_among(self, "tables", SETTINGS)
        check_at_least(self, 1, "instances", "epochs")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a network whose instances are trained together."""

    table: str
    method: str
    norm: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.table}_{self.method.replace(' ', '_')}{'_bn' * self.norm}"


def jobs(config: Config) -> Jobs[Cell]:
    """The cells of the tables, those of a table together; what takes longest begins first."""
    cells = []
    for name in config.tables:
        methods = METHODS[:2] if name == "epochs" else METHODS
        norms = (False,) if name == "figures" else (False, True)
        cells += [Cell(name, method, norm) for method in methods for norm in norms]
    results = yield sorted(cells, key=lambda cell: -SETTINGS[cell.table].blocks * SETTINGS[cell.table].points)
    names = [cell.name for cell in cells]
    return sorted(results, key=lambda r: names.index(r["name"]))


class Boundary(nn.Module):
    """The fixed classifier: logits ``(x1 + x2 + 20, 0)``, whose boundary is 14 units away from the points."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of points ``(B, 2)``."""
        z = x.sum(1) + 20
        return torch.stack([z, torch.zeros_like(z)], 1)


def build(setting: Setting, norm: bool, seed: int) -> Network:
    """A network of the setting with the seed's weights."""
    torch.manual_seed(seed)
    field = partial(MLPField, 2, 2, activation="relu", norm="batch" if norm else None)
    network = Network(nn.Identity(), Flow(field, solver="euler", h=1.0, depth=setting.blocks), Boundary())
    normal = setting.initial == "normal"
    return initialize(network, setting.initial, 5.0 if normal else 1.0, biases=normal)


def objective(method: str, setting: Setting) -> Objective:
    """What a method minimizes, as in [K24]: the unsquared norm, lambda as a factor of the loss."""
    match method:
        case "resnet":
            return CrossEntropy()
        case "fixed lambda":
            return ActionPenalty(setting.weight, cost="norm")
        case _:
            return LeastAction(lambda0=0.1, tau=0.1, every=5, cost="norm", update="after", weigh="multiply")


def points_of(config: Config, setting: Setting, seed: int) -> dict[str, TensorData]:
    """The points of an instance: training and test as in [K24], and others to choose on and to report."""
    train, test = datasets.hold_out(datasets.points(config.dataset, setting.points, seed), 0.2, seed=seed)
    chosen, fresh = (datasets.points(config.dataset, n, seed + k) for n, k in ((200, 1_000_000), (1000, 2_000_000)))
    return {"train": train, "test": test, "validation": chosen, "fresh": fresh}


def train(config: Config, cell: Cell, run: Run, report: Report) -> Row:
    """Train the instances of a cell, and keep the weights of the first."""
    setting = SETTINGS[cell.table]
    parts = [points_of(config, setting, seed) for seed in range(config.instances)]
    trained = fit_instances(
        [build(setting, cell.norm, seed) for seed in range(config.instances)],
        [Batches(part["train"], config.batch_size) for part in parts],
        epochs=config.epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01, betas=(0.9, 0.99), fused=True),
        objective=lambda: objective(cell.method, setting),
        measured={name: [part[name] for part in parts] for name in parts[0]},
        perfect=PERFECT,
        report=report,
    )
    chosen = trained.accuracy["validation"].argmax(1, keepdim=True)  # the first of the best epochs
    results = {
        "max": trained.accuracy["test"].amax(1),
        "last": trained.accuracy["fresh"][:, -1],
        "chosen": trained.accuracy["fresh"].gather(1, chosen)[:, 0],
        "epochs": trained.epochs.float(),
        "arrived": torch.stack([(trained.accuracy[name][:, -3:] == 1).all(1) for name in PERFECT]).all(0),
    }
    save_weights(trained.networks[0], run.folder / "weights.safetensors")
    values: Row = {name: value.tolist() for name, value in results.items()}
    if cell.table == "figures":
        test = [part["test"].x for part in parts[:10]]
        values["gap"] = [moves(network, x).gap for network, x in zip(trained.networks, test, strict=False)]
    return values


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per cell, [K24]'s figures and the paired difference to the plain network beside ours."""
    cells = {(r["table"], r["method"], r["norm"]): r for r in results}
    rows = []
    for (table, method, norm), r in cells.items():
        row: Row = {"table": table, "method": method, "norm": norm}
        row |= {"maximum": percent(r["max"]), "last": percent(r["last"])}
        arrived = [n for n, faultless in zip(r["epochs"], r["arrived"], strict=True) if faultless]
        row |= {"chosen": percent(r["chosen"]), "arrived": len(arrived), "instances": len(r["arrived"])}
        if arrived:
            row["epochs"] = mean_interval(arrived)
        if method != "resnet":
            for name in ("max", "chosen"):
                row[f"{name}_difference"] = 100 * paired(r[name], cells[table, "resnet", norm][name])
        if config.dataset == "circles":
            row |= beside_thesis(row["maximum"], table, method, NORMS[norm])
        if "gap" in r:
            row["gap"] = mean_interval(r["gap"])
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "table": "{table}",
    "network": "{method}",
    "bn": "{norm}",
    "thesis: max": "{thesis:.1f}",
    "max": "{maximum:.1f}",
    "meets": "{meets}",
    "max - resnet": "{max_difference:.1f}",
    "last": "{last:.1f}",
    "chosen": "{chosen:.1f}",
    "chosen - resnet": "{chosen_difference:.1f}",
    "faultless": "{arrived} of {instances}",
    "after epochs": lambda row: f"{row['epochs']:.1f}" if row["arrived"] else "",
}


CLAIMS = {
    ("19", "lap", False): "least action over the plain network of one block",
    ("21", "fixed lambda", False): "fixed lambda over the plain network with 50 points",
    ("22", "lap", False): "least action over the plain network at N(0, 5) without batch norm",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says of the claims, in sentences."""
    lines = []
    rows = {(row["table"], row["method"], row["norm"]): row for row in outcome.rows}
    for cell, claim in CLAIMS.items():
        if row := rows.get(cell):
            lines.append(
                f"{claim}: {row['max_difference']:.1f} points at the maximum over epochs, "
                f"{row['chosen_difference']:.1f} at the epoch chosen on validation (paired)"
            )
    for (table, method, norm), row in rows.items():
        if table != "epochs":
            continue
        after = f", after {row['epochs']:.1f} epochs" if "epochs" in row else ""
        lines.append(
            f"two blocks, {method}{', batch norm' * norm}: {row['arrived']} of {row['instances']} end with three "
            f"epochs without a fault{after} (thesis {thesis('F.5.2', method, NORMS[norm])})"
        )
    if gaps := [f"{row['method']} {row['gap']:.3f}" for row in outcome.rows if "gap" in row]:
        way = "way of the points over the shortest (root mean square displacement over W2, minus 1): "
        lines.append(way + ", ".join(gaps))
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Point clouds and displacements of the first instance."""
    test = points_of(config, SETTINGS["figures"], 0)["test"]

    def network(cell: Cell) -> Network:
        built = build(SETTINGS[cell.table], cell.norm, 0)
        load_weights(built, outcome.file(f"{cell.name}/weights.safetensors"))
        return built

    def clouds(cells: Mapping[str, Cell], after: range | tuple[int, ...], strange: int = 0) -> Figure:
        generator = torch.Generator().manual_seed(0)
        places = torch.tensor([[0.0, 0.0], [1.6, 1.6]]).repeat(strange // 2, 1)
        x = torch.cat([test.x, 0.1 * torch.randn(strange, 2, generator=generator) + places])
        labels = np.concatenate([test.y.numpy(), np.full(strange, 2)])
        shown = {title: [s.numpy() for s in states_of(network(cell), x)] for title, cell in cells.items()}
        return plotting.clouds(shown, labels, after)

    plain, fixed, least = (Cell("figures", method, False) for method in METHODS)
    bad, bad_bn, bad_fixed = Cell("22", "resnet", False), Cell("22", "resnet", True), Cell("22", "fixed lambda", True)
    good = {"vanilla": plain, "least action": least}
    drawn: Figures = {}
    if "figures" in config.tables:
        drawn["fig_38"] = partial(clouds, {"lambda 0.07": fixed}, range(10))
        drawn["fig_22"] = partial(clouds, good, (0, 6, 9), strange=40)
        drawn["fig_37"] = lambda: plotting.displacements({t: moves(network(cell), test.x) for t, cell in good.items()})
    if "22" in config.tables:
        drawn["fig_39"] = partial(clouds, {"resnet": bad}, range(10))
        drawn["fig_40"] = partial(clouds, {"resnet, bn": bad_bn}, range(10))
        drawn["fig_41"] = partial(clouds, {"fixed lambda, bn": bad_fixed}, range(10))
    if {"22", "figures"} <= {*config.tables}:
        shown = {"good start": plain, "N(0, 5), bn": bad_bn, "lambda 0.04": bad_fixed}
        drawn["fig_12"] = partial(clouds, shown, (0, 1, 5, 9))
    return drawn


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, instances=4, epochs=3),
    selects=("tables",),
    settings=lambda config, cell: asdict(SETTINGS[cell.table]),
    seeds=lambda config, cell: range(config.instances),
    cost=lambda config, cell: config.instances * config.epochs,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
