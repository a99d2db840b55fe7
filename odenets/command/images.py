"""Images from files and folders, as batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odenets.command.mistakes import FAILED, Mistake, one_line
from odenets.errors import needs

__all__ = ["Unreadable", "batches", "files_of", "parsed_size", "resized"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Transform = Callable[[Any], Tensor]


class Unreadable(Mistake):
    """A file that is no image, or one of pixels that would be cut off.

    Args:
        file: the file.
        why: what is wrong with it, after its name.
    """

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file} {why}", FAILED)
        self.file = file


def files_of(places: Iterable[Path]) -> list[Path]:
    """The images of files and folders, and of their folders, in the order of their names; no hidden ones of a folder.

    Raises:
        Mistake: there is no such file or folder, or no image in a folder.
    """
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            inside = [file for file in inside if not _hidden(file.relative_to(place))]
            if not inside:
                raise Mistake(f"the folder {place} holds no images ({', '.join(SUFFIXES)})")
            files += inside
        elif place.is_file():
            files.append(place)
        else:
            raise Mistake(f"IMAGES: no file or folder {place}")
    return files


def _hidden(file: Path) -> bool:
    """Whether a system or an editor put it there: ``._1.jpg`` of macOS, the copies in ``.ipynb_checkpoints``."""
    return any(part.startswith(".") for part in file.parts)


def parsed_size(size: str | None) -> tuple[int, int] | None:
    """Height and width of "224" or "224x320".

    Raises:
        Mistake: it is neither.

    >>> parsed_size("32"), parsed_size("224x320")
    ((32, 32), (224, 320))
    """
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise Mistake(f"--size must be a number of pixels, 224, or height and width, 224x320, got {size}")
    return int(sides[0]), int(sides[-1])


def resized(size: tuple[int, int] | None) -> Transform:
    """Images as tensors in [0, 1], of their own size or of another."""
    with needs("images"):
        from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(steps if size is None else [v2.Resize(size, antialias=True), *steps])


def batches(
    files: Sequence[Path],
    transform: Transform,
    size: int,
    mode: str | None = "RGB",
    left_out: list[Unreadable] | None = None,
) -> Iterator[tuple[list[Path], Tensor]]:
    """Files, a few at a time, and their images, ``(B, C, H, W)``; threads read them.

    Args:
        files: of images.
        transform: from a PIL image to a tensor ``(C, H, W)``.
        size: of a batch.
        mode: PIL's, of the images that are transformed, "RGB" or "L", which are upright; None: as each file has them.
        left_out: a list for what cannot be read, which is left out then; without one that is an error in the end, which
            names all.

    Raises:
        Mistake: files cannot be read, or none can, or the images have several shapes.
    """
    first, unreadable = None, [] if left_out is None else left_out
    remaining = iter(files)
    with ThreadPoolExecutor() as pool:
        while some := list(islice(remaining, size)):
            tried = list(pool.map(lambda file: _read(file, transform, mode), some))
            unreadable += [one for one in tried if isinstance(one, Unreadable)]
            if unreadable and left_out is None:
                continue  # to name all of them
            read = {file: x for file, x in zip(some, tried, strict=True) if isinstance(x, Tensor)}
            for file, x in read.items():
                first = first if first is not None else (file, x.shape)
                if x.shape != first[1]:
                    shapes = f"{_dims(first[1])}, {first[0]}, and {_dims(x.shape)}, {file}"
                    raise Mistake(f"the images must have one shape, got {shapes}: --size 224 makes them one size")
            if read:
                yield [*read], torch.stack([*read.values()])
    if unreadable and (left_out is None or first is None):
        raise _all_of(unreadable, len(files))


def _all_of(unreadable: Sequence[Unreadable], count: int) -> Mistake:
    """What cannot be read, as one mistake, which names the first few."""
    several = f"{len(unreadable)} of {count} images cannot be read: " if len(unreadable) > 1 else ""
    more = f"; and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    remedy = "; --skip-unreadable goes on without" if len(unreadable) < count else ""
    return Mistake(f"{several}{'; '.join(map(str, unreadable[:3]))}{more}{remedy}", FAILED)


def _dims(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _read(file: Path, transform: Transform, mode: str | None) -> Tensor | Unreadable:
    try:
        return _tensor(file, transform, mode)
    except Unreadable as one:
        return one


def _tensor(file: Path, transform: Transform, mode: str | None) -> Tensor:
    with needs("images"):
        from PIL import Image
    try:
        with Image.open(file) as image:
            if mode is not None and image.mode[0] in "IF":
                raise Unreadable(
                    file,
                    f"has pixels of more than 8 bits (mode {image.mode}), which a conversion cuts off: "
                    "--transform module:function takes it as it is",
                )
            image.load()
            pixels = image.copy() if mode is None else _converted(image, mode)
    except Mistake:
        raise
    except Exception as error:  # whatever a broken file makes its decoder raise
        raise Unreadable(file, f"cannot be read as an image: {one_line(error)}") from error
    try:
        x = transform(pixels)
    except Exception as error:  # of a function of the user's
        raise Mistake(f"{file} cannot be transformed: {type(error).__name__}: {one_line(error)}", FAILED) from error
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        got = f"{_dims(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise Mistake(f"a transform must return a floating tensor (C, H, W), got {got} for {file}", FAILED)
    return x


def _converted(image: Any, mode: str) -> Any:
    """An image in a mode of PIL, turned as its camera says, opaque."""
    with needs("images"):
        from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and "transparency" in upright.info:  # PIL warns of any other way
        upright = upright.convert("RGBA")
    return upright.convert(mode)
