"""Forward hooks that a network brings along: they sleep while it is compressed, if they change no output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from odenets.depth.compression.divergence import checked_run, run, tensor_in

__all__ = ["put_to_sleep", "wake_up"]

Hook = Callable[..., Any]


class _Sleeping:
    """Stands for a hook, and does nothing."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __call__(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@torch.no_grad()
def put_to_sleep(model: nn.Module, inputs: Any) -> None:
    """Let the forward hooks of a ``model`` sleep, if it returns the same for some ``inputs`` without them.

    Those that change an output, or what it is computed with, as older norms of weights do, belong to the model.

    >>> model, seen = nn.Sequential(nn.Linear(2, 2)), []
    >>> _ = model[0].register_forward_hook(lambda *_: seen.append(1))
    >>> put_to_sleep(model, torch.zeros(1, 2))
    >>> _ = model(torch.zeros(1, 2)), wake_up(model), model(torch.zeros(1, 2))
    >>> len(seen)  # before it was decided, and awake again
    2
    """
    if not any(hooks for hooks in _hooks_of(model)):
        return
    output = tensor_in(checked_run(model, inputs, "calibration"))
    for hooks in _hooks_of(model):
        for key, hook in hooks.items():
            hooks[key] = _Sleeping(hook)
    try:
        same = torch.equal(tensor_in(run(model, inputs)), output)
    except Exception:  # of a model that needs what they do
        same = False
    if not same:
        wake_up(model)


def wake_up(model: nn.Module) -> None:
    """Put the hooks that sleep in their places again; it may be a copy of the ``model``, or have lost modules."""
    for hooks in _hooks_of(model):
        for key, hook in hooks.items():
            if isinstance(hook, _Sleeping):
                hooks[key] = hook.hook


def _hooks_of(model: nn.Module) -> Iterator[MutableMapping[int, Hook]]:
    for module in model.modules():
        yield module._forward_pre_hooks
        yield module._forward_hooks
