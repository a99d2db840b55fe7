"""What subcommands that take images share: their files, how they are prepared, and where results may be written."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from odenets.command.images import Unreadable, parsed_size, resized
from odenets.command.mistakes import FAILED, Mistake, one_line
from odenets.command.networks import Model, function_of
from odenets.files import write_atomically

__all__ = [
    "Batch", "check_writable", "once", "recording", "seed_weights", "transform_of", "with_progress", "without",
    "written",
]  # fmt: skip

Batch = tuple[list[Path], Tensor]
"""Files, and their images, ``(B, C, H, W)``."""


def once(files: Iterable[Path]) -> list[Path]:
    """The files, each one once, where a file and its folder are named, or one twice."""
    by_place: dict[str, Path] = {}
    for file in files:
        by_place.setdefault(os.path.abspath(file), file)  # links are files of their own
    return [*by_place.values()]


def seed_weights(seed: int) -> None:
    """Seed torch, which draws random weights.

    Raises:
        Mistake: it takes no such seed.
    """
    try:
        torch.manual_seed(seed)
    except (RuntimeError, ValueError) as error:  # of torch 2.8 and of later ones
        raise Mistake(f"--seed must be from -2**63 to 2**64 - 1, got {seed}") from error


def without(files: Sequence[Path], left_out: Sequence[Unreadable]) -> list[Path]:
    """The files that were read, with a word on the others."""
    names = ", ".join(str(one.file) for one in left_out[:3])
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    warnings.warn(
        f"{len(left_out)} of {len(files)} images cannot be read and are left out: {names}{more}", stacklevel=3
    )
    out = {one.file for one in left_out}
    return [file for file in files if file not in out]


@contextmanager
def recording(name: str, x: Tensor) -> Iterator[None]:
    """Whatever the forward pass of a network raises is a mistake, on images of this shape."""
    try:
        yield
    except Mistake:
        raise
    except Exception as error:
        size = " x ".join(map(str, x.shape))
        what = f"{type(error).__name__}: {one_line(error)}"
        less = " (--batch-size takes fewer at a time)" if isinstance(error, torch.OutOfMemoryError) else ""
        raise Mistake(f"{name} cannot be recorded on images {size}: {what}{less}", FAILED) from error


def transform_of(
    model: Model, size: str | None, gray: bool, transform: str | None
) -> tuple[Callable[[Any], Tensor], str, str | None]:
    """How images are prepared, that in words, and their mode.

    Args:
        model: which may know how.
        size, gray, transform: the options of these names.

    Raises:
        Mistake: options that exclude each other, or are none.
    """
    pixels, mode = parsed_size(size), "L" if gray else "RGB"
    if transform is not None:
        if pixels or gray:
            raise Mistake("--transform takes the place of --size and --gray: name it alone")
        return function_of(transform, "--transform"), f"prepared by {transform}", None
    if model.prepare is not None and not gray:
        return model.prepare(pixels), f"prepared as for {model.prepared_as}", mode
    return resized(pixels), "pixels in [0, 1]" + ("" if pixels is None else ", resized"), mode


def check_writable(files: Mapping[str, Path | None]) -> None:
    """That files can be written, by the option that names each.

    Raises:
        Mistake: one is a folder, or lies where one may not write.
    """
    for name, file in files.items():
        if file is not None and file.is_dir():
            raise Mistake(f"{name} must be a file, got the folder {file}")
        if file is not None:
            folder = next(parent for parent in file.absolute().parents if parent.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise Mistake(f"{name} cannot write {file}: {folder} is no folder that one may write to")


def with_progress(loaded: Iterable[Batch], count: int, size: int) -> Iterator[Batch]:
    """A bar in a terminal, where there are several batches."""
    console = Console(stderr=True)
    silent = not sys.stderr.isatty() or count <= size
    yield from track(loaded, "images", -(-count // size), console=console, transient=True, disable=silent)


def written(file: Path, write: Callable[[Path], object]) -> Path:
    """A file written whole or not at all.

    Raises:
        Mistake: it cannot be.
    """
    try:
        return write_atomically(file, write)
    except OSError as error:
        raise Mistake(f"{file} cannot be written: {one_line(error)}", FAILED) from error
