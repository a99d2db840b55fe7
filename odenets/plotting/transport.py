"""Figures of points on their way through a network, and of how far they are moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from odenets.plotting.figures import new_figure
from odenets.transport import Moves

__all__ = ["clouds", "displacements"]


def clouds(states: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, after: Sequence[int]) -> Figure:
    """Point clouds after some blocks, a row per network (Figs 12, 22, 38 to 41).

    Args:
        states: per network the states before and after every block, ``depth + 1`` arrays ``(N, 2)``.
        labels: class of each point, ``(N,)``, drawn in red, blue and green.
        after: after which blocks; 0 is the input.
    """
    figure, axes = new_figure(len(states), len(after))
    colours = np.array(["C3", "C0", "C2"])[labels]
    for row, (name, clouds) in zip(axes, states.items(), strict=True):
        for axis, block in zip(row, after, strict=True):
            axis.scatter(*clouds[block].T, c=colours, s=5)
            axis.set_title(f"after block {block}" if block else "input", fontsize="small")
        row[0].set_ylabel(name)
    return figure


def displacements(moves: Mapping[str, Moves]) -> Figure:
    """Displacement by each block beside the exact Wasserstein distance it covers, a column per network (Fig. 37)."""
    figure, axes = new_figure(1, len(moves))
    for axis, (name, found) in zip(axes[0], moves.items(), strict=True):
        blocks = np.arange(1, len(found.w2) + 1)
        for label, values, style in (
            ("root mean square displacement", found.root_mean_square, "C0-"),
            ("$W_2$", found.w2, "C0--"),
            ("mean displacement", found.mean, "C1-"),
            ("$W_1$", found.w1, "C1--"),
        ):
            axis.plot(blocks, values, style, label=label)
        axis.set(title=name, xlabel="block", ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    return figure
