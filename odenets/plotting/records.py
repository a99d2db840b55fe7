"""The figure of a record: what every block measures on every sample, and its mean by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from odenets.errors import needs
from odenets.plotting.figures import new_figure
from odenets.records import Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["blocks_by_samples"]

UNITS = {
    "action": "state² / time", "residue": "state² / time²", "square_norm": "state² / time²", "error": "state",
    "displacement": "state",
}  # fmt: skip
LINE, LEAST, MOST = 0.155, 2.2, 9.0  # inches: of a line of text, of a row of panels
LETTERS = 30  # of a name
CURVES = 10  # colors that are told apart
INTERVAL = (5, 95)  # percentiles of the samples
Groups = list[tuple[Any, np.ndarray]]  # label and samples


def blocks_by_samples(
    records: Records,
    measures: str | Sequence[str] | None = None,
    *,
    labels: Any = None,
    sort: bool = False,
    units: Mapping[str, str] | None = None,
) -> Figure:
    """A measure of every block on every sample as colors, and its mean by depth beside them; a row per measure.

    A line of colors is a block, with its name, in the order of depth; a column is a sample. Colors begin or end at zero
    and are even about it where both signs occur; the bar has an arrow where they end before the last percent of the
    values, and what is not finite is gray. The curve is the mean over the samples that are finite,
    with the interval from their 5th to their 95th percentile; with labels it is one curve for each, up to ten.

    Args:
        records: what ``record`` returns beside the output.
        measures: one of its measures, or several; all if not given.
        labels: one for each sample, ``(B,)``, by which samples are grouped.
        sort: whether samples are in the order of the first measure's mean over the blocks, within their group.
        units: by measure; those of the library's are known by their names.

    Returns:
        The figure; :func:`save` writes it.

    Raises:
        TypeError: no records.
        ValueError: no measures, none of such a name, no blocks or samples, or another number of labels.

    >>> import torch
    >>> records = Records({"action": torch.rand(3, 20)})
    >>> figure = blocks_by_samples(records, labels=torch.arange(20) % 2, sort=True)
    >>> [axis.get_xlabel() for axis in figure.axes[:2]]
    ['samples by label', 'mean action (state² / time)']
    """
    if not isinstance(records, Records):
        raise TypeError(f"records must be what record returns beside the output, got {type(records).__name__}")
    names = [measures] if isinstance(measures, str) else list(records if measures is None else measures)
    if missing := [name for name in names if name not in records]:
        raise ValueError(f"measures must be among {', '.join(records) or 'none'}, got {', '.join(map(repr, missing))}")
    arrays = records.to_numpy()
    if not names or not arrays[names[0]].size:
        raise ValueError(f"records must hold a measure of some blocks and samples, got {records!r}")
    groups = _groups(arrays[names[0]], labels, sort)
    order = np.concatenate([samples for _, samples in groups])
    height = min(max(LINE * len(records.blocks), LEAST), MOST)
    figure, axes = new_figure(
        len(names), 2, size=(9.0, (height + 0.9) * len(names)), width_ratios=(2.2, 1), sharey="row"
    )
    for (left, right), name in zip(axes, names, strict=True):
        unit = (UNITS | dict(units or {})).get(name)
        title, values = f"{name} ({unit})" if unit else name, arrays[name].astype(float)
        _heat_map(figure, left, values[:, order], title, height)
        _name_blocks(left, records.blocks, round(height / LINE))
        _name_samples(left, groups, "samples by their mean" if sort else "sample")
        _curves(right, values, groups, title)
        for start in records.starts[1:]:
            left.axhline(start - 0.5, color="white", linewidth=1.5)
            right.axhline(start - 0.5, color="0.85", linewidth=1, zorder=0)
    return figure


def _groups(values: np.ndarray, labels: Any, sort: bool) -> Groups:
    """The samples of each label, or all, in the order in which they are drawn."""
    samples = np.arange(values.shape[1])
    if sort:
        samples = np.argsort(values.mean(0), kind="stable")
    if labels is None:
        return [(None, samples)]
    labels = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if labels.shape != samples.shape:
        raise ValueError(f"labels must be one for each of the {len(samples)} samples, got shape {labels.shape}")
    return [(label, samples[labels[samples] == label]) for label in np.unique(labels)]


def _heat_map(figure: Figure, axis: Axes, values: np.ndarray, title: str, height: float) -> None:
    with needs("plot"):
        from matplotlib import colormaps

    lost = ~np.isfinite(values)
    finite = np.zeros(1) if lost.all() else values[~lost]
    low, high = finite.min(initial=0), finite.max(initial=0)
    bottom, top = np.clip(np.percentile(finite, (1, 99)), (low, 0), (0, high))
    if bottom == top:
        bottom, top = (low, high) if low < high else (0, 1)
    if signed := low < 0 < high:
        bottom, top = np.array([-1, 1]) * max(-bottom, top)
    image = axis.imshow(
        values, aspect="auto", vmin=bottom, vmax=top, interpolation="nearest",
        cmap=colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad="0.75"),
    )  # fmt: skip
    axis.grid(False)  # which a style may draw
    figure.colorbar(
        image, ax=axis, label=title, extend=("neither", "min", "max", "both")[(low < bottom) + 2 * (high > top)],
        format="%.3g", pad=0.02, aspect=9 * height, extendfrac=0.12 / height,
    )  # fmt: skip
    if lost.any():
        axis.set_title(f"{lost.sum()} of {lost.size} values are not finite (gray)", fontsize="small")


def _spaced(count: int, room: float) -> range:
    """Every one, or every second, third, ... where there is room for fewer."""
    return range(0, count, ceil(count / room))


def _name_blocks(axis: Axes, blocks: Sequence[str], lines: int) -> None:
    """Names beside the rows."""
    rows = _spaced(len(blocks), lines)
    if max(map(len, blocks)) > LETTERS:  # what all begin with stands beside them once
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(min(blocks), max(blocks), strict=False))
        common = "".join(letter for letter, _ in pairs).rpartition(".")[0]
        axis.set_ylabel(common)
        blocks = [block[len(common) :].removeprefix(".") for block in blocks]
    names = [blocks[m] if len(blocks[m]) <= LETTERS else f"...{blocks[m][3 - LETTERS :]}" for m in rows]
    axis.set_yticks(rows, names, fontsize="x-small")
    axis.tick_params(axis="y", length=2)


def _name_samples(axis: Axes, groups: Groups, title: str) -> None:
    """The label of each group below it."""
    with needs("plot"):
        from matplotlib.ticker import MaxNLocator

    if len(groups) == 1 and groups[0][0] is None:
        axis.set_xlabel(title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    ends = np.cumsum([len(samples) for _, samples in groups])
    for end in ends[:-1]:
        axis.axvline(end - 0.5, color="white", linewidth=0.8)
    names = [str(label) for label, _ in groups]
    shown = _spaced(len(groups), 55 / (max(map(len, names)) + 1))
    middles = ends - np.array([len(samples) for _, samples in groups]) / 2 - 0.5
    axis.set_xticks(middles[shown], [names[i] for i in shown], fontsize="small")
    axis.tick_params(axis="x", length=0)
    axis.set_xlabel("samples by label")


def _curves(axis: Axes, values: np.ndarray, groups: Groups, title: str) -> None:
    with needs("plot"):
        from matplotlib.ticker import MaxNLocator

    apart = 1 < len(groups) <= CURVES
    for i, (label, samples) in enumerate(groups if apart else [(None, np.arange(values.shape[1]))]):
        rows = [row[np.isfinite(row)] for row in values[:, samples]]
        blocks = [m for m, row in enumerate(rows) if row.size]
        means = [rows[m].mean() for m in blocks]
        low, high = (np.array([np.percentile(rows[m], p) for m in blocks]) for p in INTERVAL)
        axis.fill_betweenx(blocks, low, high, color=f"C{i}", alpha=0.1 if apart else 0.25, linewidth=0)
        axis.plot(means, blocks, "o-", color=f"C{i}", markersize=2.5, linewidth=1.2, label=label)
    if values[np.isfinite(values)].min(initial=0.0) >= 0:
        axis.set_xlim(left=0)
    else:
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.tick_params(axis="x", labelsize="small")
    axis.set_xlabel(f"mean {title}", fontsize="small")
    axis.grid(axis="x", alpha=0.3)
    if apart:
        axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
