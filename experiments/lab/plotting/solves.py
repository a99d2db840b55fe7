"""Figures of neural ODEs and who solves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.results import groups
from odenets.plotting.figures import MARKERS, log_x, new_figure

__all__ = ["cost_of_solves", "solves_while_training"]


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
    handles = [
        Line2D([], [], color=f"C{i}", linewidth=6, label=f"{w} the action") for i, w in ((0, "without"), (1, "with"))
    ]
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
        style: dict[str, Any] = {"color": f"C{ways.index(way)}", "linestyle": "--" if action == "True" else "-"}
        style |= {"marker": MARKERS[ways.index(way)], "markersize": 4}
        style |= {"label": f"{way}{', action' * (action == 'True')}"}
        left.plot(columns["epoch"], columns["forward"] + columns["backward"], **style)
        right.plot(np.cumsum(columns["epoch_seconds"]), 100 * columns["validation_accuracy"], **style)
    left.set(xlabel="epoch", ylabel="field evaluations per batch")
    right.set(xlabel="seconds of training", ylabel="validation accuracy (%)")
    log_x(right)
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure
