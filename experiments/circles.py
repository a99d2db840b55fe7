"""Least action in two dimensions: tables 19 to 22 and the figures of point clouds (sections 3.2.2, 5.4.1 and F.5).

Points of two concentric circles are to be carried to the two sides of a fixed line, ``x1 + x2 = -20``, by a residual
network whose blocks have two hidden units. A hundred instances, each with points and weights of its own, are trained
together. The thesis reports the highest accuracy over all epochs on the test points; beside it stands what can be had:
the accuracy after the last epoch, and that after the epoch chosen on other points, both on a thousand new points.

    python experiments/circles.py
    python experiments/circles.py --tables 20 --instances 20
    python experiments/circles.py --dataset moons
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from lab.runs import Run
from lab.statistics import Interval, mean_interval
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Flow, MLPField, Network, plotting
from odenets.checkpoints import load_weights, save_weights
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training import data, datasets
from odenets.training.instances import fit_instances
from odenets.training.objectives import CrossEntropy, Objective
from odenets.transport import moves, states

METHODS = ("resnet", "fixed lambda", "lap")

# mean and half-width of the 95 % interval over 100 instances, without and with batch norm: tables 19 to 22
THESIS: dict[str, dict[str, tuple[tuple[float, float], tuple[float, float]]]] = {
    "19": {
        "resnet": ((76.6, 3.5), (75.4, 3.1)),
        "fixed lambda": ((76.5, 3.5), (75.6, 3.3)),
        "lap": ((82.1, 2.6), (84.6, 3.1)),
    },
    "20": {
        "resnet": ((89.1, 0.9), (99.4, 0.4)),
        "fixed lambda": ((69.7, 4.0), (99.5, 0.6)),
        "lap": ((75.7, 2.9), (99.8, 0.2)),
    },
    "21": {
        "resnet": ((88.2, 2.3), (92.9, 2.0)),
        "fixed lambda": ((93.5, 2.1), (94.4, 2.0)),
        "lap": ((95.8, 1.8), (96.0, 1.3)),
    },
    "22": {
        "resnet": ((90.2, 1.3), (98.0, 0.8)),
        "fixed lambda": ((89.7, 1.5), (99.7, 0.2)),
        "lap": ((79.1, 3.9), (99.4, 0.4)),
    },
}
PERFECT = ("train", "test")
"""Data sets on which a network is to be right, three epochs running."""

THESIS_EPOCHS = {("resnet", False): 73, ("resnet", True): 71, ("fixed lambda", False): 54, ("fixed lambda", True): 64}


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
class Config:
    """What to train.

    Attributes:
        tables: of the thesis, 19 to 22; "epochs" for the epochs to 100 % of F.5.2, "figures" for its well initialized
            network of nine blocks.
        instances: per cell.
        epochs: at most; an instance ends after three epochs without a fault on training and test points.
        dataset: circles or moons.
        batch_size: of training.
        quick: four instances, three epochs, fewer points in the figures: to see that it runs.
        output: run folder.
        resume: go on with what is there.
        workers: processes; all cores if 0.
    """

    tables: tuple[str, ...] = ("19", "21", "22", "epochs", "figures")
    instances: int = 100
    epochs: int = 100
    dataset: Literal["circles", "moons"] = "circles"
    batch_size: int = 10
    quick: bool = False
    output: Path = Path("runs/circles")
    resume: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.tables) - set(SETTINGS):
            raise ValueError(f"tables must be among {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}")
        if self.instances < 1 or self.epochs < 1:
            raise ValueError(f"instances and epochs must be at least 1, got {self.instances} and {self.epochs}")


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    table: str
    method: str
    norm: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.table}_{self.method.replace(' ', '_')}{'_bn' * self.norm}"


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
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            if setting.initial == "normal":
                nn.init.normal_(layer.weight, std=5.0)
                nn.init.normal_(layer.bias, std=5.0)
            else:
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
    return network


def objective(method: str, setting: Setting) -> Objective:
    """What a method minimizes, with the thesis' settings: the unsquared norm, lambda as a factor of the loss."""
    match method:
        case "resnet":
            return CrossEntropy()
        case "fixed lambda":
            return ActionPenalty(setting.weight, cost="norm")
        case _:
            return LeastAction(lambda0=0.1, tau=0.1, every=5, cost="norm", update="after", weigh="multiply")


