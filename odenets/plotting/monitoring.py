"""Figures of a monitor: scores beside their threshold, flags over time, and the images that it is surest of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from odenets.plotting.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["monitor_scores", "surest_images"]

CLEAN, CHECKED, FOREIGN = "0.6", "tab:blue", "tab:red"


def monitor_scores(
    calibration: np.ndarray,
    scores: np.ndarray,
    p_values: np.ndarray,
    *,
    threshold: float,
    false_positive_rate: float,
    foreign: np.ndarray | None = None,
    window: int = 200,
) -> Figure:
    """Scores beside those of the calibration images, p-values, and flags over time; with foreign images the ROC.

    Args:
        calibration: scores of the clean images that calibrate, ``(n,)``, as ``monitor.calibration_scores``.
        scores, p_values: of the images that were checked, in their order, ``(N,)``, as
            :class:`odenets.detection.Assessment` has them.
        threshold: above which images are flagged.
        false_positive_rate: that it is for.
        foreign: scores of images that are known to be foreign, ``(M,)``, beside which those checked count as clean.
        window: images over which the share of flags is taken.

    Returns:
        The figure; :func:`save` writes it.

    >>> numbers = np.random.default_rng(0)
    >>> calibration, scores = numbers.chisquare(8, 200), numbers.chisquare(9, 300)
    >>> p = (1 + (calibration >= scores[:, None]).sum(1)) / 201
    >>> figure = monitor_scores(calibration, scores, p, threshold=15.0, false_positive_rate=0.05)
    >>> [axis.get_xlabel() for axis in figure.axes]
    ['score', 'p-value', 'image']
    """
    figure, grid = new_figure(1, 3) if foreign is None else new_figure(2, 2, size=(10, 6.8))
    axes = grid.ravel()
    _draw_histogram(axes[0], {"calibration": calibration, "checked": scores, "foreign": foreign}, threshold)
    _draw_p_values(axes[1], p_values, false_positive_rate)
    _draw_flags(axes[2], p_values <= false_positive_rate + 1e-9, false_positive_rate, window)
    if foreign is not None:
        _draw_roc(axes[3], scores, foreign, threshold)
    return figure


def surest_images(images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int = 6) -> Figure:
    """Images with a title each, row by row.

    Args:
        images: each ``(C, H, W)`` of one or three channels; of others the mean is shown. Pixels are in [0, 1]; an image
            with others is stretched from its least to its largest.
        titles: one for each.
        columns: of the grid.

    Returns:
        The figure; :func:`save` writes it.

    >>> figure = surest_images([np.zeros((3, 8, 8))] * 4, list("abcd"), columns=3)
    >>> len(figure.axes), figure.axes[3].get_title()
    (6, 'd')
    """
    rows = max(1, -(-len(images) // columns))
    figure, axes = new_figure(rows, columns, size=(1.75 * columns, 2.15 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(_shown(np.asarray(image, dtype=float)), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
    return figure


def _draw_histogram(axis: Axes, kinds: dict[str, np.ndarray | None], threshold: float) -> None:
    """Scores on a logarithmic axis where all are positive, as distances are."""
    values = {name: each for name, each in kinds.items() if each is not None and len(each)}
    together = np.concatenate([*values.values()])
    low, high = together.min(), together.max()
    logarithmic = low > 0 and high > 20 * low
    ends = (low, high) if high > low else (low - 0.5, high + 0.5)
    bins = (np.geomspace(*ends, 50) if logarithmic else np.linspace(*ends, 50)).tolist()
    for (name, each), color in zip(values.items(), (CLEAN, CHECKED, FOREIGN), strict=False):
        weights = np.full(len(each), 100 / len(each))
        label = f"{name} ({len(each)})"
        axis.hist(each, bins, weights=weights, histtype="stepfilled", alpha=0.5, color=color, label=label)
    axis.axvline(threshold, color="black", linewidth=1, label="threshold")
    if logarithmic:
        axis.set_xscale("log")
    axis.set(title="scores", xlabel="score", ylabel="images (%)")
    axis.legend(fontsize="x-small")


def _draw_p_values(axis: Axes, p_values: np.ndarray, rate: float) -> None:
    axis.hist(
        p_values, np.linspace(0, 1, 21).tolist(), weights=np.full(len(p_values), 20 / len(p_values)), color=CHECKED
    )
    axis.axhline(1, color="black", linestyle=":", linewidth=1, label="clean images")
    axis.axvspan(0, rate, color=FOREIGN, alpha=0.2, label="flagged")
    axis.set(title="p-values of those checked", xlabel="p-value", ylabel="density", xlim=(0, 1))
    axis.legend(fontsize="x-small")


def _draw_flags(axis: Axes, flags: np.ndarray, rate: float, window: int) -> None:
    width = max(1, min(window, len(flags) // 2 or 1))
    begins = np.arange(0, len(flags), width)
    shares = [100 * flags[begin : begin + width].mean() for begin in begins]
    ends = np.minimum(begins + width, len(flags))
    axis.stairs(shares, np.append(begins, ends[-1]), color=CHECKED, linewidth=1.5)
    axis.axhline(100 * rate, color="black", linestyle=":", linewidth=1, label=f"clean images ({100 * rate:g} %)")
    top = max(100 * rate * 2, *shares) * 1.15
    axis.set(title=f"flagged, by {width} images", xlabel="image", ylabel="flagged (%)", ylim=(0, top))
    axis.legend(fontsize="x-small")


def _draw_roc(axis: Axes, clean: np.ndarray, foreign: np.ndarray, threshold: float) -> None:
    clean, foreign = np.sort(clean), np.sort(foreign)
    order = np.concatenate([clean, foreign, [-np.inf]])
    order.sort()
    false, true = (1 - np.searchsorted(each, order, side="right") / len(each) for each in (clean, foreign))
    below = (np.searchsorted(clean, foreign, side=side) for side in ("left", "right"))  # equal ones count half
    area = sum(each.mean() for each in below) / 2 / len(clean)
    axis.plot(false, true, color=FOREIGN, label=f"AUROC {area:.3f}")
    axis.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    point = (clean > threshold).mean(), (foreign > threshold).mean()
    axis.plot(*point, "ko", markersize=5, label=f"threshold: {100 * point[1]:.0f} % detected")
    axis.set(title="foreign against checked", xlabel="false-positive rate", ylabel="detection rate")
    axis.set(xlim=(-0.02, 1), ylim=(0, 1.02))
    axis.legend(fontsize="x-small", loc="lower right")


def _shown(image: np.ndarray) -> Any:
    """As matplotlib takes it, ``(H, W)`` or ``(H, W, 3)`` in [0, 1]."""
    if image.min() < 0 or image.max() > 1:
        image = (image - image.min()) / max(image.max() - image.min(), 1e-12)
    if len(image) == 3:
        return image.transpose(1, 2, 0)
    return image.mean(0)
