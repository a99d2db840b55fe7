"""A network with as many blocks as a state that is to be loaded into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from odenets.flow import Flow

__all__ = ["resize_as"]


def resize_as(network: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Give every flow of a ``network`` the blocks and step sizes of a state, which then loads into it.

    For states whose flows have been edited, by :func:`adapt_depth`, and that are no files of
    :func:`odenets.save_weights`. New blocks are copies of the last; an optimizer is built afterwards.

    Args:
        network: any module with flows in it, built by the same code as that of the state.
        state_dict: as ``network.state_dict()`` returns it, with the same names.

    Returns:
        The network.

    Raises:
        KeyError: the state holds no step sizes of a flow.
        ValueError: a flow is shared and of another depth, or has no field yet.

    >>> import odenets
    >>> deep = odenets.Flow(odenets.MLPField(2), depth=4)
    >>> flow = resize_as(odenets.Flow(odenets.MLPField(2)), deep.state_dict())
    >>> flow.load_state_dict(deep.state_dict()), flow.depth
    (<All keys matched successfully>, 4)
    """
    sizes: dict[Flow, list[float]] = {}
    for name, flow in network.named_modules():
        if isinstance(flow, Flow):
            key = f"{name}._extra_state" if name else "_extra_state"
            if key not in state_dict:
                near = [one for one in state_dict if one.endswith("_extra_state")]
                raise KeyError(f"state_dict holds no step sizes {key!r} of the flow {name!r}, but {near}")
            sizes[flow] = state_dict[key].tolist()
    for flow, each in sizes.items():
        flow.resize(each, network)
    return network