def points_of(config: Config, setting: Setting, seed: int) -> dict[str, data.TensorData]:
    """The points of an instance: training and test as in the thesis, and others to choose on and to report."""
    train, test = datasets.hold_out(datasets.points(config.dataset, setting.points, seed), 0.2, seed=seed)
    chosen, fresh = (datasets.points(config.dataset, n, seed + k) for n, k in ((200, 1_000_000), (1000, 2_000_000)))
    return {"train": train, "test": test, "validation": chosen, "fresh": fresh}


def train(config: Config, cell: Cell, report: Report) -> None:
    """Train the instances of a cell; what was found stands in its summary, beside the first instance's weights."""
    setting = SETTINGS[cell.table]
    run = Run(config.output / cell.name, {**asdict(cell), **asdict(setting), **science(config)}, resume=True)
    started = time.time()
    parts = [points_of(config, setting, seed) for seed in range(config.instances)]
    found = fit_instances(
        [build(setting, cell.norm, seed) for seed in range(config.instances)],
        [data.Batches(part["train"], config.batch_size) for part in parts],
        epochs=config.epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01, betas=(0.9, 0.99), fused=True),
        objective=lambda: objective(cell.method, setting),
        measured={name: [part[name] for part in parts] for name in parts[0]},
        perfect=PERFECT,
        report=report,
    )
    chosen = found.accuracy["validation"].argmax(1, keepdim=True)  # the first of the best epochs
    results = {
        "max": found.accuracy["test"].amax(1),
        "last": found.accuracy["fresh"][:, -1],
        "chosen": found.accuracy["fresh"].gather(1, chosen)[:, 0],
        "epochs": found.epochs.float(),
        "arrived": torch.stack([(found.accuracy[name][:, -3:] == 1).all(1) for name in PERFECT]).all(0),
    }
    save_weights(found.networks[0], run.folder / "weights.safetensors")
    values: dict[str, Any] = {name: value.tolist() for name, value in results.items()}
    if cell.table == "figures":
        test = [part["test"].x for part in parts[:10]]
        gaps = [moves(network, x).gap for network, x in zip(found.networks, test, strict=False)]
        values["gap"] = gaps
    run.finish(asdict(cell) | values, seeds=list(range(config.instances)), started=started)


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a cell."""
    return {name: getattr(config, name) for name in ("instances", "epochs", "dataset", "batch_size")}


def percent(values: list[float]) -> Interval:
    """Mean and interval in percent."""
    return mean_interval([100 * v for v in values])


def summarize(config: Config, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell, the thesis' figures and the paired difference to the plain network beside ours."""
    rows = []
    for cell in cells(config):
        found = results[cell.name]
        plain = results[Cell(cell.table, "resnet", cell.norm).name]
        row: dict[str, Any] = {**asdict(cell), "maximum": percent(found["max"]), "last": percent(found["last"])}
        arrived = [n for n, there in zip(found["epochs"], found["arrived"], strict=True) if there]
        row |= {"chosen": percent(found["chosen"]), "arrived": len(arrived), "instances": len(found["arrived"])}
        if arrived:
            row["epochs"] = mean_interval(arrived)
        if cell.method != "resnet":
            for name in ("max", "chosen"):
                pairs = zip(found[name], plain[name], strict=True)
                row[f"{name}_difference"] = percent([ours - theirs for ours, theirs in pairs])
        if cell.table in THESIS and config.dataset == "circles":
            thesis = Interval(*THESIS[cell.table][cell.method][cell.norm], 100)
            row |= {"thesis": thesis, "meets": row["maximum"].meets(thesis)}
        if "gap" in found:
            row["gap"] = mean_interval(found["gap"])
        rows.append(row)
    return rows


