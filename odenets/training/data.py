"""Data as plain tensors, its parts, and batches of it, without worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from odenets.errors import check_count
from odenets.modes import inputs_for
from odenets.printing import shown

__all__ = ["Batches", "Split", "TensorData", "data_for"]


@dataclass(frozen=True)
class TensorData:
    """Inputs and targets in memory, checked once; :class:`Batches` draws batches of them, without worker processes.

    >>> x = torch.rand(5, 2)
    >>> len(TensorData(x, torch.tensor([0, 1, 2, 1, 0]), classes=3)), len(TensorData(x, x.norm(dim=1)))
    (5, 5)
    >>> TensorData(x, x.norm(dim=1), name="norms")
    TensorData(x=float32 (5, 2), y=float32 (5,), name='norms', classes=None, mean=(), std=())

    Attributes:
        x: inputs ``(N, ...)``, floating, finite: images ``(N, C, H, W)`` in [0, 1], points ``(N, D)``.
        y: targets, a tensor ``(N, ...)`` of any dtype: labels ``(N,)`` int64, numbers ``(N,)`` or ``(N, D)``.
        name: what errors call it.
        classes: number of classes, of which ``y`` holds labels; None where that is not known, or there are none.
        mean: of each channel, for normalization inside the network (:class:`odenets.models.Normalize`); () if unknown.
        std: standard deviation of each channel, likewise.

    Raises:
        TypeError: inputs that are no floating tensor, targets that are none, or with ``classes`` labels that are not
            int64.
        ValueError: no samples, inputs and targets of different length, inputs that are not finite, or with ``classes``
            labels of another shape or outside ``[0, classes)``.
    """

    x: Tensor
    y: Tensor
    name: str = "data"
    classes: Any = None  # an int where there are classes, which those who read it rely on
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}: TensorData(x, y, name=...)")
        for key, value in (("x", self.x), ("y", self.y)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{self.name}: {key} must be a tensor, got {type(value).__name__}: TensorData(x, y), with "
                    "torch.as_tensor for arrays and lists"
                )
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) != len(self.y) or len(self.x) == 0:
            raise ValueError(
                f"{self.name}: x and y must be of one length, not 0, got {tuple(self.x.shape)} and "
                f"{tuple(self.y.shape)}"
            )
        if not self.x.is_floating_point():
            raise TypeError(
                f"{self.name}: x must be floating, got {self.x.dtype}: x.float(), or a DataLoader for a network that "
                "takes whole numbers"
            )
        if not self.x.isfinite().all():
            raise ValueError(f"{self.name}: x must be finite, got NaN or infinity")
        if self.classes is not None:
            self._check_labels(self.classes)

    __repr__ = shown

    def _check_labels(self, classes: int) -> None:
        if self.y.dtype != torch.long:
            raise TypeError(f"{self.name}: y must be int64 labels of {classes} classes, got {self.y.dtype}: y.long()")
        if self.y.ndim != 1:
            remedy = "y.squeeze(1)" if self.y.shape[1:] == (1,) else "y.argmax(1) where these are one-hot"
            raise ValueError(f"{self.name}: y must have shape (N,), got {tuple(self.y.shape)}: {remedy}")
        if int(self.y.min()) < 0 or int(self.y.max()) >= classes:
            raise ValueError(f"{self.name}: y must lie in [0, {classes})")

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, index: Tensor) -> TensorData:
        """The samples at ``index``, numbers ``(n,)`` or a mask ``(N,)``."""
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, device: torch.device | str) -> TensorData:
        """The same on a ``device``."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))


@dataclass(frozen=True)
class Split:
    """Disjoint training, validation and test parts, as :func:`split` makes them.

    Attributes:
        train: what a network is trained on.
        validation: what settings, and the epoch to stop after, are chosen on.
        test: what the result is measured on, once.

    >>> from odenets.training import load, split
    >>> parts = split(*load("moons"))
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (640, 160, 200)
    """

    train: TensorData
    validation: TensorData
    test: TensorData


