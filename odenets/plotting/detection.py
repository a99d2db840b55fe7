"""Figures of detectors: receiver operating characteristics, and histograms of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from odenets.plotting.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["histograms", "operating_characteristics"]


def operating_characteristics(curves: Mapping[str, Mapping[str, np.ndarray]], false: np.ndarray) -> Figure:
    """Detection rate over false-positive rate, a panel per set and a line per detector.

    Args:
        curves: per set and detector the detection rates at ``false``, as :func:`odenets.detection.detection_rates` has
            them.
        false: false-positive rates, such as :data:`odenets.detection.FALSE_POSITIVE_RATES`.

    Returns:
        The figure; :func:`save` writes it.

    >>> false = np.linspace(0, 1, 5)
    >>> figure = operating_characteristics({"FGM": {"trajectory": false**0.5}}, false)
    >>> figure.axes[0].get_title(), figure.axes[0].get_ylabel()
    ('FGM', 'detection rate')
    """
    figure, axes = new_figure(1, len(curves))
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for name, rates in lines.items():
            axis.plot(false, rates, label=name)
        axis.plot([0, 1], [0, 1], color="0.7", linestyle=":")
        axis.set(title=title, xlabel="false-positive rate", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("detection rate")
    axes[0, -1].legend(fontsize="x-small", loc="lower right")
    return figure


def histograms(
    values: Mapping[str, Mapping[str, np.ndarray]], *, xlabel: str, lines: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Overlaid histograms, a panel per network [K24, fig. 21].

    Args:
        values: per network and kind of sample the values, ``(N,)``.
        xlabel: of the axes.
        lines: per network, where vertical lines stand.

    Returns:
        The figure; :func:`save` writes it.

    >>> values = {"clean": np.random.randn(100), "attacked": np.random.randn(100) + 2}
    >>> figure = histograms({"resnet": values}, xlabel="action", lines={"resnet": [1.0]})
    >>> figure.axes[0].get_xlabel()
    'action'
    """
    figure, axes = new_figure(1, len(values))
    for axis, (title, kinds) in zip(axes[0], values.items(), strict=True):
        low, high = np.quantile(np.concatenate([*kinds.values()]), [0.001, 0.995])
        bins = np.linspace(low, high, 60)
        for name, samples in kinds.items():
            axis.hist(samples, bins, histtype="stepfilled", alpha=0.45, density=True, label=name)
        for x in (lines or {}).get(title, ()):
            axis.axvline(x, color="black", linewidth=1)
        axis.set(title=title, xlabel=xlabel, yticks=[])
    axes[0, 0].legend(fontsize="small")
    return figure
