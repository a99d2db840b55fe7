"""Indices of blocks, by which they know their places in caches: numbered anew where others have gone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from odenets.depth.compression.divergence import run, tensor_in

__all__ = ["renumber"]

NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "block_index")
"""Attributes that hold the index of a block."""


@torch.no_grad()
def renumber(model: nn.Module, inputs: Any, removed: Collection[str], whole: nn.Module) -> None:
    """Number the blocks that are left without gaps, where they hold an index and some are ``removed``.

    A cache of earlier tokens is read by it, and one with holes would be taken for an empty one.

    Args:
        model: the compressed network, changed in place.
        inputs: of a batch.
        removed: the names of the blocks that have gone.
        whole: the network before.

    Raises:
        ValueError: the blocks compute something else under their new indices.
    """
    if not any(
        hasattr(part, name) for block in removed for part in whole.get_submodule(block).modules() for name in NAMES
    ):
        return
    holders = _holders(model)
    indices = sorted({getattr(part, name) for part, name in holders})
    first = min(getattr(part, name) for part, name in _holders(whole))
    new = {index: first + n for n, index in enumerate(indices)}
    output = tensor_in(run(model, inputs))
    for part, name in holders:
        setattr(part, name, new[getattr(part, name)])
    if not torch.equal(tensor_in(run(model, inputs)), output):
        raise ValueError(
            f"blocks depend on their index ({holders[0][1]}), and compute something else where blocks before them have "
            "gone: such a network cannot lose blocks"
        )


def _holders(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that hold an index, and the names of the attributes that do."""
    return [(part, name) for part in model.modules() for name in NAMES if isinstance(getattr(part, name, None), int)]
