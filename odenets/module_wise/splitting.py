"""Where a network is split into modules: evenly, or so that each keeps equally much for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odenets.adapting import AdaptedModel
from odenets.analysis.memory import measure_memory
from odenets.flow import Flow
from odenets.modes import inputs_for, keeping_state
from odenets.module_wise.partition import At, blocks_of, cut
from odenets.network import Network

__all__ = ["activation_memory", "balanced", "even", "lightest"]


def even(blocks: int, modules: int) -> list[int]:
    """Ends of modules of equally many blocks, the first ones with one more where it does not come out even.

    Raises:
        ValueError: more modules than blocks, or none.

    >>> even(54, 4)
    [14, 28, 41, 54]
    """
    if not 1 <= modules <= blocks:
        raise ValueError(f"modules must be between 1 and the number of blocks, {blocks}, got {modules}")
    size, more = divmod(blocks, modules)
    return [k * size + min(k, more) for k in range(1, modules + 1)]


def activation_memory(network: Flow | Network | AdaptedModel, x: Tensor, at: At = "end") -> list[int]:
    """Bytes that each block keeps for its backward pass with inputs ``x``, measured; the first with the encoder's.

    The network is left as it was: modes, buffers and random state.
    """
    parts, _ = cut(network, range(1, blocks_of(network) + 1), at)
    kept, x = [], inputs_for(network, x)
    with keeping_state(network, *parts):  # batch norms see x, and dropout draws
        for part in parts:
            part.train()
            state = x.detach()
            kept.append(measure_memory(lambda: part(state), x.device).left)  # noqa: B023 - called here
            with torch.no_grad():
                x = part(state)
    return kept


def lightest(weights: Sequence[int], modules: int) -> list[int]:
    """Ends of modules of consecutive blocks whose heaviest weighs least.

    Raises:
        ValueError: more modules than blocks, or none.

    >>> lightest([4, 4, 4, 2, 2, 2, 1, 1], 2)
    [2, 8]
    """
    blocks = len(weights)
    if not 1 <= modules <= blocks:
        raise ValueError(f"modules must be between 1 and the number of blocks, {blocks}, got {modules}")
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    best = {(0, 0): (0, [0])}  # of the first m blocks in k modules: the heaviest, and the ends
    for k in range(1, modules + 1):
        for m in range(k, blocks + 1):
            options = ((max(best[k - 1, j][0], sums[m] - sums[j]), j) for j in range(k - 1, m) if (k - 1, j) in best)
            weight, j = min(options)
            best[k, m] = (weight, [*best[k - 1, j][1], m])
    return best[modules, blocks][1][1:]


def balanced(network: Flow | Network | AdaptedModel, modules: int, x: Tensor, at: At = "end") -> list[int]:
    """Ends of equally heavy modules: the heaviest keeps as little for its backward pass as can be (the thesis' TRGL*).

    Args:
        network: to be split.
        modules: how many.
        x: inputs, of the shape of training; a few samples will do.
        at: see :func:`~odenets.module_wise.partition.cut`.

    Raises:
        ValueError: more modules than blocks, or none.
    """
    if not 1 <= modules <= blocks_of(network):
        raise ValueError(f"modules must be between 1 and the number of blocks, {blocks_of(network)}, got {modules}")
    return lightest(activation_memory(network, x, at), modules)
