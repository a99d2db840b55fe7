"""Figures of adaptive depth."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.runs import finished_trainings
from odenets.plotting.figures import MARKERS, log_x, new_figure
from odenets.training.runs import read_config, read_metrics, read_summary

__all__ = ["accuracy_against_cost", "adaptive_depth", "block_errors", "depth_and_steps"]


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
    figure, axes = new_figure(2, len(kinds))
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
    figure, axes = new_figure(1, len(kinds))
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
    figure, axes = new_figure(1, 1)
    axis: Axes = axes[0, 0]
    handles = []
    for i, (title, paths) in enumerate(_by_kind(folders).items()):
        results: list[dict[str, Any]] = [read_summary(path)["results"] for path in paths]
        trained = [r for r in results if not r["diverged"]]
        if not trained:
            continue
        cost = np.array([r["training_evaluations"] + r["check_evaluations"] for r in trained]) / 1e3
        accuracy = 100 * np.array([r["solution"] for r in trained])
        style: dict[str, Any] = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
        axis.plot(cost, accuracy, alpha=0.35, **style)
        axis.plot(cost.mean(), accuracy.mean(), markersize=10, **style)
        handles.append(Line2D([], [], label=title, **style))
    axis.set(xlabel="field evaluations in training, checks included (thousands)")
    log_x(axis)
    axis.set(ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    return figure


def _by_kind(folders: list[Path]) -> dict[str, list[Path]]:
    """Run folders by network and total time, the seeds in order."""
    kinds: dict[str, list[Path]] = {}
    configs = {path: read_config(path) for path in folders}
    for path in sorted(folders, key=lambda p: (configs[p]["total_time"], configs[p]["network"], configs[p]["seed"])):
        kinds.setdefault(f"{configs[path]['network']}, T = {configs[path]['total_time']:g}", []).append(path)
    return kinds


def _seed(folder: Path) -> int:
    return read_config(folder)["seed"]