@dataclass(frozen=True)
class Batches:
    """Batches of a data set in memory; shuffled by ``(seed, epoch)`` alone, so that any epoch can be drawn again.

    A loop over them draws the next epoch, each time another, beginning with epoch 0; without a seed all epochs are the
    same. :meth:`epoch`, :meth:`in_order` and :meth:`inputs` draw what they say and do not count.

    >>> x, y = torch.rand(800, 2), torch.arange(800) % 2
    >>> shuffled, again = Batches((x, y), 100, seed=1), Batches((x, y), 100, seed=1)
    >>> first, second = list(shuffled), list(shuffled)
    >>> torch.equal(first[0][0], second[0][0]), torch.equal(second[0][0], next(again.epoch(1))[0])
    (False, True)

    Attributes:
        data: the samples, which may be given as a pair ``(x, y)`` of tensors or a TensorDataset of two.
        size: samples per batch; the last one may be smaller.
        seed: of the order of each epoch; None keeps the order of the data.
        crop: pad images by this many pixels and crop them at random to their size, a shift of each; 0 for none.
        flip: mirror half of the images, left to right (not digits).

    Raises:
        TypeError: data of another kind, a size or crop that is no whole number, or a flip that is no flag.
        ValueError: no samples in a batch, what is to be drawn at random without a seed, or crop or flip for samples
            that are no images ``(C, H, W)``.
    """

    data: TensorData
    size: int
    seed: int | None = None
    crop: int = 0
    flip: bool = False
    _drawn: int = field(default=0, init=False, repr=False, compare=False)

    if TYPE_CHECKING:  # a dataclass would take data as it is kept

        def __init__(
            self,
            data: TensorData | TensorDataset | Sequence[Tensor],
            size: int,
            seed: int | None = None,
            crop: int = 0,
            flip: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _in_memory(self.data))
        if isinstance(self.size, bool) or not isinstance(self.size, Integral):
            got = "a tensor: Batches((x, y), size)" if isinstance(self.size, Tensor) else repr(self.size)
            raise TypeError(f"size must be a whole number of samples, got {got}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        check_count("crop", self.crop, 0)
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        if (self.crop or self.flip) and self.seed is None:
            raise ValueError(
                f"crop and flip must be drawn by a seed, got crop={self.crop}, flip={self.flip} and no seed"
            )
        if (self.crop or self.flip) and self.data.x.ndim != 4:
            raise ValueError(f"crop and flip are for images (N, C, H, W), got data of shape {tuple(self.data.x.shape)}")

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    @property
    def augmented(self) -> bool:
        """Whether epochs hold other inputs than the data, cropped, mirrored, or what a subclass' ``epoch`` draws."""
        return bool(self.crop or self.flip) or type(self).epoch is not Batches.epoch

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch."""
        return len(self.data) % self.size or min(self.size, len(self.data))

    def order(self, epoch: int) -> Tensor:
        """The samples in the order of an ``epoch``, numbered from 0: indices ``(N,)`` int64."""
        return self._draw(epoch)[0]

    def _draw(self, epoch: int) -> tuple[Tensor, torch.Generator | None]:
        if self.seed is None:
            return torch.arange(len(self.data)), None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data), generator=generator), generator

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``(x, y)`` of an ``epoch``, numbered from 0, augmented where there is something to draw."""
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
        """The same batches, of a subclass too, of other ``data``."""
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


def _in_memory(data: Any) -> TensorData:
    if isinstance(data, TensorData):
        return data
    tensors = data.tensors if isinstance(data, TensorDataset) else data
    if isinstance(tensors, tuple | list) and len(tensors) == 2:
        x, y = tensors
        return TensorData(x, y)
    if isinstance(data, TensorDataset):
        got = f"a TensorDataset of {len(tensors)}"
    else:
        got = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else type(data).__name__
    remedy = "Batches((x, y), size)" if isinstance(data, Tensor) else "a DataLoader takes any dataset"
    raise TypeError(
        f"data must be a pair of tensors (x, y), a TensorData or a TensorDataset of two, got {got}: {remedy}"
    )


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
