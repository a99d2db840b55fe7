"""What all figures share: how they are made, labeled and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odenets.errors import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "legend_beside", "log_x", "new_figure", "save"]

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
    with needs("plot"):
        from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend_beside(axis: Axes) -> None:
    """A legend to the right of the axes."""
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")


def new_figure(
    rows: int, columns: int, *, size: tuple[float, float] | None = None, **grid: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, ``(rows, columns)``.

    Args:
        rows, columns: of axes.
        size: width and height in inches, by the number of axes if not given.
        grid: what ``Figure.subplots`` takes.
    """
    with needs("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    size = size or (max(4.2 * columns, 7.0 if columns == 1 else 0), 3.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)
