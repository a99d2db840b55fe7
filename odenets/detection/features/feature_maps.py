"""The states of a network after its encoder and after each of its stages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odenets.adapting.adapted import AdaptedModel
from odenets.detection.features.trajectory import Recording, in_batches
from odenets.detection.isolation import to_network

__all__ = ["pooled", "stage_states", "stage_values"]


def stage_states(network: Recording, x: Tensor, count: int | None = None) -> list[Tensor]:
    """The state after the encoder and the state after each stage, first to last.

    A stage is a run of consecutive blocks whose states have one shape. The states are ``x0`` of the first step, then
    ``x1`` of each step whose follower has a state of another shape, and of the last step.

    Args:
        network: whose steps are taken.
        x: inputs, ``(B, ...)``; they are taken to its device and precision.
        count: how many states are wanted, all if None; a network that takes its steps one by one takes no more than it
            needs to know them.

    Returns:
        ``stages + 1`` states, each ``(B, *S)``, or the first ``count``.

    Raises:
        ValueError: the network has no steps.

    >>> import odenets
    >>> network = odenets.models.resnet110(blocks=2)
    >>> [tuple(state.shape) for state in stage_states(network, torch.rand(5, 3, 8, 8))]
    [(5, 16, 8, 8), (5, 16, 8, 8), (5, 32, 4, 4), (5, 64, 2, 2)]
    """
    if not hasattr(network, "steps"):
        raise ValueError(f"network must have steps, got {type(network).__name__}: pass odenets.adapt(network)")
    states: list[Tensor] = []
    shape = None
    x = to_network(network, x)
    for step in network.steps(x) if isinstance(network, AdaptedModel) else network.steps(x, closing=False):
        if shape is None:
            states += [step.x0, step.x1]
        elif step.x1.shape == shape:
            states[-1] = step.x1
        else:
            states.append(step.x1)
        shape = step.x1.shape
        if count is not None and len(states) > count:
            break
    return states[:count]


def pooled(state: Tensor) -> Tensor:
    """Means of the channels over all positions, ``(B, C)``.

    Of images ``(B, C, H, W)``, or with any other number of dimensions behind the channels, the mean over these; of
    tokens ``(B, T, C)`` the mean over the tokens; vectors ``(B, C)`` stay as they are. A state of four dimensions is
    taken for images: the rows of tokens ``(B, H, W, C)``, as Swin has them, count as its channels.

    Args:
        state: states of a batch; the means are float32 or wider.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if state.ndim < 2:
        raise ValueError(f"state must be a batch (B, C, ...), got shape {tuple(state.shape)}")
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    if state.ndim == 3:
        return state.mean(1)
    return state if state.ndim == 2 else state.flatten(2).mean(2)


def stage_values(network: Recording, x: Tensor, values: Callable[[Tensor], Tensor] = pooled) -> list[Tensor]:
    """Values of all inputs at :func:`stage_states`, a batch at a time and in eval mode.

    Args:
        network: whose states are read; its mode is restored.
        x: inputs, ``(N, ...)``.
        values: function of a state ``(B, *S) -> (B, F)``.

    Returns:
        For each state ``(N, F)``, on the CPU.
    """
    sizes: list[int] = []

    def joined(part: Tensor) -> Tensor:
        found = [values(state) for state in stage_states(network, part)]
        sizes[:] = [each.shape[1] for each in found]
        return torch.cat(found, 1)

    return list(in_batches(joined, network, x).split(sizes, 1))
