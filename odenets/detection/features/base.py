"""Features of inputs: what all kinds share, and how they are read off many images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from odenets.detection.isolation import keeping_random_states, to_network
from odenets.inputs import call, is_by_keyword, plain, rows, samples_in, tensors_in
from odenets.modes import device_of, evaluating

__all__ = ["Features", "check_data", "check_images", "check_inputs", "in_batches", "telling_of"]


class Features:
    """Numbers read off images, or off the path that images take through a network; a base class for kinds of one's own.

    A kind defines ``__call__``, and :meth:`fit` if it needs statistics of training images.

    >>> class Brightness(Features):
    ...     def __call__(self, network, x):
    ...         return x.mean((2, 3))
    >>> Brightness()(nn.Identity(), torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 3])
    """

    def fit(self, network: nn.Module, x: Tensor, y: Tensor) -> Self:
        """Take the statistics that it needs of training images ``x`` ``(N, C, H, W)`` of a ``network``.

        With their labels ``y``, ``(N,)``; this base class needs none.
        """
        return self

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Features of a batch; what a kind defines.

        Args:
            network: whose steps may be read.
            x: images ``(B, C, H, W)``, pixels in [0, 1]; or a mapping of what the network takes by keyword, where the
                kind reads the path alone, as :class:`~odenets.detection.Trajectory` does.

        Returns:
            ``(B, F)``, float32 or wider; gradients pass where the features are differentiable.

        Raises:
            NotImplementedError: the kind does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(network, x), features of a batch (B, F)")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "look"):
            raise TypeError(f"{cls.__name__}.look is never called: its name is output_and_features")

    def output_and_features(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of a ``network`` and the features of a batch ``x``, in one pass where that is possible."""
        return call(network, to_network(network, x)), self(network, x)


@torch.no_grad()
def in_batches(
    call: Callable[[Any], Tensor], network: nn.Module, x: Tensor | Mapping[str, Any], batch_size: int = 256
) -> Tensor:
    """What a function gives for many inputs, a batch at a time, in eval mode and without gradients.

    The network's modes are restored, and so are the random states, from which it may draw.

    Args:
        call: of a batch ``(B, ...)`` on the network's device, a tensor with a row for each.
        network: whose modes and device they are.
        x: inputs, ``(N, ...)``, or a mapping with such, of which what has no row for each is in every batch.
        batch_size: inputs at a time.

    Returns:
        The rows of all, ``(N, ...)``, on the CPU.

    Raises:
        ValueError: no inputs, or batch_size below 1.

    >>> network = nn.Linear(3, 2)
    >>> in_batches(network, network, torch.rand(1000, 3), 100).shape
    torch.Size([1000, 2])
    """
    n = samples_in(x, "a network")
    if n == 0 or batch_size < 1:
        raise ValueError(f"x must hold inputs and batch_size be at least 1, got {n} and {batch_size}")
    inputs, device = plain(x), device_of(network, tensors_in(x)[0].device)

    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    with telling_of(x), evaluating(network), keeping_random_states(device):
        parts = (rows(inputs, slice(i, i + batch_size), n) for i in range(0, n, batch_size))
        return torch.cat([call(tree_map(moved, part)).cpu() for part in parts])


def check_inputs(x: Any, name: str = "images", *, normalized: bool = False) -> Any:
    """Images as :func:`check_images` has them, or a mapping of inputs by keyword, which are finite; as dictionary.

    Raises:
        TypeError, ValueError: as there; or a mapping without samples, or with numbers that are not finite.
    """
    if not is_by_keyword(x):
        return check_images(x, name, normalized=normalized)
    if samples_in(x, name) == 0:
        raise ValueError(f"{name} must not be empty, got no sample")
    for key, value in x.items():
        if isinstance(value, Tensor):
            check_data(value, f"{name} of {key!r}")
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in {key!r}")
    return plain(x)


def check_images(x: Tensor, name: str = "images", *, normalized: bool = False) -> Tensor:
    """The images ``x``, if they are ``(N, C, H, W)`` with pixels in [0, 1]; errors call them by ``name``.

    Where they come ``normalized``, all finite values will do.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, none, or pixels that are not finite or outside [0, 1].

    >>> check_images(torch.rand(8, 8))
    Traceback (most recent call last):
        ...
    ValueError: images must be a batch (N, C, H, W), not empty, got shape (8, 8)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        rule = f"{name} must be a floating tensor (N, C, H, W) of pixels in [0, 1], got"
        raise TypeError(f"{rule} {kind}{_to_images(x)}")
    check_data(x, name)
    if x.ndim != 4 or x.numel() == 0:
        remedy = ": x[None] is a batch of one, and a DataLoader makes batches" if x.ndim == 3 else ""
        raise ValueError(f"{name} must be a batch (N, C, H, W), not empty, got shape {tuple(x.shape)}{remedy}")
    low, high = (end.item() for end in x.aminmax())  # both NaN where one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if normalized:
        return x
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must have pixels in [0, 1], got [{low:.7g}, {high:.7g}]: normalize inside the network "
            "(models.Normalize), and divide what is in [0, 255] by 255"
        )
    return x


def check_data(x: Tensor, name: str) -> None:
    """That a tensor ``x`` has its numbers, each of them; errors call it by ``name``.

    Raises:
        TypeError: it is on the meta device, or sparse.

    >>> check_data(torch.empty(2, device="meta"), "images")
    Traceback (most recent call last):
        ...
    TypeError: images must hold numbers, got a tensor on the meta device, which has none
    """
    if x.is_meta:
        raise TypeError(f"{name} must hold numbers, got a tensor on the meta device, which has none")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a tensor of {x.layout}: x.to_dense()")


def _to_images(x: Any) -> str:
    """How images are made of what is no floating tensor, for errors."""
    if isinstance(x, Tensor):
        return ": divide bytes by 255" if x.dtype == torch.uint8 else ""
    if isinstance(x, np.ndarray):
        return ": torch.from_numpy(x), channels first, bytes divided by 255"
    if isinstance(getattr(x, "images", None), Tensor):
        return ": pass its images"
    if isinstance(x, Iterable) and not isinstance(x, str):
        return ": one tensor of all, torch.stack of images and torch.cat of batches (a Monitor takes a DataLoader)"
    return ""


@contextmanager
def telling_of(x: Any) -> Iterator[None]:
    """Around a network's look at images ``x``: its error gets a note if their channels seem to come last.

    >>> with telling_of(torch.rand(2, 8, 8, 3)):
    ...     raise RuntimeError("sizes must match")
    Traceback (most recent call last):
        ...
    RuntimeError: sizes must match
    images of shape (2, 8, 8, 3), are their channels last? x.permute(0, 3, 1, 2)
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
            error.add_note(f"images of shape {tuple(x.shape)}, are their channels last? x.permute(0, 3, 1, 2)")
        raise
