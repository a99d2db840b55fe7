"""Parameters of fields that are made from the first input, for what is to hold them before."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from odenets.fields import field_for

__all__ = ["LazyParameters", "make_field", "refuse_state"]

_MAKING = threading.RLock()
MOST = 6
"""Parameters of the default field that has most: two norms and two convolutions."""


class Placeholder(UninitializedParameter):
    """One whose number of dimensions is as unknown as its shape."""

    @property
    def ndim(self) -> NoReturn:  # type: ignore[override]  # of what has none
        raise RuntimeError(
            "parameters of a flow without a field have no ndim yet: call the network once, on a batch, before telling "
            "them apart by it"
        )


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
            setattr(self, str(i), Placeholder())

    def become(self, fields: Sequence[nn.Module]) -> None:
        """Take the place of the parameters of the fields, with their values; those left over are empty.

        Where a field is on another kind of device than the placeholders, one of them the meta device, its own
        parameters stay: as after every move there, an optimizer is built behind it.
        """
        held = [*self.parameters()]
        for place in held:
            if is_lazy(place):  # and was not converted meanwhile, which replaces it
                place.materialize((0,))
        for i, field in enumerate(fields):
            places = [(m, name) for m in field.modules() for name, _ in m.named_parameters(recurse=False)]
            for place, (module, name) in zip(held[MOST * i : MOST * (i + 1)], places, strict=False):
                p = getattr(module, name)
                if place.is_meta == p.is_meta:
                    place.data = p.data
                    setattr(module, name, place)
                else:
                    p.requires_grad_(place.requires_grad)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Warn: there is nothing yet to which a function could be applied."""
        warnings.warn(
            "apply passes over a flow without a field: call the network once on a batch before, which makes the field",
            stacklevel=4,
        )
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


def make_field(flow: Any, x: Tensor, make_blocks: Callable[[nn.Module], Sequence[Any]]) -> None:
    """Give a flow the default field for an input, in one thread at a time; where there is none the flow stays."""
    with _MAKING, torch.inference_mode(False):  # whose tensors could never be trained
        if hasattr(flow, "field_of_first_input"):  # no other thread has made one
            blocks = make_blocks(field_for(x))
            for module in (module for block in blocks for module in block.modules()):
                if materialize := getattr(module, "materialize", None):  # what a scheme learns besides
                    materialize(x)
            flow.field_of_first_input.become([field for block in blocks for field in block.fields])
            flow.replace_blocks(blocks)
            flow.train(flow.training)
            del flow.field_of_first_input


def refuse_state(flow: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a state is loaded: one of blocks is none of a flow that has no field yet.

    Raises:
        RuntimeError: it is, and would not be loaded.
    """
    if not len(flow.blocks) and any(key.startswith(f"{prefix}blocks.") for key in state_dict):
        name = prefix.removesuffix(".").replace("_flows", "flows")
        raise RuntimeError(
            f"the flow {name!r} has no field yet: call the network once on a batch before "
            "load_state_dict, or save and load with odenets.save_weights and odenets.load_weights, which make it"
        )
