"""Sharded networks: parameters of which each process holds a part (FSDP2), whole in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from odenets.recording import Records

__all__ = ["gather_for_record", "is_divided", "is_sharded", "load_network", "reshard", "sharded_like", "whole"]


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds a part of the parameters."""
    return any(map(_is_part, network.parameters()))


def is_divided(tensor: Tensor) -> bool:
    """Whether several processes hold a part of it each."""
    part: Any = tensor
    return _is_part(part) and part.device_mesh.size() > 1 and any(p.is_shard() for p in part.placements)


def reshard(module: nn.Module) -> None:
    """Leave to each process its part of the parameters: a forward pass without a backward one leaves the whole."""
    for part in filter(_is_unit, module.modules()):
        part.reshard()  # type: ignore[operator]  # a unit has it


def gather_for_record(network: nn.Module) -> None:
    """Let units that record be whole in their ``record`` too: FSDP2 gathers for ``forward`` only."""
    for part in filter(_is_unit, network.modules()):
        if callable(getattr(part, "record", None)) and "record" not in vars(part):
            _gather_for_record(part)


def _gather_for_record(unit: Any) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    record = unit.record

    def in_tensors(*args: Any, **measures: Any) -> tuple[Any, dict[str, Tensor], tuple[Any, ...]]:
        # a plain dictionary, whose tensors FSDP2 finds: it gathers anew before the gradient of any comes
        output, records = record(*args, **measures)
        return output, dict(records), records.layout

    def gathered(*args: Any, **measures: Any) -> tuple[Any, Records]:
        output, values, layout = unit.record_in_tensors(*args, **measures)
        return output, Records(values, *layout)

    unit.record_in_tensors = in_tensors
    register_fsdp_forward_method(unit, "record_in_tensors")
    unit.record = gathered


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one, which all processes ask for together; another as it is."""
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[operator]  # a DTensor has it


def sharded_like(parameter: Tensor, value: Any) -> Any:
    """A process' part of a whole value of the shape of a sharded parameter; another value as it is."""
    if not (_is_part(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def load_network(network: nn.Module, state: Mapping[str, Any]) -> None:
    """``network.load_state_dict`` of whole tensors."""
    if is_sharded(network):
        here = network.state_dict()
        state = {name: sharded_like(here[name], value) if name in here else value for name, value in state.items()}
    network.load_state_dict(state)


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it; a wrapper hands on attributes, but not those of its class."""
    return hasattr(type(module), "reshard")
