"""A network while it is looked at: its modes, changed for a while and restored; its device and its dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["device_of", "dtype_of", "evaluating", "keeping_modes"]


@contextmanager
def keeping_modes(*networks: nn.Module) -> Iterator[None]:
    """Restore the mode of every module on leaving, also after an exception.

    Each module has its own mode back, so that a part frozen in eval mode stays frozen. A module that was made meanwhile
    (by a flow from its first input) gets the mode of the module that holds it.
    """
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for network in networks:
            _restore(network, modes, network.training)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Eval mode for a while: :func:`keeping_modes` around ``network.eval()``.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    >>> with evaluating(network):
    ...     network[0].training
    False
    >>> network[0].training, network[1].training
    (True, False)
    """
    with keeping_modes(*networks):
        for network in networks:
            network.eval()
        yield


def _restore(module: nn.Module, modes: dict[nn.Module, bool], inherited: bool) -> None:
    module.training = modes.get(module, inherited)
    for child in module.children():
        _restore(child, modes, module.training)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    for tensor in (*network.parameters(), *network.buffers()):
        if not nn.parameter.is_lazy(tensor):
            yield tensor


def device_of(network: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """The device of the first parameter, or buffer; ``default`` if the network holds none yet."""
    return next((tensor.device for tensor in _tensors(network)), torch.device(default))


def dtype_of(network: nn.Module, default: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the first floating or complex parameter, or buffer; ``default``, or torch's own, without one."""
    found = (t.dtype for t in _tensors(network) if t.is_floating_point() or t.is_complex())
    return next(found, default or torch.get_default_dtype())