COLUMNS = {
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
    "after epochs": "{epochs:.1f}",
}


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says of the claims, in sentences."""
    found = {(row["table"], row["method"], row["norm"]): row for row in rows}
    lines = []
    for key, claim in (
        (("19", "lap", False), "least action over the plain network of one block"),
        (("21", "fixed lambda", False), "fixed lambda over the plain network with 50 points"),
        (("22", "lap", False), "least action over the plain network at N(0, 5) without batch norm"),
    ):
        if key in found:
            row = found[key]
            lines.append(
                f"{claim}: {row['max_difference']:.1f} points at the maximum over epochs, "
                f"{row['chosen_difference']:.1f} at the epoch chosen on validation (paired)"
            )
    for (method, norm), epochs in THESIS_EPOCHS.items():
        if ("epochs", method, norm) in found:
            row = found["epochs", method, norm]
            after = f", after {row['epochs']:.1f} epochs" if "epochs" in row else ""
            lines.append(
                f"two blocks, {method}{', batch norm' * norm}: {row['arrived']} of {row['instances']} end with three "
                f"epochs without a fault{after} (thesis {epochs})"
            )
    gaps = {method: found["figures", method, False]["gap"] for method in METHODS if ("figures", method, False) in found}
    if gaps:
        lines.append(
            "way of the points over the shortest (root mean square displacement over W2, minus 1): "
            + ", ".join(f"{method} {gap:.3f}" for method, gap in gaps.items())
        )
    return lines


def figures(config: Config) -> dict[str, Any]:
    """Point clouds and displacements of the first instance."""

    def network(table: str, method: str, norm: bool) -> Network:
        cell = Cell(table, method, norm)
        built = build(SETTINGS[table], norm, 0)
        load_weights(built, config.output / cell.name / "weights.safetensors")
        return built

    test = points_of(config, SETTINGS["figures"], 0)["test"]
    labels = test.y.numpy()
    drawn: dict[str, Any] = {}

    def draw(name: str, networks: dict[str, Network], after: tuple[int, ...], strange: Tensor | None = None) -> None:
        x, y = test.x, labels
        if strange is not None:
            x, y = torch.cat([x, strange]), np.concatenate([y, np.full(len(strange), 2)])
        clouds = {title: [s.numpy() for s in states(net, x)] for title, net in networks.items()}
        drawn[name] = plotting.clouds(clouds, y, after)

    everywhere = tuple(range(10))
    if "figures" in config.tables:
        plain, fixed, least = (network("figures", method, False) for method in METHODS)
        draw("fig_38", {"lambda 0.07": fixed}, everywhere)
        generator = torch.Generator().manual_seed(0)
        strange = 0.1 * torch.randn(40, 2, generator=generator) + torch.tensor([[0.0, 0.0], [1.6, 1.6]]).repeat(20, 1)
        draw("fig_22", {"vanilla": plain, "least action": least}, (0, 6, 9), strange)
        drawn["fig_37"] = plotting.displacements(
            {"vanilla": moves(plain, test.x), "least action": moves(least, test.x)}
        )
    if "22" in config.tables:
        bad = {
            f"{m}{', bn' * n}": network("22", m, n)
            for m, n in (("resnet", False), ("resnet", True), ("fixed lambda", True))
        }
        for number, (title, net) in zip((39, 40, 41), bad.items(), strict=True):
            draw(f"fig_{number}", {title: net}, everywhere)
        if "figures" in config.tables:
            plain = network("figures", "resnet", False)
            shown = {"good start": plain, "N(0, 5), bn": bad["resnet, bn"], "lambda 0.04": bad["fixed lambda, bn"]}
            draw("fig_12", shown, (0, 1, 5, 9))
    return drawn


def cells(config: Config) -> list[Cell]:
    """The cells of the tables, those of a table together."""
    chosen = []
    for name in config.tables:
        methods = METHODS[:2] if name == "epochs" else METHODS
        norms = (False,) if name == "figures" else (False, True)
        chosen += [Cell(name, method, norm) for method in methods for norm in norms]
    return chosen


def main(config: Config) -> None:
    """Train every cell, print one table, write the run folder with its figures."""
    if config.quick:
        config = replace(config, instances=4, epochs=3)
    started = time.time()
    run = Run(config.output, science(config) | {"tables": config.tables}, resume=config.resume)
    chosen = cells(config)
    with Workers(config.workers or os.cpu_count() or 1) as workers:
        found = workers.complete(
            partial(train, config),
            sorted(chosen, key=lambda cell: -SETTINGS[cell.table].blocks * SETTINGS[cell.table].points),
            lambda cell: config.output / cell.name,
            cost=lambda cell: config.instances * config.epochs,
            label="circles",
        )
    results = {Cell(r["table"], r["method"], r["norm"]).name: r for r in found}
    rows = summarize(config, results)
    plotting.save(figures(config), run.folder / "figures")
    seeds = range(config.instances)
    trainings = [{"name": cell.name, "cell": cell.name, "seed": seed} for cell in chosen for seed in seeds]
    print(run.conclude(trainings, ("cell",), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
