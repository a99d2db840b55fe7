"""Flows as a sequence of flows of one block each, which may go alone, and back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn

from odenets.blocks import Block
from odenets.depth.compression.divergence import run, tensor_in
from odenets.flow import Flow
from odenets.network import Network

__all__ = ["Steps", "rolled", "unrolled"]


class Steps(nn.Sequential):
    """A flow, each of its blocks a flow of its own.

    >>> import odenets
    >>> [flow.depth for flow in Steps(odenets.Flow(odenets.MLPField(2)), odenets.Flow(odenets.MLPField(2)))]
    [1, 1]
    """


def unrolled(model: nn.Module) -> nn.Module:
    """A ``model`` with the flows in it as :class:`Steps`, and a network as a sequence of its layers.

    Flows whose blocks share fields are left as they are.

    Raises:
        ValueError: a network with a forward pass of its own or that reads an ensemble of outputs, or a flow that has no
            field yet.
    """
    if isinstance(model, Network):
        kind = type(model)
        if kind.forward is not Network.forward or kind.record is not Network.record or _has_hooks(model):
            raise ValueError(
                f"{kind.__name__} has a forward pass or hooks of its own, which are not those of its layers one after "
                "another: put what they do into its encoder and head"
            )
        if model.readout != "solution":
            raise ValueError(
                "a network with readout='ensemble' reads several outputs of its last block, which must stay"
            )
        layers: list[tuple[str, nn.Module]] = [("encoder", model.encoder)]
        for n, layer in enumerate(model.layers):
            number = n // 2 if len(model.layers) > 1 else ""
            layers.append((f"transition{number}" if n % 2 else f"flow{number}", layer))
        model = nn.Sequential(OrderedDict([*layers, ("head", model.head)]))
    for name, flow in [*model.named_modules()]:
        if isinstance(flow, Flow):
            if not len(flow.blocks):
                raise ValueError("model has a flow without a field: call it once, and train it, before")
            if flow.depth > 1 and not flow.shared and flow.stage_fields != "chained":
                steps = Steps(*(flow.part(m, m + 1) for m in range(flow.depth)))
                if not name:
                    return steps
                model.set_submodule(name, steps)
    return model


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks)


@torch.no_grad()
def rolled(model: nn.Module, whole: nn.Module, inputs: Any) -> nn.Module:
    """Join what :func:`unrolled` took apart, to a network or a flow if the ``whole`` is one and nothing else is in it.

    Args:
        model: an unrolled network, in eval mode.
        whole: what it comes from.
        inputs: of a batch, by whose output is seen that the joined network computes the same.
    """
    wanted = tensor_in(run(model, inputs))
    for name, steps in [*model.named_modules()]:
        if isinstance(steps, Steps):
            layers = _joined([*steps])
            new = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
            if not name:
                model = new
            else:
                model.set_submodule(name, new)
    if isinstance(whole, Network):
        encoder, *layers, head = model.children()
        flows, transitions = layers[::2], layers[1::2]
        if all(isinstance(flow, Flow) for flow in flows):
            network = Network(encoder, cast(list[Flow], flows), head, transitions=transitions)
            network.eval()
            if torch.equal(tensor_in(run(network, inputs)), wanted):
                return network
    return model


def _joined(layers: list[nn.Module]) -> list[nn.Module]:
    """Flows that follow each other in time as one, without what passes the state on."""
    joined: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Identity):
            continue
        before = joined[-1] if joined else None
        if isinstance(layer, Flow) and isinstance(before, Flow) and _follows(before, layer):
            blocks = [cast(Block, block) for block in (*before.blocks, *layer.blocks)]
            joined[-1] = Flow.of(blocks, start=before.start, **before.settings).train(before.training)
        else:
            joined.append(layer)
    return joined or [nn.Identity()]


def _follows(before: Flow, after: Flow) -> bool:
    return abs(before.start + sum(before.h) - after.start) <= 1e-9 * max(1.0, abs(after.start))
