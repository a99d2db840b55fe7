"""Figures of points on their way through a network, and of how far they are moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from odenets.plotting.figures import MARKERS, legend_beside, log_x, new_figure
from odenets.transport import Moves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["action_against_accuracy", "clouds", "displacements", "pictures", "refinement_by_block"]


def clouds(states: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, after: Sequence[int]) -> Figure:
    """Point clouds after some blocks, a row per network [K24, Figs 12, 22, 38 to 41].

    Args:
        states: per network the states before and after every block, ``depth + 1`` arrays ``(N, 2)``.
        labels: class of each point, ``(N,)``, drawn in red, blue and green.
        after: after which blocks; 0 is the input.

    Returns:
        The figure; :func:`save` writes it.

    >>> states = [np.random.randn(20, 2) for _ in range(4)]  # of three blocks
    >>> figure = clouds({"flow": states}, np.arange(20) % 2, after=[0, 3])
    >>> [axis.get_title() for axis in figure.axes]
    ['input', 'after block 3']
    """
    figure, axes = new_figure(len(states), len(after))
    colors = np.array(["C3", "C0", "C2"])[labels]
    for row, (name, clouds) in zip(axes, states.items(), strict=True):
        for axis, block in zip(row, after, strict=True):
            axis.scatter(*clouds[block].T, c=colors, s=5)
            axis.set_title(f"after block {block}" if block else "input", fontsize="small")
        row[0].set_ylabel(name)
    return figure


def displacements(moves: Mapping[str, Moves]) -> Figure:
    """Displacement by each block beside the exact Wasserstein distance it covers [K24, Fig. 37].

    Args:
        moves: per network what :func:`odenets.transport.moves` returns, a column each.

    Returns:
        The figure; :func:`save` writes it.

    >>> one = np.ones(3)
    >>> figure = displacements({"flow": Moves(mean=one, root_mean_square=one, w1=one, w2=one)})
    >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
    ('flow', 'block')
    """
    figure, axes = new_figure(1, len(moves))
    for axis, (name, move) in zip(axes[0], moves.items(), strict=True):
        blocks = np.arange(1, len(move.w2) + 1)
        for label, values, style in (
            ("root mean square displacement", move.root_mean_square, "C0-"),
            ("$W_2$", move.w2, "C0--"),
            ("mean displacement", move.mean, "C1-"),
            ("$W_1$", move.w1, "C1--"),
        ):
            axis.plot(blocks, values, style, label=label)
        axis.set(title=name, xlabel="block", ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    return figure


def action_against_accuracy(points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Test accuracy against action, and the regression of accuracy on the logarithm of the action over all.

    Args:
        points: by name, such as that of an initialization, the actions and the accuracies in [0, 1] of some networks:
            a mark each, in the color of the name.

    Returns:
        The figure; :func:`save` writes it.

    >>> points = {"orthogonal": ([0.1, 0.2], [0.95, 0.96]), "normal": ([0.5, 1.0], [0.9, 0.8])}
    >>> figure = action_against_accuracy(points)
    >>> figure.axes[0].get_ylabel()
    'test accuracy (%)'
    """
    figure, axes = new_figure(1, 1)
    axis = axes[0, 0]
    for i, (name, (action, accuracy)) in enumerate(points.items()):
        axis.plot(action, 100 * np.array(accuracy), MARKERS[i % len(MARKERS)], label=name)
    x = np.log10(np.concatenate([action for action, _ in points.values()]))
    y = 100 * np.concatenate([accuracy for _, accuracy in points.values()])
    ends = np.array([x.min(), x.max()])
    axis.plot(10**ends, np.polynomial.Polynomial.fit(x, y, 1)(ends), "k--", linewidth=1)
    log_x(axis)
    axis.set(xlabel="action on test images", ylabel="test accuracy (%)")
    legend_beside(axis)
    return figure


def refinement_by_block(blocks: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> Figure:
    """Displacement over state, and its cosine with the loss gradient, by block [K24, Fig. 6].

    Args:
        blocks: by name of a kind of network a pair, the ratios and the cosines that
            :class:`odenets.analysis.Refinement` holds, each ``(networks, blocks)``; means over networks are drawn.

    Returns:
        The figure; :func:`save` writes it.

    >>> figure = refinement_by_block({"ResNet": ([[0.5, 0.2, 0.1]], [[-0.1, -0.2, -0.3]])})
    >>> [axis.get_ylabel() for axis in figure.axes]
    ['displacement over state', 'cosine with the loss gradient']
    """
    figure, axes = new_figure(1, 2)
    for i, (name, pair) in enumerate(blocks.items()):
        for axis, values in zip(axes[0], pair, strict=True):
            means = np.mean(values, 0)
            axis.plot(range(1, len(means) + 1), means, f"{MARKERS[i % len(MARKERS)]}-", markersize=4, label=name)
    axes[0, 0].set(xlabel="block", ylabel="displacement over state", yscale="log")
    axes[0, 1].set(xlabel="block", ylabel="cosine with the loss gradient")
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    legend_beside(axes[0, 1])
    return figure


def pictures(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Images in a grid, a row per sample.

    Args:
        images: ``(samples, columns, C, H, W)`` in [0, 1], C = 1 or 3.
        titles: of the columns.

    Returns:
        The figure; :func:`save` writes it.

    >>> figure = pictures(np.random.rand(2, 3, 1, 8, 8), ["clean", "attacked", "difference"])
    >>> len(figure.axes)
    6
    """
    figure, axes = new_figure(*images.shape[:2])
    figure.set_size_inches(images.shape[1], images.shape[0] + 0.2)
    for row, sample in zip(axes, images, strict=True):
        for axis, image in zip(row, sample, strict=True):
            axis.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize="small")
    return figure
