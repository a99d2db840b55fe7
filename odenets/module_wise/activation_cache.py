"""The states before a module, computed once and kept in memory or on disk, so that it does not pay for those before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odenets.modes import device_of, evaluating
from odenets.training.data import Batches

__all__ = ["ActivationCache", "pass_through"]


@dataclass(frozen=True)
class _View:
    """The states of all samples, and the file that holds them, if any."""

    states: Tensor
    file: Path | None = None


class ActivationCache:
    """The states of all training images before a module; first the images themselves.

    Where images are augmented, by ``crop``, ``flip`` or an :meth:`~odenets.training.Batches.epoch` of a subclass, a few
    views of each are drawn once, and epoch e takes view ``e mod views``: the policy of a cache, since a state cannot be
    cropped or mirrored anew.

    Args:
        batches: the training data.
        views: how many, where ``batches`` are augmented; one otherwise.
        folder: where the states lie until :meth:`close`; in memory if not given. Files there are overwritten.

    Raises:
        ValueError: fewer than one view, or an epoch of a subclass that draws more samples than there are, or fewer.
    """

    def __init__(self, batches: Batches, views: int = 1, folder: Path | None = None) -> None:
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.batches, self.folder = batches, folder
        if batches.augmented:
            drawn = [_augmented(batches, v) for v in range(views)]
        else:
            drawn = [(batches.data.x, batches.data.y)]
        self.images, self.targets = [x for x, _ in drawn], [y for _, y in drawn]
        self.restart()

    def restart(self) -> None:
        """Back to the images."""
        self.views = [_View(images) for images in self.images]

    def close(self) -> None:
        """Let go of the states, and of their files."""
        self.restart()
        for v in range(len(self.images)) if self.folder else ():
            for file in self._files(v):
                file.unlink(missing_ok=True)

    def advance(self, part: nn.Module) -> None:
        """Take every state through a part in eval mode, which has its modes back afterwards."""
        with torch.no_grad(), evaluating(part):
            self.views = [self._behind(part, view, v) for v, view in enumerate(self.views)]

    def _behind(self, part: nn.Module, view: _View, v: int) -> _View:
        """The states behind a part: in memory, or in the one of two files that does not hold those before it."""
        device, result, begin = device_of(part, view.states.device), None, 0
        for states in view.states.split(self.batches.size):
            states = part(states.to(device))
            if result is None:
                result = self._empty((len(view.states), *states.shape[1:]), states, view, v)
            result.states[begin : begin + len(states)] = states
            begin += len(states)
        assert result is not None  # data are not empty
        return result

    def _empty(self, shape: tuple[int, ...], like: Tensor, before: _View, v: int) -> _View:
        """Room for states."""
        if self.folder is None:
            return _View(like.new_empty(shape))
        one, other = self._files(v)
        file = other if before.file == one else one
        self.folder.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        states = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=like.dtype)
        return _View(states.reshape(shape), file)

    def _files(self, v: int) -> tuple[Path, Path]:
        assert self.folder is not None
        return self.folder / f"states{v}.a", self.folder / f"states{v}.b"

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """State, image and target of each batch, in the order that the batches have in that epoch."""
        view = epoch % len(self.views)
        states, y = self.views[view].states, self.targets[view]
        for index in self.batches.order(epoch).to(y.device).split(self.batches.size):
            yield states[index.to(states.device)].to(y.device), self.images[view][index], y[index]


def pass_through(parts: Sequence[nn.Module], x: Tensor, args: tuple[Any, ...] = ()) -> Tensor:
    """The state behind some parts in eval mode, without gradients; they have their modes back afterwards."""
    with torch.no_grad(), evaluating(*parts):
        for part in parts:
            x = part(x, *args)
    return x


def _augmented(batches: Batches, epoch: int) -> tuple[Tensor, Tensor]:
    """The augmented images of an epoch and their targets, in the order of the data."""
    drawn = [*batches.epoch(epoch)]
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    order = batches.order(epoch).to(x.device)
    if len(x) != len(order):
        raise ValueError(
            f"{type(batches).__name__}.epoch must draw each of {len(order)} samples once for a cache, got {len(x)}: "
            "cache=None draws what it will"
        )
    same = x.shape == batches.data.x.shape and x.dtype == batches.data.x.dtype
    images, targets = torch.empty_like(batches.data.x if same else x), torch.empty_like(y)  # laid out as the data
    images[order], targets[order.to(y.device)] = x, y
    return images, targets
