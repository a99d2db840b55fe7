"""Figures from run folders; the one file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from odenets.runs import finished_trainings, read_config, read_metrics, read_summary

__all__ = [
    "accuracy_against_cost",
    "adaptive_depth",
    "block_errors",
    "cost_of_solves",
    "depth_and_steps",
    "neural_ode",
    "save",
    "solves_while_training",
]

_MARKERS = "os^Dv<>p*X"


def save(figures: Mapping[str, Figure], folder: str | Path, *, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Write each figure to ``folder / name.format`` and return the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in formats]
    for path in paths:
        figures[path.stem].savefig(path, dpi=100)
    return paths


def adaptive_depth(folder: str | Path) -> dict[str, Figure]:
    """All figures of a run of ``experiments/adaptive_depth.py``, by name.

    Args:
        folder: the run folder, with a folder in it for every training.

    Raises:
        FileNotFoundError: there is no finished training in it.
    """
    trainings = finished_trainings(folder)
    adaptive = [path for path in trainings if read_config(path)["adaptive"]]
    return {
        "depth": depth_and_steps(adaptive),
        "errors": block_errors(adaptive),
        "cost": accuracy_against_cost(trainings),
    }


def depth_and_steps(folders: list[Path]) -> Figure:
    """Per kind of training: depth over epochs for every seed, and below the steps' boundaries for the first one.

    Args:
        folders: run folders of adaptive trainings.
    """
    kinds = _by_kind(folders)
    figure, axes = _figure(2, len(kinds))
    for (upper, lower), (title, paths) in zip(axes.T, kinds.items(), strict=True):
        for path in paths:
            rows = read_metrics(path)
            epochs = [int(row["epoch"]) for row in rows]
            upper.step(epochs, [int(row["depth"]) for row in rows], where="mid", label=f"seed {_seed(path)}")
        upper.set(title=title, ylabel="blocks")
        upper.set_yscale("log", base=2)
        upper.yaxis.set_major_formatter("{x:g}")
        upper.sharex(lower)
        upper.legend(fontsize="small")
        rows = read_metrics(paths[0])
        for row in rows:
            times = np.cumsum([0.0, *map(float, row["h"].split())])
            epoch = int(row["epoch"])
            for i, (start, end) in enumerate(pairwise(times)):
                lower.fill_between([epoch - 0.5, epoch + 0.5], start, end, color=f"C{i % 2}", alpha=0.4, linewidth=0)
                lower.hlines(end, epoch - 0.5, epoch + 0.5, color="black", linewidth=0.8)
        lower.set(xlabel="epoch", ylabel=f"time of the steps (seed {_seed(paths[0])})")
    return figure


def block_errors(folders: list[Path]) -> Figure:
    """Per kind of training: the embedded error of every block at every check, with the thresholds of the rule.

    Args:
        folders: run folders of adaptive trainings.
    """
    kinds = _by_kind(folders)
    figure, axes = _figure(1, len(kinds))
    for axis, (title, paths) in zip(axes[0], kinds.items(), strict=True):
        config = read_config(paths[0])
        tolerance, K = config["tolerance"], config["K"]
        for path in paths:
            points = [
                (int(row["epoch"]), float(error))
                for row in read_metrics(path)
                for error in (row.get("errors") or "").split()
            ]
            if points:
                axis.plot(*zip(*points, strict=True), ".", label=f"seed {_seed(path)}")
        axis.axhline(tolerance, color="black", linestyle="--")
        axis.axhline(tolerance / K, color="black", linestyle=":")
        axis.annotate("duplicate above", (0.99, tolerance), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axis.annotate("merge below", (0.99, tolerance / K), xycoords=("axes fraction", "data"), ha="right", va="top")
        axis.set(title=title, yscale="log", xlabel="epoch")
        axis.legend(fontsize="small")
    axes[0, 0].set_ylabel("embedded error of a block (RMS)")
    return figure


def accuracy_against_cost(folders: list[Path]) -> Figure:
    """Test accuracy against field evaluations spent in training, a pale mark per training, a large one for the mean.

    Args:
        folders: run folders of trainings; those that diverged are left out.
    """
    figure, axes = _figure(1, 1)
    axis: Axes = axes[0, 0]
    handles = []
    for i, (title, paths) in enumerate(_by_kind(folders).items()):
        results: list[dict[str, Any]] = [read_summary(path)["results"] for path in paths]
        trained = [r for r in results if not r["diverged"]]
        if not trained:
            continue
        cost = np.array([r["training_evaluations"] + r["check_evaluations"] for r in trained]) / 1e3
        accuracy = 100 * np.array([r["solution"] for r in trained])
        style: dict[str, Any] = {"color": f"C{i}", "marker": _MARKERS[i % len(_MARKERS)], "linestyle": ""}
        axis.plot(cost, accuracy, alpha=0.35, **style)
        axis.plot(cost.mean(), accuracy.mean(), markersize=10, **style)
        handles.append(Line2D([], [], label=title, **style))
    axis.set(xlabel="field evaluations in training, checks included (thousands)")
    _log_x(axis)
    axis.set(ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    return figure


def neural_ode(folder: str | Path) -> dict[str, Figure]:
    """All figures of a run of ``experiments/neural_ode.py``, by name.

    Args:
        folder: the run folder, with a folder in it for every training.

    Raises:
        FileNotFoundError: there is no finished training in it.
    """
    trainings = finished_trainings(folder)
    return {"cost": cost_of_solves(trainings), "training": solves_while_training(trainings)}


def cost_of_solves(folders: list[Path]) -> Figure:
    """Bars per way of solving: evaluations, time of an epoch, peak memory; with the action and without.

    Args:
        folders: run folders of trainings; bars are means over their seeds, medians for the time.
    """
    groups = _by_way(folders)
    ways = sorted({way for way, _ in groups}, reverse=True)
    figure, axes = _figure(1, 3)
    evaluations, seconds, memory = axes[0]
    for (way, action), paths in groups.items():
        results: list[dict[str, Any]] = [read_summary(path)["results"] for path in paths]
        found = {k: np.array([r[k] for r in results]) for k in ("forward", "backward", "epoch_seconds", "peak_memory")}
        style: dict[str, Any] = {"y": ways.index(way) + (-0.2 if action else 0.2), "height": 0.36}
        style |= {"color": "C1" if action else "C0"}
        forward = found["forward"].mean()
        evaluations.barh(width=forward, **style)
        evaluations.barh(width=found["backward"].mean(), left=forward, alpha=0.45, **style)
        seconds.barh(width=np.median(found["epoch_seconds"]), **style)
        memory.barh(width=found["peak_memory"].mean() / 1e6, **style)
    evaluations.set(xlabel="field evaluations per batch (pale: in backward)", yticks=range(len(ways)), yticklabels=ways)
    seconds.set(xlabel="seconds per epoch", yticks=[])
    memory.set(xlabel="peak memory of a training step (MB)", yticks=[])
    handles = [
        Line2D([], [], color=f"C{i}", linewidth=6, label=f"{w} the action") for i, w in ((0, "without"), (1, "with"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    return figure


def solves_while_training(folders: list[Path]) -> Figure:
    """Evaluations per batch over epochs, and validation accuracy over the time of training; means over the seeds.

    Args:
        folders: run folders of trainings; dashed lines are those with the action.
    """
    groups = _by_way(folders)
    ways = sorted({way for way, _ in groups})
    figure, axes = _figure(1, 2)
    left, right = axes[0]
    for (way, action), paths in groups.items():
        tables = [read_metrics(path) for path in paths]

        def mean(name: str, tables: list[list[dict[str, str]]] = tables) -> np.ndarray:
            return np.array([[float(row[name]) for row in rows] for rows in tables]).mean(0)

        style: dict[str, Any] = {"color": f"C{ways.index(way)}", "linestyle": "--" if action else "-"}
        style |= {"marker": _MARKERS[ways.index(way)], "markersize": 4, "label": f"{way}{', action' * action}"}
        left.plot(mean("epoch"), mean("forward") + mean("backward"), **style)
        right.plot(np.cumsum(mean("epoch_seconds")), 100 * mean("validation_accuracy"), **style)
    left.set(xlabel="epoch", ylabel="field evaluations per batch")
    right.set(xlabel="seconds of training", ylabel="validation accuracy (%)")
    _log_x(right)
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def _by_way(folders: list[Path]) -> dict[tuple[str, bool], list[Path]]:
    """Run folders by way of solving and whether the action is in the objective."""
    groups: dict[tuple[str, bool], list[Path]] = {}
    for path in folders:
        config = read_config(path)
        groups.setdefault((config["way"], config["action"]), []).append(path)
    return groups


def _by_kind(folders: list[Path]) -> dict[str, list[Path]]:
    """Run folders by network and total time, the seeds in order."""
    kinds: dict[str, list[Path]] = {}
    configs = {path: read_config(path) for path in folders}
    for path in sorted(folders, key=lambda p: (configs[p]["total_time"], configs[p]["network"], configs[p]["seed"])):
        kinds.setdefault(f"{configs[path]['network']}, T = {configs[path]['total_time']:g}", []).append(path)
    return kinds


def _seed(folder: Path) -> int:
    return read_config(folder)["seed"]


def _log_x(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(4.2 * columns, 7.0 if columns == 1 else 0), 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
