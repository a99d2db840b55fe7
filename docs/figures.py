"""The figures of README and of the page on the idea: ``python docs/figures.py`` writes them to ``docs/figures``.

A step of Bogacki and Shampine's method and its stages; points carried by a trained flow; what its blocks measure.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn

from odenets import Flow, Network, Records, measures, plotting
from odenets.least_action import LeastAction
from odenets.training import CrossEntropy, Objective
from solvers import Step, get_tableau, integrate, rk_step

FOLDER = Path(__file__).parent
BLUE, RUST, GREEN = "#2f78c4", "#d1622b", "#3a9a5b"
NETWORKS = {"plain": CrossEntropy(), "least action": LeastAction(lambda0=0.1, tau=0.1)}


def field(t: float | Tensor, x: Tensor) -> Tensor:
    """A velocity of the state and of time, in one dimension."""
    return 1.5 * torch.cos(1.6 * torch.as_tensor(t)) - 0.8 * x


def draw_step(axis: Axes) -> Step:
    """A step, its stages as slopes where they are evaluated, and the two outputs whose difference is the error."""
    h, x0, tableau = 1.2, torch.tensor([[-0.2]]), get_tableau("bs23")
    step = rk_step(field, 0.0, x0, h, tableau)
    times = torch.linspace(0, 1.15 * h, 60)
    exact = integrate(field, x0, 0.0, at=times, solver="dopri5").states[:, 0, 0]
    axis.plot(times, exact, color="0.6", label="solution")
    for i, (c, p) in enumerate(zip(tableau.c, step.stages, strict=True)):
        x = step.x0 + h * sum((a * q for a, q in zip(tableau.a[i], step.stages, strict=False)), torch.zeros(1, 1))
        slope, length = float(p), 0.11 / math.hypot(1, float(p))
        axis.annotate(
            "", (c * h + length, float(x) + slope * length), (c * h - length, float(x) - slope * length),
            arrowprops={"arrowstyle": "->", "color": BLUE, "linewidth": 2},
        )  # fmt: skip
        axis.plot(c * h, float(x), "o", color=BLUE, markersize=4)
        axis.annotate(f"$p_{i + 1}$", (c * h, float(x)), (5, -13), textcoords="offset points", color=BLUE)
    lower = float(step.x1 - step.error())
    axis.plot([0, h], [float(x0), float(step.x1)], color=RUST, linestyle="--", label="displacement $h\\,r$")
    axis.plot(h, lower, "s", color=GREEN, label="embedded output")
    axis.plot([h, h], [lower, float(step.x1)], color=GREEN, linewidth=4, alpha=0.5)
    axis.annotate("$x_0$", (0, float(x0)), (-4, 8), textcoords="offset points")
    axis.annotate("$x_1$", (h, float(step.x1)), (8, -3), textcoords="offset points")
    axis.set(xlabel="time t", ylabel="state x", title="A step: one block", ylim=(-0.75, 0.95))
    axis.set_xticks([0, h / 2, 3 * h / 4, h])
    axis.set_xticklabels(["0", "h/2", "3h/4", "h"])
    axis.legend(fontsize="small", loc="lower right")
    return step


def trained(objective: Objective, x: Tensor, y: Tensor) -> Network:
    """a flow of four blocks in the plane and a linear head, trained on all points at once."""
    torch.manual_seed(0)
    network = Network(nn.Identity(), Flow(solver="bs23", depth=4), nn.Linear(2, 2))
    network(x[:2])  # makes the fields
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(300):
        optimizer.zero_grad()
        objective(network, x, y).backward()
        optimizer.step()
    return network.eval()


def draw_paths(axis: Axes, network: Network, x: Tensor, y: Tensor, title: str) -> None:
    """Where every second point is after each block."""
    with torch.no_grad():
        states = torch.stack([x, *(step.x1 for step in network.steps(x))])[:, ::2]
    for label, color in enumerate((BLUE, RUST)):
        paths = states[:, y[::2] == label]
        axis.plot(paths[..., 0], paths[..., 1], color=color, linewidth=0.7, alpha=0.5)
        axis.scatter(*paths[0].T, s=9, color="0.55", zorder=3)
        axis.scatter(*paths[-1].T, s=14, color=color, zorder=3)
    axis.set(xlabel="first feature", ylabel="second feature", title=title)


def draw_action(axis: Axes, records: dict[str, Records]) -> None:
    """Mean action of each block, with the middle 90 % of the points."""
    for (name, record), color in zip(records.items(), (BLUE, RUST), strict=True):
        values = record.to_numpy()["action"]
        blocks = np.arange(1, len(values) + 1)
        axis.plot(blocks, values.mean(1), marker="o", color=color, label=name)
        axis.fill_between(blocks, *np.percentile(values, (5, 95), axis=1), color=color, alpha=0.15, linewidth=0)
    axis.set(
        xlabel="block",
        ylabel="action (state² / time)",
        title="A measure: action of each block",
        yscale="log",
        xticks=blocks,
    )
    axis.legend(fontsize="small")


def new_figure(panels: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 3.3))
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def main() -> None:
    """Write all figures, for light pages and for dark."""
    matplotlib.style.use(FOLDER / "static" / "figures.mplstyle")
    points, labels = make_moons(200, noise=0.08, random_state=0)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    networks = {name: trained(objective, x, y) for name, objective in NETWORKS.items()}
    with torch.no_grad():
        records = {name: network.record(x, action=measures.action)[1] for name, network in networks.items()}
    overview, (left, middle, right) = new_figure(3, 12)
    draw_step(left)
    draw_paths(middle, networks["least action"], x, y, "A flow: four blocks carry points")
    draw_action(right, records)
    step, (axis,) = new_figure(1, 7)
    draw_step(axis)
    paths, axes = new_figure(2, 8)
    for axis, (name, network) in zip(axes, networks.items(), strict=True):
        accuracy = float((network(x).argmax(1) == y).float().mean())
        draw_paths(axis, network, x, y, f"{name}: {accuracy:.0%} of the points are right")
    action, (axis,) = new_figure(1, 7)
    draw_action(axis, records)
    figures = {"overview": overview, "step": step, "paths": paths, "action": action}
    for path in plotting.save(figures, FOLDER / "figures", dark=True):
        print(path.relative_to(FOLDER))


if __name__ == "__main__":
    main()
