"""Auxiliary heads: a small classifier on the state after a module, on its device and in its dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from odenets.modes import device_of, dtype_of

__all__ = ["HEADS", "Head", "conv_head", "head_for", "like", "linear_head", "token_head"]

L = TypeVar("L", bound=nn.Module)

Head = Callable[[Tensor, int], nn.Module]
"""Makes the head for a state ``(B, *S)`` and a number of classes."""


def conv_head(state: Tensor, classes: int, *, pool: int | None = None) -> nn.Sequential:
    """conv3x3-ReLU-pool-norm-linear, as many channels as the state has (DGL, Belilovsky et al. 2020; the thesis).

    Args:
        state: ``(B, C, H, W)``.
        classes: number of classes.
        pool: size and stride of the average pooling; what leaves at most 4 x 4 if not given.

    Raises:
        ValueError: a state of another shape, or a pooling larger than it.
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
        nn.Linear(channels * (height // pool) * (width // pool), classes),
    )
    return like(head, state)


def token_head(state: Tensor, classes: int) -> nn.Sequential:
    """LayerNorm-mean-linear, as at the end of a transformer.

    Args:
        state: ``(B, T, D)`` or ``(B, H, W, D)``.
        classes: number of classes.

    Raises:
        ValueError: a state of another shape.
    """
    if state.ndim not in (3, 4):
        raise ValueError(f"head 'token' needs states (B, T, D) or (B, H, W, D), got {tuple(state.shape)}")
    features = state.shape[-1]
    mean = Reduce("b t d -> b d" if state.ndim == 3 else "b h w d -> b d", "mean")
    return like(nn.Sequential(nn.LayerNorm(features), mean, nn.Linear(features, classes)), state)


def linear_head(state: Tensor, classes: int) -> nn.Sequential:
    """A linear layer on all features of a state ``(B, *S)``."""
    return like(nn.Sequential(nn.Flatten(), nn.Linear(state[0].numel(), classes)), state)


def like(layer: L, state: Tensor) -> L:
    """A layer on the device and, unless it has no weights, in the dtype of a state."""
    device, dtype = device_of(layer, state.device), dtype_of(layer, state.dtype)
    return layer if (device, dtype) == (state.device, state.dtype) else layer.to(state.device, state.dtype)


HEADS: dict[str, Head] = {"conv": conv_head, "token": token_head, "linear": linear_head}


def head_for(state: Tensor, classes: int) -> nn.Module:
    """The head that fits the shape: convolutional for ``(B, C, H, W)``, of tokens for ``(B, T, D)``, or linear.

    States ``(B, H, W, D)`` of a Swin transformer cannot be told from images: say "token".
    """
    kind = {4: conv_head, 3: token_head}.get(state.ndim, linear_head)
    return kind(state, classes)
