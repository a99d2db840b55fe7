"""Sharded networks: parameters of which each process holds a part (FSDP2), whole in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["is_sharded", "load_network", "sharded_like", "whole"]


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds a part of the parameters."""
    return any(map(_is_part, network.parameters()))


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
