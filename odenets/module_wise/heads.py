"""Auxiliary heads: a small network on the state after a module, on its device and in its dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from odenets.modes import device_of, dtype_of, evaluating, keeping_state
from odenets.outputs import logits_in

__all__ = ["Head", "check_head", "conv_head", "like", "linear_head", "make_head", "modules_of", "token_head"]

L = TypeVar("L", bound=nn.Module)

Head = Callable[[Tensor, int], nn.Module]
"""Makes the head for a state ``(B, *S)`` and a number of outputs: classes, or dimensions of a target."""


def conv_head(state: Tensor, outputs: int, *, pool: int | None = None) -> nn.Sequential:
    """conv3x3-ReLU-pool-norm-linear, as many channels as the state has (DGL, Belilovsky et al. 2020; [K24]).

    Args:
        state: ``(B, C, H, W)``.
        outputs: numbers for a sample: classes, or dimensions of a target.
        pool: size and stride of the average pooling, in pixels; what leaves at most 4 x 4 if not given.

    Returns:
        The head, ``(B, C, H, W)`` to ``(B, outputs)``, on the device and in the dtype of the state.

    Raises:
        ValueError: a state of another shape, or a pooling larger than it.

    >>> state = torch.rand(2, 16, 8, 8)
    >>> conv_head(state, 10)(state).shape
    torch.Size([2, 10])
    """
    if state.ndim != 4:
        raise ValueError(f"head 'conv' needs states (B, C, H, W), got {tuple(state.shape)}")
    channels, height, width = state.shape[1:]
    pool = pool or max(1, -(-max(height, width) // 4))
    if pool > min(height, width):
        raise ValueError(f"pool must be at most {min(height, width)} for states {tuple(state.shape)}, got {pool}")
    head = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(pool),
        nn.BatchNorm2d(channels),
        Rearrange("b c h w -> b (c h w)"),
        nn.Linear(channels * (height // pool) * (width // pool), outputs),
    )
    return like(head, state)


def token_head(state: Tensor, outputs: int) -> nn.Sequential:
    """LayerNorm-mean-linear, as at the end of a transformer.

    Args:
        state: ``(B, T, D)`` or ``(B, H, W, D)``.
        outputs: numbers for a sample: classes, or dimensions of a target.

    Returns:
        The head, of such states to ``(B, outputs)``, on the device and in the dtype of the state.

    Raises:
        ValueError: a state of another shape.

    >>> state = torch.rand(2, 50, 64)
    >>> token_head(state, 10)(state).shape
    torch.Size([2, 10])
    """
    if state.ndim not in (3, 4):
        raise ValueError(f"head 'token' needs states (B, T, D) or (B, H, W, D), got {tuple(state.shape)}")
    features = state.shape[-1]
    mean = Reduce("b t d -> b d" if state.ndim == 3 else "b h w d -> b d", "mean")
    return like(nn.Sequential(nn.LayerNorm(features), mean, nn.Linear(features, outputs)), state)


def linear_head(state: Tensor, outputs: int) -> nn.Sequential:
    """A linear layer from all features of a ``state`` ``(B, *S)`` to ``outputs`` numbers, ``(B, outputs)``.

    >>> state = torch.rand(2, 3, 4)
    >>> linear_head(state, 10)(state).shape
    torch.Size([2, 10])
    """
    return like(nn.Sequential(nn.Flatten(), nn.Linear(state[0].numel(), outputs)), state)


def like(layer: L, state: Tensor) -> L:
    """A layer on the device and, unless it has no weights, in the dtype of a state."""
    device, dtype = device_of(layer, state.device), dtype_of(layer, state.dtype)
    return layer if (device, dtype) == (state.device, state.dtype) else layer.to(state.device, state.dtype)


HEADS: dict[str, Head] = {"conv": conv_head, "token": token_head, "linear": linear_head}
AUTO: dict[int, Head] = {4: conv_head, 3: token_head}
"""By the dimensions of a state. Those of a Swin transformer, ``(B, H, W, D)``, look like images': say "token"."""


def make_head(head: str | Head | nn.Module | Sequence[nn.Module], k: int, state: Tensor, outputs: int) -> nn.Module:
    """The head of module k, from what :func:`~odenets.module_wise.split_into_modules` takes.

    Raises:
        ValueError: an unknown name, or a state that does not fit.
    """
    if isinstance(head, nn.Module):
        return head
    if isinstance(head, Sequence) and not isinstance(head, str):
        return head[k]
    if callable(head):
        return like(head(state, outputs), state)
    if head == "auto":
        return AUTO.get(state.ndim, linear_head)(state, outputs)
    if head not in HEADS:
        raise ValueError(f"head must be 'auto', {', '.join(map(repr, HEADS))}, a module or a function, got {head!r}")
    return HEADS[head](state, outputs)


def modules_of(head: object) -> Iterator[nn.Module]:
    """The modules of heads that come as such."""
    if isinstance(head, nn.Module):
        yield from head.modules()
    elif isinstance(head, Sequence) and not isinstance(head, str):
        for one in head:
            yield from modules_of(one)


def check_head(head: nn.Module, state: Tensor, outputs: int, k: int, args: tuple[Any, ...] = ()) -> None:
    """That the head of module k returns ``(B, outputs)``, of the state and ``args`` if it takes such.

    Raises:
        TypeError: it returns no tensor.
        ValueError: another shape, or states that it cannot take.
    """
    try:
        with torch.no_grad(), keeping_state(head), evaluating(head):
            output = logits_in(head(state, *args))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the head of module {k + 1} does not fit states {tuple(state.shape)} of {state.dtype}: {error}"
        ) from error
    expected = (len(state), outputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"the head of module {k + 1} must return a tensor {expected}, got {type(output).__name__}")
    if output.shape != expected:
        raise ValueError(
            f"the head of module {k + 1} must return {expected} for states {tuple(state.shape)}, got "
            f"{tuple(output.shape)}"
        )
