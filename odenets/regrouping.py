"""The blocks of a flow in groups, each with one block in its place: for good, or for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from odenets.block_sequence import BlockSequence
from odenets.blocks import Block
from odenets.groups import Group, check_groups
from odenets.normalization.stage_batch_norm import StageBatchNorm

__all__ = ["OTHERS", "Inputs", "blocks_of", "coarsened", "flows_of", "norms_of", "regrouped"]

OTHERS = "odenets.depth.compress(network, batches, keep=0.7) takes blocks out of any other residual network"
"""What there is for networks of other make."""
Inputs = Iterable[Any] | Callable[[], Iterable[Any]]
"""What :func:`odenets.inputs.inputs_of` reads: batches of inputs or of pairs, or a function that makes them."""


@contextmanager
def coarsened(network: nn.Module, groups: Sequence[Sequence[Group]]) -> Iterator[None]:
    """The network itself with its blocks merged, for a while: what training at several depths takes, without copies.

    Statistics of batch norms are those of the whole network, and passes in training mode change them.

    Args:
        network: an :class:`~odenets.Network` or a :class:`~odenets.Flow`.
        groups: for each flow its groups in order, as :func:`groups_at_depth` returns them.

    Yields:
        Nothing; afterwards every block is there again with its own h, also after an error.

    Raises:
        TypeError, ValueError: as :func:`at_depth`, or groups that are not all blocks of a flow, each once and in order.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), depth=4)
    >>> with coarsened(flow, [[Group(0, 3, stays=1), Group(3, 4, stays=3)]]):
    ...     flow.h
    (0.75, 0.25)
    >>> flow.depth
    4
    """
    flows = flows_of(network)
    if len(groups) != len(flows):
        raise ValueError(f"groups must hold those of each of {len(flows)} flows, got {len(groups)}")
    for flow, its in zip(flows, groups, strict=True):
        check_groups(its, flow.depth)
    before = [[(block, block.h) for block in blocks_of(flow)] for flow in flows]
    try:
        for flow, its in zip(flows, groups, strict=True):
            flow.replace_blocks(regrouped(flow, its, network))
        yield
    finally:
        for flow, blocks in zip(flows, before, strict=True):
            for block, h in blocks:
                block.h = h
            flow.replace_blocks([block for block, _ in blocks])


def flows_of(network: nn.Module) -> list[BlockSequence]:
    """The flows of a network, or a flow itself, whose blocks can be merged.

    Raises:
        TypeError: another network.
        ValueError: a flow that is shared, a neural ODE, or has no field yet, or a flow or block that is used twice.
    """
    network = getattr(network, "_orig_mod", network)  # behind torch.compile too
    flows: Any = [network] if isinstance(network, BlockSequence) else getattr(network, "flows", None)
    if not isinstance(flows, list) or not hasattr(network, "steps"):
        raise TypeError(
            f"network must be an odenets.Network or Flow, whose blocks are steps, got {type(network).__name__}: "
            f"{OTHERS}"
        )
    for i, flow in enumerate(flows):
        if not isinstance(flow, BlockSequence) or flow.shared:
            raise ValueError(
                f"flow {i} has one field for all its steps: there are no blocks to merge; make one with other steps, "
                "NeuralODE(field, steps=...) or Flow(field, depth=..., shared=True)"
            )
        if not len(flow.blocks):
            raise ValueError(f"flow {i} has no field yet: call the network once before it gets another depth")
    blocks = [block for flow in flows for block in flow.blocks]
    if len({*flows}) < len(flows) or len({*blocks}) < len(blocks):
        raise ValueError("network uses a flow or a block twice: another depth needs each once")
    return flows


def blocks_of(flow: BlockSequence) -> list[Block]:
    """The blocks of a flow."""
    return [cast(Block, block) for block in flow.blocks]


def norms_of(network: nn.Module) -> list[nn.Module]:
    """The batch norms of a network that keep statistics."""
    kinds = StageBatchNorm | nn.modules.batchnorm._BatchNorm
    return [m for m in network.modules() if isinstance(m, kinds) and m.running_mean is not None]


def regrouped(flow: BlockSequence, groups: Sequence[Group], whole: nn.Module) -> list[Block]:
    """The blocks that stay, with their new h, and copies of those that are split.

    Raises:
        ValueError: h changes nothing in a block.
    """
    if not getattr(flow.tableau, "follows_time", True) and any(g.last - g.first > 1 or g.pieces > 1 for g in groups):
        raise ValueError(
            f"another depth is another function where blocks of {flow.tableau.name} end at equilibria that do not "
            "depend on h: take Equilibrium(injection='sum')"
        )
    blocks, h, new = blocks_of(flow), flow.h, []
    for group in groups:
        block = blocks[group.stays]
        block.h = math.fsum(h[group.first : group.last]) / group.pieces
        new += [block, *(block.copy_within(whole) for _ in range(group.pieces - 1))]
    return new
