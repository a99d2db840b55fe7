"""Trained networks at another depth: merged blocks, random coarsenings for training, and the control without a flow."""

from __future__ import annotations

import copy

from torch import nn

from odenets.coarsening import at_depth, groups_at_depth
from odenets.depth.rule import flow_network
from odenets.groups import Group
from odenets.inputs import arguments, inputs_of
from odenets.normalization import recalibrate
from odenets.regrouping import Inputs, coarsened

__all__ = ["Group", "at_depth", "coarsened", "groups_at_depth", "without_flow"]


def without_flow(network: nn.Module, inputs: Inputs | None = None) -> nn.Sequential:
    """A copy of a network without its flows: encoder, transitions and head, the control of every claim about depth.

    What a network can lose without a loss of accuracy says nothing where it loses nothing without any block.

    Args:
        network: an :class:`~odenets.Network`; it stays as it is.
        inputs: on which statistics of batch norms are recomputed, as :func:`at_depth` takes them; they stay without.

    Returns:
        A plain module.

    Raises:
        TypeError: another network.

    >>> import torch
    >>> from odenets.models import small_network
    >>> without_flow(small_network(depth=4))(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    copied = copy.deepcopy(flow_network(network))
    rest = nn.Sequential(copied.encoder, *copied.transitions, copied.head)
    rest.training = copied.training
    if inputs is not None:
        recalibrate(rest, (arguments(one)[0] for one in inputs_of(inputs, "inputs")))
    return rest
