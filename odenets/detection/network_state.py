"""The network of a detector: whether it is as it was when that was fitted, and what of it a detector can watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from odenets.checkpoints import fingerprint
from odenets.detection.isolation import check_weights, seeded
from odenets.neural_ode import NeuralODE

__all__ = ["NetworkState", "check_apart", "check_blocks", "check_company", "check_repeatable", "treats_apart"]


class NetworkState:
    """A network as it was, told by its fingerprint, which is taken where cheaper signs say that something moved.

    These are its tensors, torch's counts of the writes into them and what its modules print: a few hundredths of
    a forward pass of one image. Writes that torch does not count, into ``weight.data``, move the fingerprint alone.

    Attributes:
        fingerprint: as it was; None where it has none.

    Args:
        network: as it is to be.
    """

    def __init__(self, network: nn.Module) -> None:
        self._signs = _signs(network)
        self.fingerprint = _fingerprint(network)

    def is_that_of(self, network: nn.Module, *, exactly: bool = False) -> bool:
        """Whether the ``network`` is as it was; ``exactly`` takes the fingerprint whatever the signs say."""
        signs = _signs(network)
        if not exactly and _same(signs, self._signs):
            return True
        if self.fingerprint is None or _fingerprint(network) != self.fingerprint:
            return False
        self._signs = signs
        return True


def _fingerprint(network: nn.Module) -> str | None:
    """None where it has none, for a part of it that nothing tells: then the signs say all that is known."""
    try:
        return fingerprint(network)
    except TypeError:
        return None


def _signs(network: nn.Module) -> tuple[list[Any], list[Any]]:
    """Tensors, and where they lie and how often torch counted a write into each, with what modules print."""
    tensors = [*network.parameters(), *network.buffers()]
    signs: list[Any] = [(type(module), module.extra_repr()) for module in network.modules()]
    for tensor in tensors:
        try:
            signs.append((tensor.data_ptr(), tensor._version))
        except RuntimeError:  # where torch counts none: an object that equals no other
            signs.append(object())
    return tensors, signs


def _same(one: tuple[list[Any], list[Any]], other: tuple[list[Any], list[Any]]) -> bool:
    (tensors, signs), (others, theirs) = one, other
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True)) and signs == theirs


def check_apart(network: nn.Module) -> None:
    """Refuse a network whose features of an image depend on the other images of its batch, as far as that can be told.

    Raises:
        ValueError: it holds a batch norm without running statistics, or a neural ODE that chooses its steps by a batch;
            or weights on the meta device.
    """
    check_weights(network)
    if (mixing := _mixing(network)) is not None:
        raise ValueError(f"network must treat each image apart to be watched by a detector, but {mixing}")


def treats_apart(network: nn.Module) -> bool:
    """Whether a ``network`` treats each image apart, as far as :func:`check_apart` can tell.

    >>> treats_apart(nn.BatchNorm2d(3)), treats_apart(nn.BatchNorm2d(3, track_running_stats=False))
    (True, False)
    """
    return _mixing(network) is None


def _mixing(network: nn.Module) -> str | None:
    """What in a network depends on the images that come together, and the remedy; None if nothing does."""
    for name, module in network.named_modules():
        where = f"{name or 'network'!r} is a {type(module).__name__}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return (
                f"{where} without running statistics, which normalizes by the images that come together: "
                "track_running_stats=True, or group norm"
            )
        if isinstance(module, NeuralODE) and module.fixed_steps is None:
            keeps_steps = module.gradient == "direct" and module.event is None
            if module.control == "batch" or keeps_steps:
                return f"{where} that takes as many steps as the images that come together need: steps=n"
    return None


def check_blocks(depth: int) -> None:
    """That a network has several blocks: of one, a trajectory is no path.

    Raises:
        ValueError: it has one.
    """
    if depth < 2:
        raise ValueError(
            f"network must have at least two blocks for the features of its trajectory, got {depth}: give other "
            "features, such as FourierSpectrum()"
        )


def check_repeatable(features: Callable[[], np.ndarray], device: torch.device) -> np.ndarray:
    """That two passes of the same images, with other seeds on a ``device``, have the same ``features``.

    Returns:
        These.

    Raises:
        ValueError: they have others.
    """
    passes = []
    for seed in range(2):
        with seeded(seed, device=device):
            passes.append(features())
    if not np.allclose(*passes, rtol=1e-3, atol=1e-6 * np.abs(passes[0]).max()):
        raise ValueError(
            "network must take the same path in every pass, and the features of two passes in eval mode differ: "
            "random draws of its own, such as those of a noisy scheme, make no statistics of clean images"
        )
    return passes[0]


def check_company(alone: np.ndarray, features: np.ndarray, dtype: torch.dtype) -> None:
    """That the features of images are the same ``alone``, ``(n, F)``, and as the first of more, ``(N, F)``.

    A network of a narrow ``dtype``, which may round otherwise in another batch, is not checked.

    Raises:
        ValueError: they are not: a tenth of the spread over the images, or more, lies between them.
    """
    if torch.finfo(dtype).bits < 32:
        return
    apart = np.abs(alone - features[: len(alone)])
    if (apart > 0.1 * features.std(0) + 1e-3 * np.abs(features).max(0)).any():
        raise ValueError(
            "network must treat each image apart to be watched by a detector, and the features of the first images are "
            "others without those that come with them: take out what reads the whole batch"
        )
