"""Feature maps: the states of a network after its encoder and after each run of blocks of one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odenets.detection.features.base import check_data, check_images, in_batches
from odenets.detection.isolation import to_network
from odenets.inputs import is_by_keyword, kind_of
from odenets.recording import is_recorder

__all__ = [
    "check_positional", "check_training", "feature_map_values", "feature_maps_of", "pooled", "training_labels",
]  # fmt: skip


def feature_maps_of(network: nn.Module, x: Tensor, count: int | None = None) -> list[Tensor]:
    """The state after the encoder and the state after each run of consecutive blocks whose states have one shape.

    These are ``x0`` of the first step, then ``x1`` of each step whose follower has a state of another shape, and of the
    last step.

    Args:
        network: whose steps are taken.
        x: inputs, ``(B, ...)``; they are taken to its device and precision.
        count: how many feature maps are wanted, all if None; a network that takes its steps one by one takes no more
            than they need.

    Returns:
        Feature maps, each ``(B, *S)``, first to last: one more than there are runs, or the first ``count``.

    Raises:
        TypeError: inputs by keyword.
        ValueError: the network has no steps.

    >>> import odenets
    >>> network = odenets.models.resnet110(blocks=2)
    >>> [tuple(state.shape) for state in feature_maps_of(network, torch.rand(5, 3, 8, 8))]
    [(5, 16, 8, 8), (5, 16, 8, 8), (5, 32, 4, 4), (5, 64, 2, 2)]
    """
    if not is_recorder(network):
        raise ValueError(f"network must have steps, got {type(network).__name__}: pass odenets.adapt(network)")
    check_positional(x)
    maps: list[Tensor] = []
    for step in network.steps(to_network(network, x), closing=False):
        if not maps:
            maps += [step.x0, step.x1]
        elif step.x1.shape == maps[-1].shape:
            maps[-1] = step.x1
        else:
            maps.append(step.x1)
        if count is not None and len(maps) > count:
            break
    return maps[:count]


def check_positional(x: Any) -> None:
    """That inputs are a tensor: feature maps of tokens would count those that a mask leaves out.

    Raises:
        TypeError: they come by keyword.
    """
    if is_by_keyword(x):
        raise TypeError(
            f"feature maps must be of a tensor x of inputs, got a {kind_of(x)}: Trajectory measures the steps of a "
            "network that takes its inputs by keyword, where masks count"
        )


def check_training(x: Any, *, normalized: bool = False) -> None:
    """That ``x`` is a tensor of training inputs; where it is one of images ``(N, C, H, W)``, as :func:`check_images`.

    Raises:
        TypeError, ValueError: it is not; or inputs by keyword.
    """
    check_positional(x)
    if not isinstance(x, Tensor) or x.ndim == 4:
        check_images(x, "x", normalized=normalized)
    check_data(x, "x")
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")


def training_labels(x: Tensor, y: Any, fewest: int = 1) -> np.ndarray:
    """Labels ``y`` of training inputs ``x``, ``(N,)`` int64, if every class has so many.

    Raises:
        TypeError: no tensor.
        ValueError: not one whole number 0, 1, ... for each input, or a class with fewer.

    >>> training_labels(torch.rand(3, 2), torch.tensor([1, 0, 3]))
    Traceback (most recent call last):
        ...
    ValueError: y must hold every class from 0 to 3, got no image of [2]
    """
    if not isinstance(y, Tensor):
        remedy = "" if y is None else ": torch.as_tensor(y)"
        raise TypeError(f"y must be a tensor of integer labels (N,), got {type(y).__name__}{remedy}")
    if len(x) == 0 or y.shape != (len(x),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = f"{y.dtype} of shape {tuple(y.shape)}"
        raise ValueError(f"y must hold one integer label for each of {len(x)} images, got {got}")
    labels = y.cpu().long().numpy()
    if labels.min() < 0:
        raise ValueError(f"y must hold labels 0, 1, ..., got {labels.min()}")
    if len(few := np.flatnonzero(np.bincount(labels) < fewest)):
        every, none = ("every class", "no image") if fewest == 1 else (f"{fewest} images of every class", "fewer")
        some = ", ".join(map(str, few[:5])) + (", ..." if len(few) > 5 else "")
        raise ValueError(f"y must hold {every} from 0 to {labels.max()}, got {none} of [{some}]")
    return labels


def pooled(state: Tensor) -> Tensor:
    """Means of the channels over all positions, ``(B, C)`` float32 or wider.

    Of images ``(B, C, H, W)``, or with any other number of dimensions behind the channels, the mean over these; of
    tokens ``(B, T, C)`` the mean over the tokens; vectors ``(B, C)`` stay as they are. A state of four dimensions is
    taken for images: the rows of tokens ``(B, H, W, C)``, as Swin has them, count as its channels.
    """
    if state.ndim < 2:
        raise ValueError(f"state must be a batch (B, C, ...), got shape {tuple(state.shape)}")
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    if state.ndim == 3:
        return state.mean(1)
    return state if state.ndim == 2 else state.flatten(2).mean(2)


def feature_map_values(network: nn.Module, x: Tensor, values: Callable[[Tensor], Tensor] = pooled) -> list[Tensor]:
    """Values ``(B, *S) -> (B, F)`` of all inputs at each of :func:`feature_maps_of`, ``(N, F)`` on the CPU.

    They are taken a batch at a time and in eval mode; the network's mode is restored.
    """
    sizes: list[int] = []

    def joined(part: Tensor) -> Tensor:
        parts = [values(state) for state in feature_maps_of(network, part)]
        sizes[:] = [each.shape[1] for each in parts]
        return torch.cat(parts, 1)

    return list(in_batches(joined, network, x).split(sizes, 1))
