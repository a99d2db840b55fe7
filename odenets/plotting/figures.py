"""What all figures share: how they are made, labelled and saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from odenets.statistics import Interval

__all__ = ["MARKERS", "intervals", "log_x", "new_figure", "save"]

MARKERS = "os^Dv<>p*X"


def save(figures: Mapping[str, Figure], folder: str | Path, *, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Write each figure to ``folder / name.format`` and return the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in formats]
    for path in paths:
        figures[path.stem].savefig(path, dpi=100)
    return paths


def log_x(axis: Axes) -> None:
    """A logarithmic x axis with few, plain labels."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def new_figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, ``(rows, columns)``."""
    figure = Figure(figsize=(max(4.2 * columns, 7.0 if columns == 1 else 0), 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


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
    for i, (name, pairs) in enumerate(series.items()):
        x, found = zip(*pairs, strict=True)
        style = {"marker": MARKERS[i % len(MARKERS)], "capsize": 3}
        axes[0, 0].errorbar(x, [f.mean for f in found], [f.half_width for f in found], label=name, **style)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    if logarithmic:
        axes[0, 0].set_xscale("log")
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return figure
