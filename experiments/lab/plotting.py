"""Figures of the experiments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.results import groups
from lab.statistics import Interval
from odenets.plotting.figures import MARKERS, legend_beside, log_x, new_figure

__all__ = [
    "Kinds", "accuracy_against_cost", "accuracy_by_evaluations", "block_errors", "categories", "cost_of_solves",
    "depth_and_steps", "epochs_of", "intervals", "norms_along_depth", "solves_while_training", "ways_against_cost",
]  # fmt: skip

Epochs = list[dict[str, str]]
Kinds = Mapping[str, Mapping[str, Epochs]]


def intervals(
    series: Mapping[str, Sequence[tuple[float, Interval]]], *, xlabel: str, ylabel: str, logarithmic: bool = False
) -> Figure:
    """Means over something, with their confidence intervals, a line per name.

    Args:
        series: per name pairs of x and an interval.
        xlabel, ylabel: of the axes.
        logarithmic: whether the x axis is.
    """
    figure, axes = new_figure(1, 1)
    axis: Axes = axes[0, 0]
    for i, (name, pairs) in enumerate(series.items()):
        x, means = zip(*pairs, strict=True)
        style = {"marker": MARKERS[i % len(MARKERS)], "capsize": 3}
        axis.errorbar(x, [m.mean for m in means], [m.half_width for m in means], label=name, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logarithmic else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def categories(series: Mapping[str, Mapping[str, Interval]], *, xlabel: str) -> Figure:
    """Means with their confidence intervals, a line per category, a kind of mark per name.

    Args:
        series: per name an interval by category.
        xlabel: of the axis.
    """
    titles = list(dict.fromkeys(title for of in series.values() for title in of))
    figure, axes = new_figure(1, 1, size=(8.0, 1.2 + 0.32 * len(titles)))
    axis: Axes = axes[0, 0]
    for i, (name, of) in enumerate(series.items()):
        y = [titles.index(title) + 0.18 * (i - (len(series) - 1) / 2) for title in of]
        widths = [0.0 if np.isnan(m.half_width) else m.half_width for m in of.values()]
        style: dict[str, Any] = {"fmt": MARKERS[i % len(MARKERS)], "capsize": 2, "markersize": 4}
        axis.errorbar([m.mean for m in of.values()], y, xerr=widths, label=name, **style)
    axis.set(xlabel=xlabel, yticks=range(len(titles)), yticklabels=titles)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def epochs_of(metrics: Iterable[Mapping[str, str]], networks: str = "") -> dict[str, dict[str, Epochs]]:
    """Rows of a run's ``metrics.csv`` by kind of training and seed, of networks whose name begins so."""
    kinds: dict[str, dict[str, Epochs]] = {}
    for row in metrics:
        if row["network"].startswith(networks):
            kinds.setdefault(_title(row), {}).setdefault(row["seed"], []).append(dict(row))
    return kinds


def depth_and_steps(kinds: Kinds) -> Figure:
    """Per kind of training: depth over epochs for every seed, and below the steps' boundaries for the first one."""
    figure, axes = new_figure(2, len(kinds))
    for (upper, lower), (title, seeds) in zip(axes.T, kinds.items(), strict=True):
        for seed, rows in seeds.items():
            epochs = [int(row["epoch"]) for row in rows]
            upper.step(epochs, [int(row["depth"]) for row in rows], where="mid", label=f"seed {seed}")
        upper.set(title=title, ylabel="blocks")
        upper.set_yscale("log", base=2)
        upper.yaxis.set_major_formatter("{x:g}")
        upper.sharex(lower)
        upper.legend(fontsize="small")
        first, rows = next(iter(seeds.items()))
        for row in rows:
            times = np.cumsum([0.0, *map(float, row["h"].split())])
            epoch = int(row["epoch"])
            for i, (start, end) in enumerate(pairwise(times)):
                lower.fill_between([epoch - 0.5, epoch + 0.5], start, end, color=f"C{i % 2}", alpha=0.4, linewidth=0)
                lower.hlines(end, epoch - 0.5, epoch + 0.5, color="black", linewidth=0.8)
        lower.set(xlabel="epoch", ylabel=f"time of the steps (seed {first})")
    return figure


def block_errors(kinds: Kinds, tolerance: float, K: float) -> Figure:
    """Per kind of training: the embedded error of every block at every check, with the thresholds of the rule."""
    figure, axes = new_figure(1, len(kinds))
    for axis, (title, seeds) in zip(axes[0], kinds.items(), strict=True):
        for seed, rows in seeds.items():
            points = [(int(row["epoch"]), float(e)) for row in rows for e in (row.get("errors") or "").split()]
            if points:
                axis.plot(*zip(*points, strict=True), ".", label=f"seed {seed}")
        axis.axhline(tolerance, color="black", linestyle="--")
        axis.axhline(tolerance / K, color="black", linestyle=":")
        axis.annotate("duplicate above", (0.99, tolerance), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axis.annotate("merge below", (0.99, tolerance / K), xycoords=("axes fraction", "data"), ha="right", va="top")
        axis.set(title=title, yscale="log", xlabel="epoch")
        axis.legend(fontsize="small")
    axes[0, 0].set_ylabel("embedded error of a block (RMS)")
    return figure


def accuracy_against_cost(rows: Iterable[Mapping[str, Any]], kinds: Kinds) -> Figure:
    """Test accuracy against field evaluations spent in training, a pale mark per training, a large one for the mean.

    Args:
        rows: of the table; what diverged for every seed is left out.
        kinds: epochs of the trainings.
    """
    figure, axes = new_figure(1, 1)
    axis: Axes = axes[0, 0]
    for i, row in enumerate(rows):
        if "solution" not in row:
            continue
        last = [rows[-1] for rows in kinds[_title(row)].values()]
        epochs = max(int(each["epoch"]) for each in last)  # a training that diverges ends before
        spent = [int(r["evaluations"]) + int(r["check_evaluations"]) for r in last if int(r["epoch"]) == epochs]
        style: dict[str, Any] = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
        axis.plot(np.array(spent) / 1e3, row["solution"].values, alpha=0.35, **style)
        axis.plot(row["evaluations"] / 1e3, row["solution"].mean, markersize=10, label=_title(row), **style)
    axis.set(xlabel="field evaluations in training, checks included (thousands)", ylabel="test accuracy (%)")
    log_x(axis)
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return figure


def ways_against_cost(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Test accuracy of each way to a network against the field evaluations that it took, with their intervals."""
    figure, axes = new_figure(1, 1)
    axis: Axes = axes[0, 0]
    for i, row in enumerate(row for row in rows if "evaluations" in row):
        cost, accuracy = row["evaluations"], row["accuracy"]
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "linestyle": ""}
        style |= {} if i < 10 else {"markerfacecolor": "none"}
        widths = {"xerr": cost.half_width / 1e3, "yerr": accuracy.half_width} if cost.n > 1 else {}
        axis.errorbar(cost.mean / 1e3, accuracy.mean, label=row["way"], elinewidth=0.6, **widths, **style)
    axis.set(xlabel="field evaluations (thousands)", ylabel="test accuracy (%)")
    log_x(axis)
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return figure


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['network']}, T = {float(row['total_time']):g}"


def cost_of_solves(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Bars per way of solving: evaluations, time of an epoch, peak memory; with the action and without."""
    rows = list(rows)
    ways = sorted({row["way"] for row in rows}, reverse=True)
    figure, axes = new_figure(1, 3)
    evaluations, seconds, memory = axes[0]
    for row in rows:
        style: dict[str, Any] = {"y": ways.index(row["way"]) + (-0.2 if row["action"] else 0.2), "height": 0.36}
        style |= {"color": "C1" if row["action"] else "C0"}
        evaluations.barh(width=row["forward"], **style)
        evaluations.barh(width=row["backward"], left=row["forward"], alpha=0.45, **style)
        seconds.barh(width=row["epoch_seconds"], **style)
        memory.barh(width=row["peak_memory"] / 1e6, **style)
    evaluations.set(xlabel="field evaluations per batch (pale: in backward)", yticks=range(len(ways)), yticklabels=ways)
    seconds.set(xlabel="seconds per epoch", yticks=[])
    memory.set(xlabel="peak memory of a training step (MB)", yticks=[])
    handles = [Line2D([], [], color=f"C{i}", linewidth=6, label=f"with{'out' * (1 - i)} the action") for i in (0, 1)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    return figure


def solves_while_training(metrics: Iterable[Mapping[str, str]]) -> Figure:
    """Evaluations per batch over epochs, and validation accuracy over the time of training; means over the seeds.

    Args:
        metrics: rows of a run's ``metrics.csv``; dashed lines are those with the action.
    """
    trainings = groups(metrics, "way", "action")
    ways = sorted({way for way, _ in trainings})
    figure, axes = new_figure(1, 2)
    left, right = axes[0]
    for (way, action), rows in trainings.items():
        columns = {
            name: np.array([[float(row[name]) for row in of] for of in groups(rows, "seed").values()]).mean(0)
            for name in ("epoch", "forward", "backward", "epoch_seconds", "validation_accuracy")
        }
        acts, i = action == "True", ways.index(way)
        line: dict[str, Any] = {"label": f"{way}{', action' * acts}", "linestyle": "--" if acts else "-"}
        line |= {"color": f"C{i}", "marker": MARKERS[i], "markersize": 4}
        left.plot(columns["epoch"], columns["forward"] + columns["backward"], **line)
        right.plot(np.cumsum(columns["epoch_seconds"]), 100 * columns["validation_accuracy"], **line)
    left.set(xlabel="epoch", ylabel="field evaluations per batch")
    right.set(xlabel="seconds of training", ylabel="validation accuracy (%)")
    log_x(right)
    legend_beside(right)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def accuracy_by_evaluations(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over field evaluations of an image, each architecture a number that the list beside names.

    Args:
        rows: with "architecture", "evaluations" and an interval "accuracy"; the best is number 1.
    """
    figure, axes = new_figure(1, 1, size=(9.0, max(4.2, 0.24 * len(rows))))
    axis: Axes = axes[0, 0]
    ordered = sorted(rows, key=lambda row: -row["accuracy"].mean)
    colors = _colors(len(ordered))
    for n, (row, color) in enumerate(zip(ordered, colors, strict=True), 1):
        mean, half = row["accuracy"].mean, row["accuracy"].half_width
        near = sum(other["evaluations"] == row["evaluations"] for other in ordered[: n - 1])
        x = row["evaluations"] * 1.035 ** ((near + 1) // 2 * (-1) ** near)  # beside each other, not on each other
        half = half if np.isfinite(half) else 0.0
        axis.errorbar(x, mean, half, fmt="o", color=color, capsize=2, label=f"{n}  {row['architecture']}")
        axis.annotate(str(n), (x, mean), textcoords="offset points", xytext=(4, 3), fontsize="x-small")
    log_x(axis)
    axis.set(xlabel="field evaluations of an image", ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return figure


def norms_along_depth(norms: Mapping[str, Sequence[float]]) -> Figure:
    """The norm of the state behind each block over the share of the blocks before it, a line per architecture."""
    figure, axes = new_figure(1, 1, size=(9.0, max(4.2, 0.24 * len(norms))))
    axis: Axes = axes[0, 0]
    ordered = sorted(norms.items(), key=lambda pair: -pair[1][-1])
    for i, ((name, values), color) in enumerate(zip(ordered, _colors(len(ordered)), strict=True)):
        depth = np.arange(1, len(values) + 1) / len(values)
        axis.plot(depth, values, color=color, marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
    axis.set(xlabel="share of the blocks", ylabel="root mean square of the state", yscale="log")
    axis.grid(alpha=0.3)
    legend_beside(axis)
    return figure


def _colors(count: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0.05, 0.95, count))
