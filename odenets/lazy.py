"""Parameters of fields that are made from the first input, for what is to hold them before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["LazyParameters", "refuse_state"]

MOST = 6
"""Parameters of the default field that has most: two norms and two convolutions."""


class LazyParameters(nn.Module):
    """Parameters of fields whose kind is not known yet, uninitialized as those of torch's lazy modules.

    They become the parameters of the fields, so that an optimizer built before the first input trains these. A
    ``state_dict`` holds nothing of them.

    Args:
        fields: how many.
    """

    def __init__(self, fields: int) -> None:
        super().__init__()
        for i in range(MOST * fields):
            setattr(self, str(i), UninitializedParameter())

    @torch.no_grad()
    def become(self, fields: Sequence[nn.Module]) -> None:
        """Take the place of the parameters of the fields, with their values; those left over are empty."""
        parameters: Any = iter([*self.parameters()])
        for field in fields:
            places = [(m, name) for m in field.modules() for name, _ in m.named_parameters(recurse=False)]
            for module, name in places:
                lazy, p = next(parameters), getattr(module, name)
                lazy.materialize(p.shape, p.device, p.dtype)
                lazy.copy_(p)
                setattr(module, name, lazy)
            for _ in range(MOST - len(places)):
                next(parameters).materialize((0,))

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


def refuse_state(flow: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a state is loaded: one of blocks is none of a flow that has no field yet.

    Raises:
        RuntimeError: it is, and would not be loaded.
    """
    if not len(flow.blocks) and any(key.startswith(f"{prefix}blocks.") for key in state_dict):
        raise RuntimeError(
            f"the flow {prefix.removesuffix('.')!r} has no field yet: call the network once on a batch before "
            "load_state_dict, or save and load with odenets.save_weights and odenets.load_weights, which make it"
        )
