"""Fixup: how deep residual networks without norms are drawn, so that a step of training does as much at any depth."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn

from odenets.blocks import fields_per_block
from odenets.fields import FixupField, ScaledField
from odenets.flow import Flow
from odenets.initialization import NORMS, initialize
from odenets.network import Network

__all__ = ["fixup"]

N = TypeVar("N", bound=nn.Module)


def fixup(network: N) -> N:
    """Draw a network of blocks without norms as Zhang, Dauphin and Ma (2019) do.

    With L blocks in all flows, and m convolutions and linear layers in a field, in the order in which it holds them:

    - the last layer of each field and the last of the head are 0;
    - the others of a field are He's (fan out), times ``L^(-1/(2 m - 2))``;
    - those of encoder, transitions and head are He's.

    Biases become 0, and so do those of a :class:`~odenets.fields.FixupField`; multipliers become 1. The steps
    then begin as the identity, and a step of SGD of rate eta changes the function by the order of eta, whatever the
    depth, at h = 1. Fields that are no FixupField train without the paper's scalars.

    A scalar acts on all features at once: the paper's authors train them at a tenth of the rate of the weights, and
    those of SkipInit and ReZero go without weight decay, as in the example.

    Args:
        network: a :class:`~odenets.Network` or a :class:`~odenets.Flow`, changed in place.

    Returns:
        The network.

    Raises:
        TypeError: another network, or one with a neural ODE.
        ValueError: a flow without a field or of one shared block, or a field with a norm, without a layer, or with
            weights of another kind; as :func:`odenets.initialize` raises.

    References:
        Zhang, Dauphin, Ma. Fixup initialization: residual learning without normalization. ICLR 2019, arXiv:1901.09321.

    >>> import torch, odenets
    >>> def field():
    ...     return FixupField(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    >>> flow, x = odenets.Flow(field, solver="euler", h=1.0, depth=50), torch.randn(4, 8)
    >>> torch.equal(fixup(flow)(x), x)
    True
    >>> scalars = [p for name, p in flow.named_parameters() if name.endswith((".biases", ".scale"))]
    >>> weights = [p for p in flow.parameters() if not any(p is one for one in scalars)]
    >>> groups = [{"params": weights}, {"params": scalars, "lr": 0.01, "weight_decay": 0.0}]
    >>> optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)
    """
    if not isinstance(network, Network | Flow):
        raise TypeError(f"network must be an odenets.Network or a Flow, got {type(network).__name__}")
    flows = [network] if isinstance(network, Flow) else network.flows
    fields = [field for i, flow in enumerate(flows) for field in _fields(flow, i)]
    layers = [_layers(field) for field in fields]
    depth = sum(flow.depth for flow in flows)
    if isinstance(network, Network):
        outside = [network.encoder, *network.transitions, network.head]
        for module in outside:
            initialize(module, "kaiming")
        for layer in [layer for layer in network.head.modules() if _is_layer(layer)][-1:]:
            nn.init.zeros_(layer.weight)
    for field, (*before, last) in zip(fields, layers, strict=True):
        for layer in before:
            initialize(layer, "kaiming", depth ** (-1 / (2 * len(before))))
        initialize(last, "kaiming")
        nn.init.zeros_(last.weight)
        for module in field.modules():
            if isinstance(module, FixupField):
                nn.init.zeros_(module.biases)
            if isinstance(module, FixupField | ScaledField):
                nn.init.ones_(module.scale)
    return network


def _fields(flow: nn.Module, number: int) -> list[nn.Module]:
    if not isinstance(flow, Flow):
        raise TypeError(f"network must be of Flows, whose depth tells the scale, got a {type(flow).__name__}")
    if not len(flow.blocks):
        raise ValueError(f"flow {number} has no field yet: call network(x) once before it is drawn")
    if flow.shared:
        raise ValueError(f"flow {number} has one block for all its steps: take blocks with weights of their own")
    fields = fields_per_block(flow.tableau, flow.stage_fields)  # behind which a block has what its scheme learns
    return [field for block in flow.blocks for field in block.fields[:fields]]  # type: ignore[index]  # of blocks


def _layers(field: nn.Module) -> list[nn.Linear | nn.modules.conv._ConvNd]:
    """The layers of a field in order; what may not be in it is refused."""
    layers = []
    for name, module in field.named_modules():
        title = f"{name!r} of {type(field).__name__}" if name else type(field).__name__
        if isinstance(module, NORMS):
            raise ValueError(f"fields must have no norms, which Fixup does without, got {title}: norm=None")
        if _is_layer(module):
            layers.append(module)
        elif not isinstance(module, FixupField | ScaledField) and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"fields must have the weights of convolutions and linear layers alone, got {title}, which Fixup "
                "does not know how to draw"
            )
    if not layers:
        raise ValueError(f"fields must have a convolution or linear layer, got none in {type(field).__name__}")
    return layers


def _is_layer(module: nn.Module) -> TypeGuard[nn.Linear | nn.modules.conv._ConvNd]:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
