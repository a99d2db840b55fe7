"""A figure for dark paper: what is black, gray or white changes to its opposite, colors and images stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from odenets.errors import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["on_dark_paper"]

GRAY = 0.02  # largest difference of red, green and blue
PARTS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


@contextmanager
def on_dark_paper(figure: Figure) -> Iterator[Figure]:
    """The figure with its grays inverted while the context lasts; its own again afterwards.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = Figure()
        >>> axis = figure.subplots()
        >>> with on_dark_paper(figure):
        ...     axis.title.get_color(), axis.get_facecolor()
        ((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 1.0))
        >>> axis.title.get_color()
        'black'
    """
    with needs("plot"):
        from matplotlib.text import Text

    figure.draw_without_rendering()  # ticks and labels exist from here on
    boxes = [text.get_bbox_patch() for text in figure.findobj(Text)]
    before = [
        (artist, part, getattr(artist, f"get_{part}")())
        for artist in (*figure.findobj(_has_own_colors), *filter(None, boxes))
        for part in PARTS
        if hasattr(artist, f"get_{part}") and hasattr(artist, f"set_{part}")
    ]
    contours: list[Any] = figure.findobj(_is_contour_without_map)
    plain = [(contour, "cmap", contour.get_cmap()) for contour in contours]
    changed = [(*color, inverted) for color in before + plain if (inverted := _inverted(color[2])) is not None]
    try:
        for artist, part, _, inverted in changed:
            getattr(artist, f"set_{part}")(inverted)
        yield figure
    finally:
        for artist, part, value, _ in changed:
            getattr(artist, f"set_{part}")(value)


def _has_own_colors(artist: Any) -> bool:
    """Neither those of its parts, as axes, nor those of a color map."""
    with needs("plot"):
        from matplotlib.axes import Axes
        from matplotlib.figure import FigureBase

    mapped = hasattr(artist, "get_array") and artist.get_array() is not None
    return not mapped and not isinstance(artist, Axes | FigureBase)


def _is_contour_without_map(artist: Any) -> bool:
    """Contours whose colors are given one by one, which matplotlib keeps as a color map of its own."""
    return getattr(artist, "colors", None) is not None and hasattr(artist, "set_cmap")


def _inverted(color: Any) -> Any:
    """The opposite of a gray, or of the grays among several colors; None where there is none."""
    with needs("plot"):
        from matplotlib.colors import ListedColormap, to_rgba_array

    if isinstance(color, ListedColormap):
        inverted = _inverted(color.colors)
        return None if inverted is None else ListedColormap(np.atleast_2d(inverted))
    try:
        colors = to_rgba_array(color)
    except (ValueError, TypeError):  # "auto", "inherit"
        return None
    grays = (np.ptp(colors[:, :3], axis=1) <= GRAY) & (colors[:, 3] > 0)  # "none", once set, would be drawn
    if not grays.any():
        return None
    colors[grays, :3] = 1 - colors[grays, :3]
    return tuple(map(float, colors[0])) if len(colors) == 1 else colors
