"""The states before a module, computed once and kept in memory or on disk, so that it does not pay for those before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from odenets.modes import device_of, evaluating
from odenets.training.data import Batches

__all__ = ["States", "pass_through"]


class States:
    """The states of all training images before a module; first the images themselves.

    Where images are augmented, a few views of each are drawn once, and epoch e takes view ``e mod views``: the policy
    of a cache, since a state cannot be cropped or mirrored anew.

    Args:
        batches: the training data.
        views: how many, where ``batches`` crops or mirrors; one otherwise.
        folder: where the states lie; in memory if not given. Files there are overwritten.

    Raises:
        ValueError: fewer than one view.
    """

    def __init__(self, batches: Batches, views: int = 1, folder: Path | None = None) -> None:
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.batches, self.folder = batches, folder
        augmented = batches.seed is not None and (batches.crop or batches.flip)
        self.images = [_view(batches, v) for v in range(views)] if augmented else [batches.data.x]
        self.views = self.images

    def restart(self) -> None:
        """Back to the images."""
        self.views = self.images

    def advance(self, part: nn.Module) -> None:
        """Take every state through a part in eval mode, which has its modes back afterwards."""
        files = [None if self.folder is None else self.folder / f"states{v}" for v in range(len(self.views))]
        with evaluating(part):
            self.views = [self._passed(part, view, file) for view, file in zip(self.views, files, strict=True)]

    def _passed(self, part: nn.Module, view: Tensor, file: Path | None) -> Tensor:
        """The states behind a part: in memory, or in the one of two files that does not hold those before it."""
        result: Tensor | None = None
        for begin in range(0, len(view), self.batches.size):
            with torch.no_grad():
                state = part(view[begin : begin + self.batches.size].to(device_of(part, view.device)))
            if result is None:
                shape = (len(view), *state.shape[1:])
                result = torch.empty(shape, dtype=state.dtype, device=state.device) if file is None else None
                if result is None:
                    result = _mapped(cast(Path, file), shape, state.dtype, taken=view)
            result[begin : begin + len(state)] = state
        return cast(Tensor, result)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """State, images and labels of each batch, in the order that the batches have in that epoch."""
        view = epoch % len(self.views)
        y = self.batches.data.y
        for index in self.batches.order(epoch).to(y.device).split(self.batches.size):
            state = self.views[view][index.to(self.views[view].device)].to(y.device)
            yield state, self.images[view][index], y[index]


def pass_through(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The state behind some parts in eval mode, without gradients; they have their modes back afterwards."""
    with torch.no_grad(), evaluating(*parts):
        for part in parts:
            x = part(x)
    return x


def _view(batches: Batches, epoch: int) -> Tensor:
    """The augmented images of an epoch, in the order of the data."""
    x, order = torch.empty_like(batches.data.x), batches.order(epoch)
    for index, (images, _) in zip(order.to(x.device).split(batches.size), batches.epoch(epoch), strict=True):
        x[index] = images
    return x


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype, taken: Tensor) -> Tensor:
    """A tensor on disk, in the file of the two of that name which ``taken`` does not lie in."""
    paths = [file.with_suffix(suffix) for suffix in (".a", ".b")]
    path = paths[1] if getattr(taken, "file", None) == paths[0] else paths[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    size = 1
    for n in shape:
        size *= n
    path.unlink(missing_ok=True)
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)
    tensor.file = path  # type: ignore[attr-defined]
    return tensor
