"""What all figures share: how they are made, labeled and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odenets.errors import needs
from odenets.plotting.dark import on_dark_paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "legend_beside", "log_x", "new_figure", "save"]

MARKERS = "os^Dv<>p*X"


def save(
    figures: Mapping[str, Figure], folder: str | Path, *, formats: tuple[str, ...] = ("png",), dark: bool = False
) -> list[Path]:
    """Write each figure to ``folder / name.format``.

    Args:
        figures: by name.
        folder: which is made if it is not there.
        formats: endings that matplotlib knows.
        dark: whether ``name_dark.format`` is written too, with grays inverted; then neither has a background,
            so that a page in light colors shows the one, a page in dark colors the other.

    Returns:
        The paths.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save({"empty": Figure()}, folder, dark=True)]
        ['empty.png', 'empty_dark.png']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for suffix in formats:
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=100, transparent=dark or None)
            if dark:
                paths.append(folder / f"{name}_dark.{suffix}")
                with on_dark_paper(figure):
                    figure.savefig(paths[-1], dpi=100, transparent=True)
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
