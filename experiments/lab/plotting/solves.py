"""Figures of neural ODEs and who solves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.runs import finished_trainings
from odenets.plotting.figures import MARKERS, log_x, new_figure
from odenets.training.runs import read_config, read_metrics, read_summary

__all__ = ["cost_of_solves", "neural_ode", "solves_while_training"]


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
    figure, axes = new_figure(1, 3)
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
    figure, axes = new_figure(1, 2)
    left, right = axes[0]
    for (way, action), paths in groups.items():
        tables = [read_metrics(path) for path in paths]

        def mean(name: str, tables: list[list[dict[str, str]]] = tables) -> np.ndarray:
            return np.array([[float(row[name]) for row in rows] for rows in tables]).mean(0)

        style: dict[str, Any] = {"color": f"C{ways.index(way)}", "linestyle": "--" if action else "-"}
        style |= {"marker": MARKERS[ways.index(way)], "markersize": 4, "label": f"{way}{', action' * action}"}
        left.plot(mean("epoch"), mean("forward") + mean("backward"), **style)
        right.plot(np.cumsum(mean("epoch_seconds")), 100 * mean("validation_accuracy"), **style)
    left.set(xlabel="epoch", ylabel="field evaluations per batch")
    right.set(xlabel="seconds of training", ylabel="validation accuracy (%)")
    log_x(right)
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
