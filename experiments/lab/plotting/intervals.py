"""Intervals of several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lab.statistics import Interval
from odenets.plotting.figures import MARKERS, new_figure

__all__ = ["intervals"]


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
        x, means = zip(*pairs, strict=True)
        style = {"marker": MARKERS[i % len(MARKERS)], "capsize": 3}
        axes[0, 0].errorbar(x, [m.mean for m in means], [m.half_width for m in means], label=name, **style)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    if logarithmic:
        axes[0, 0].set_xscale("log")
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    return figure
