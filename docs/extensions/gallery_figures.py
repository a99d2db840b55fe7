"""Figures of the tutorials, for light pages and for dark ones, with what they show as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from odenets import plotting

SHOWN: WeakSet[Figure] = WeakSet()
IMAGE = """
.. image:: /{path}
   :alt: {alt}
   :class: {shown}
"""


def scrape(block: object, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """reST of the figures that a cell made, by pyplot or as a value of a name."""
    named = [value for value in block_vars["example_globals"].values() if isinstance(value, Figure)]
    figures = {id(figure): figure for figure in (*map(pyplot.figure, pyplot.get_fignums()), *named)}
    text = ""
    for figure in figures.values():
        if figure in SHOWN:
            continue
        SHOWN.add(figure)
        path = Path(next(block_vars["image_path_iterator"]))
        for written in plotting.save({path.stem: figure}, path.parent, dark=True):
            shown = "only-dark" if written.stem.endswith("_dark") else "only-light"
            text += IMAGE.format(
                path=written.relative_to(gallery_conf["src_dir"]), alt=alternative(figure), shown=shown
            )
    pyplot.close("all")
    return text


def alternative(figure: Figure) -> str:
    """What a figure shows, as its titles and labels tell; ValueError where they tell nothing."""
    title = figure.get_suptitle()
    parts = [title] if title else []
    parts += [part for axis in figure.axes if (part := _described(axis)) and part not in parts]
    if not parts:
        raise ValueError("a figure needs titles or labels of its axes: who does not see it reads them")
    return "; ".join(parts)


def _described(axis: Axes) -> str:
    title, x, y = axis.get_title(), axis.get_xlabel(), axis.get_ylabel()
    labels = f"{y} over {x}" if x and y else x or y
    return ": ".join(part.replace("\n", " ") for part in (title, labels) if part)
