"""Data as plain tensors, its parts, and batches of it, without worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from odenets.modes import inputs_for

__all__ = ["Batches", "Split", "TensorData", "data_for"]


@dataclass(frozen=True)
class TensorData:
    """Inputs and labels.

    Attributes:
        name: what it is.
        x: inputs, ``(N, C, H, W)`` in [0, 1] or points ``(N, D)``, float32, finite.
        y: labels, ``(N,)`` int64 in ``[0, classes)``.
        classes: number of classes.
        mean, std: per channel, for normalization inside the model.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 0:
            raise ValueError(f"{self.name}: x and y must be of one length, not 0, got {len(self.x)} and {len(self.y)}")
        if not self.x.is_floating_point() or self.y.dtype != torch.long:
            raise TypeError(f"{self.name}: x must be floating and y int64, got {self.x.dtype} and {self.y.dtype}")
        if not self.x.isfinite().all():
            raise ValueError(f"{self.name}: x must be finite, got NaN or infinity")
        if self.y.ndim != 1:
            raise ValueError(f"{self.name}: y must have shape (N,), got {tuple(self.y.shape)}")
        if int(self.y.min()) < 0 or int(self.y.max()) >= self.classes:
            raise ValueError(f"{self.name}: y must lie in [0, {self.classes})")

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, index: Tensor) -> TensorData:
        """The samples at ``index``."""
        return TensorData(self.name, self.x[index], self.y[index], self.classes, self.mean, self.std)

    def to(self, device: torch.device | str) -> TensorData:
        """The same on a device."""
        return TensorData(self.name, self.x.to(device), self.y.to(device), self.classes, self.mean, self.std)


@dataclass(frozen=True)
class Split:
    """Disjoint training, validation and test parts."""

    train: TensorData
    validation: TensorData
    test: TensorData


@dataclass(frozen=True)
class Batches:
    """Batches of a data set; shuffled by ``(seed, epoch)`` alone, so that any epoch can be drawn again.

    A loop over them draws the next epoch, each time another, beginning with epoch 0; without a seed all epochs are the
    same. :meth:`epoch`, :meth:`in_order` and :meth:`inputs` draw what they say and do not count.

    >>> from odenets.training.datasets import load
    >>> train, _ = load("moons")
    >>> shuffled, again = Batches(train, 100, seed=1), Batches(train, 100, seed=1)
    >>> first, second = list(shuffled), list(shuffled)
    >>> torch.equal(first[0][0], second[0][0]), torch.equal(second[0][0], next(again.epoch(1))[0])
    (False, True)

    Attributes:
        data: the samples.
        size: samples per batch; the last one may be smaller.
        seed: None keeps the order.
        crop: pad by this many pixels and crop at random (training images); drawn by the seed.
        flip: mirror half of the images (not digits); drawn by the seed.

    Raises:
        ValueError: no samples in a batch, what is to be drawn at random without a seed, or crop or flip for samples
            that are no images ``(C, H, W)``.
    """

    data: TensorData
    size: int
    seed: int | None = None
    crop: int = 0
    flip: bool = False
    _drawn: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.crop < 0 or ((self.crop or self.flip) and self.seed is None):
            raise ValueError(
                f"crop and flip must be drawn by a seed, and crop not be negative, got crop={self.crop}, "
                f"flip={self.flip}, seed={self.seed}"
            )
        if (self.crop or self.flip) and self.data.x.ndim != 4:
            raise ValueError(f"crop and flip are for images (N, C, H, W), got data of shape {tuple(self.data.x.shape)}")

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    @property
    def augmented(self) -> bool:
        """Whether epochs hold other inputs than the data: cropped, mirrored, or what a subclass' ``epoch`` draws."""
        return bool(self.crop or self.flip) or type(self).epoch is not Batches.epoch

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch."""
        return len(self.data) % self.size or min(self.size, len(self.data))

    def order(self, epoch: int) -> Tensor:
        """The samples in the order of an epoch, ``(N,)``."""
        return self._draw(epoch)[0]

    def _draw(self, epoch: int) -> tuple[Tensor, torch.Generator | None]:
        if self.seed is None:
            return torch.arange(len(self.data)), None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data), generator=generator), generator

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``(x, y)`` of an epoch."""
        order, generator = self._draw(epoch)
        for index in order.to(self.data.x.device).split(self.size):
            x = self.data.x[index]
            if generator is not None and (self.crop or self.flip):
                x = _augment(x, self.crop, self.flip, generator)
            yield x, self.data.y[index]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``(x, y)`` in the order of the data, without augmentation."""
        yield from zip(self.data.x.split(self.size), self.data.y.split(self.size), strict=True)

    def with_data(self, data: TensorData) -> Self:
        """The same batches, of a subclass too, of other data."""
        other = copy.copy(self)
        object.__setattr__(other, "data", data)
        return other

    def inputs(self) -> Iterator[Tensor]:
        """The inputs in order, without augmentation."""
        yield from self.data.x.split(self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the next epoch."""
        epoch = self._drawn
        object.__setattr__(self, "_drawn", epoch + 1)
        return self.epoch(epoch)


def _augment(x: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    n, _, height, width = x.shape
    if crop:
        padded = torch.nn.functional.pad(x, (crop,) * 4)
        top, left = torch.randint(0, 2 * crop + 1, (2, n, 1), generator=generator).to(x.device)
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.arange(width, device=x.device)
        samples = torch.arange(n, device=x.device)[:, None, None]
        x = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(n, generator=generator).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x.contiguous()


def data_for(network: nn.Module, data: TensorData) -> TensorData:
    """A data set on the device of a network, inputs in its dtype."""
    x = inputs_for(network, data.x)
    return replace(data, x=x, y=data.y.to(x.device))
