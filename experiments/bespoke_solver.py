"""A solver that is learned for one field: fewest evaluations at a given error [Shaul et al. 2024].

The field is known and does not change: the pendulum, or that of a neural ODE trained to tell two circles apart. A
method of five stages, :class:`solvers.LearnedTableau`, is trained to end where the exact solution ends, from training
starts in as many steps as the budget of evaluations allows; order and learning rate are chosen on validation starts.
What is reported is its error at starts that it has not seen, beside published methods of as many evaluations. Where
the budget is no multiple of theirs, they get one step more. The control is the method that training begins with.

    python experiments/bespoke_solver.py
    python experiments/bespoke_solver.py --budgets 5 10 20 40 --fields pendulum
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.config import Config as CommonConfig
from lab.config import check_among, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Row, Run, command
from lab.plotting import intervals
from lab.results import groups
from lab.statistics import mean_interval
from odenets import MLPField, NeuralODE
from odenets.training import datasets
from solvers import ButcherTableau, Field, LearnedTableau, Tolerance, get_tableau, integrate

FIELDS = {"pendulum": 3.0, "circles": 1.0}
"""The fields, and the time over which each is solved."""
PEERS = ("bs23", "rk4", "dopri5")
LEARNED, UNTRAINED = "learned", "untrained"
STAGES = 5


@dataclass(frozen=True)
class Config(CommonConfig):
    """What to train.

    Attributes:
        fields: of which a solver is learned: "pendulum", and "circles", that of a trained neural ODE.
        budgets: evaluations of the field, multiples of five.
        seeds: of starts, and of the neural ODE.
        orders: tried, which the method keeps: 1 or 2.
        learning_rates: tried.
        iterations: of Adam, each on all training starts.
        starts: of training and of validation; there are four times as many to report on.
        epochs: of the neural ODE, each on all its points.
    """

    fields: tuple[str, ...] = ("pendulum", "circles")
    budgets: tuple[int, ...] = (5, 10, 20)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    orders: tuple[int, ...] = (1, 2)
    learning_rates: tuple[float, ...] = (0.01, 0.03)
    iterations: int = 600
    starts: int = 256
    epochs: int = 300
    output: Path = Path("runs/bespoke_solver")

    def __post_init__(self) -> None:
        check_among(self, "fields", FIELDS)
        check_at_least(self, 1, "iterations", "starts", "epochs")
        if not self.budgets or any(budget < STAGES or budget % STAGES for budget in self.budgets):
            raise ValueError(f"budgets must be multiples of {STAGES}, got {self.budgets}")
        if not self.orders or not {*self.orders} <= {1, 2}:
            raise ValueError(f"orders must be 1 or 2, got {self.orders}")


@dataclass(frozen=True)
class Job:
    """The solvers of one field at one budget, of which validation chooses one."""

    field: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.field}_{self.budget}_{self.seed}"


def jobs(config: Config) -> Jobs[Job]:
    """Every field at every budget with every seed."""
    return (yield [Job(*one) for one in product(config.fields, config.budgets, config.seeds)])


def pendulum(t: float | Tensor, x: Tensor) -> Tensor:
    """Angle and velocity, ``(B, 2)``, of a pendulum."""
    return torch.stack([x[:, 1], -x[:, 0].sin()], 1)


def starts_of(config: Config, field: str, seed: int) -> list[Tensor]:
    """States to train on, to choose on and to report on, each ``(B, 2)`` float64."""
    n = config.starts
    if field == "circles":
        points = [datasets.points("circles", size, seed + 1000 * k).x for k, size in enumerate((n, n, 4 * n), 1)]
        return [x.double() for x in points]
    generator = torch.Generator().manual_seed(seed)
    radius, angle = (torch.rand(6 * n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    states = (0.5 + 2 * radius) * torch.cat([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], 1)
    return [*states.split([n, n, 4 * n])]


def field_of(config: Config, name: str, seed: int) -> Field:
    """The field, which does not change any more."""
    if name == "pendulum":
        return pendulum
    torch.manual_seed(seed)
    field, head = MLPField(2, 32), nn.Linear(2, 2)
    ode, points = NeuralODE(field, solver="rk4", steps=8), datasets.points("circles", 500, seed)
    optimizer = torch.optim.Adam([*field.parameters(), *head.parameters()], 0.01)
    for _ in range(config.epochs):
        loss = nn.functional.cross_entropy(head(ode(points.x)), points.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return field.double().requires_grad_(False)


def error(ends: Tensor, exact: Tensor) -> Tensor:
    """Root mean square distance of two batches of states ``(B, 2)``, over the root mean square of the exact ones."""
    return ((ends - exact).square().mean() / exact.square().mean()).sqrt()


def learn(config: Config, order: int, rate: float, solve: Any, exact: Tensor) -> LearnedTableau:
    """A method trained to end where the exact solution does."""
    learned = LearnedTableau(stages=STAGES, order=order)
    optimizer = torch.optim.Adam(learned.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    for _ in range(config.iterations):
        loss = error(solve(solver=learned).x1, exact).log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return learned


def steps_of(method: ButcherTableau, budget: int) -> int:
    """Steps that take the budget of evaluations, rounded up."""
    return -(-budget // method.interior)


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Learn a solver with every setting, choose on validation, and measure it and the others on new starts."""
    field, time = field_of(config, job.field, job.seed), FIELDS[job.field]
    sets = starts_of(config, job.field, job.seed)
    tight = Tolerance(1e-11, 1e-11)
    with torch.no_grad():
        exact = [integrate(field, x, 0.0, time, solver="dopri8", tolerance=tight, keep="last").x1 for x in sets]
    steps = job.budget // STAGES

    def measured(method: ButcherTableau, which: int, steps: int) -> float:
        with torch.no_grad():
            ends = integrate(field, sets[which], 0.0, time, solver=method, steps=steps, keep="last").x1
        return error(ends, exact[which]).item()

    solve = partial(integrate, field, sets[0], 0.0, time, steps=steps, keep="last")
    candidates = []
    for order, rate in product(config.orders, config.learning_rates):
        method = learn(config, order, rate, solve, exact[0]).tableau()
        candidates.append((measured(method, 1, steps), order, rate, method))
        report(1)
    validation, order, rate, method = min(candidates, key=lambda one: one[0])
    start = LearnedTableau(stages=STAGES).tableau()
    methods = {LEARNED: method, UNTRAINED: start} | {name: get_tableau(name) for name in PEERS}
    errors = {name: measured(one, 2, steps_of(one, job.budget)) for name, one in methods.items()}
    evaluations = {name: steps_of(one, job.budget) * one.interior for name, one in methods.items()}
    chosen = {"order": order, "learning_rate": rate, "validation": validation}
    return {"errors": errors, "evaluations": evaluations, **chosen}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per field, budget and method: its error, and its ratio to that of the learned method, seed by seed."""
    rows = []
    for (field, budget), group in groups(results, "field", "budget").items():
        for name in group[0]["errors"]:
            errors = [r["errors"][name] for r in group]
            row: Row = {"field": field, "budget": budget, "method": name}
            row["evaluations"] = group[0]["evaluations"][name]
            row["log10_error"] = mean_interval([math.log10(e) for e in errors])
            if name == LEARNED:
                row["orders"] = [r["order"] for r in group]
            else:
                ratios = [math.log10(e / r["errors"][LEARNED]) for e, r in zip(errors, group, strict=True)]
                row["log10_ratio"] = mean_interval(ratios)
                row["ratio"] = 10 ** row["log10_ratio"].mean
            rows.append(row)
    return rows


COLUMNS: Columns = {
    "field": "{field}",
    "budget": "{budget}",
    "method": "{method}",
    "evaluations": "{evaluations}",
    "log10 error": "{log10_error:.2f}",
    "over the learned: log10": "{log10_ratio:.2f}",
    "ratio": "{ratio:.1f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the learned method gains over the best of the others."""
    lines = []
    for (field, budget), group in groups(outcome.rows, "field", "budget").items():
        best = min((row for row in group if row["method"] in PEERS), key=lambda row: row["log10_error"].mean)
        learned = next(row for row in group if row["method"] == LEARNED)
        lines.append(
            f"{field}, {budget} evaluations: log10 of the error of the learned method is {learned['log10_error']:.2f}, "
            f"of the best other, {best['method']} with {best['evaluations']}, larger by {best['log10_ratio']:.2f}, a "
            f"factor of {best['ratio']:.1f}; orders chosen: {', '.join(map(str, learned['orders']))}"
        )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """Errors over evaluations, a figure for each field."""

    def draw(field: str) -> Any:
        rows = [row for row in outcome.rows if row["field"] == field]
        series = {
            name: [(row["evaluations"], row["log10_error"]) for row in group]
            for (name,), group in groups(rows, "method").items()
        }
        return intervals(series, xlabel="evaluations of the field", ylabel="log10 of the relative error")

    return {field: partial(draw, field) for field in config.fields}


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, seeds=config.seeds[:1], iterations=20, starts=32, epochs=10),
    selects=("fields", "budgets", "seeds"),
    cost=lambda config, job: len(config.orders) * len(config.learning_rates),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
