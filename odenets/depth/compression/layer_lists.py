"""Lists of layers of Hugging Face's models, without the places of blocks that have gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from odenets.depth.compression.divergence import run, tensor_in
from odenets.depth.compression.replacements import InPlaceOf

__all__ = ["close_gaps"]


@torch.no_grad()
def close_gaps(model: nn.Module, inputs: Any) -> None:
    """Take out of lists of layers what only passes the state on, and say in the configuration how many are left.

    So ``save_pretrained`` and ``from_pretrained`` know the compressed network, unless seams lie in it. Nothing is
    changed where the network would compute something else.

    Args:
        model: the compressed network, changed in place.
        inputs: of a batch.
    """
    config: Any = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    for name, whole in [*model.named_modules()]:
        if not (isinstance(whole, nn.ModuleList) and len(whole) == layers):
            continue
        left = [m for m, layer in enumerate(whole) if not _passes(layer)]
        if not left or len(left) == layers:
            continue
        output = tensor_in(run(model, inputs))
        before = {"num_hidden_layers": layers, "layer_types": getattr(config, "layer_types", None)}
        model.set_submodule(name, nn.ModuleList(whole[m] for m in left).train(whole.training))
        config.num_hidden_layers = len(left)
        if before["layer_types"] is not None:
            config.layer_types = [before["layer_types"][m] for m in left]
        if not torch.equal(tensor_in(run(model, inputs)), output):
            model.set_submodule(name, whole)
            for key, value in before.items():
                if value is not None:
                    setattr(config, key, value)


def _passes(layer: nn.Module) -> bool:
    return isinstance(layer.inner if isinstance(layer, InPlaceOf) else layer, nn.Identity)
