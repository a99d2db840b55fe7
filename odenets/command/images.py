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

__all__ = ["batches", "files_of", "parsed_size", "resized"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Transform = Callable[[Any], Tensor]


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
    files: Sequence[Path], transform: Transform, size: int, mode: str | None = "RGB"
) -> Iterator[tuple[list[Path], Tensor]]:
    """Files, a few at a time, and their images, ``(B, C, H, W)``; threads read them.

    Args:
        files: of images.
        transform: from a PIL image to a tensor ``(C, H, W)``.
        size: of a batch.
        mode: PIL's, of the images that are transformed, "RGB" or "L", which are upright; None: as each file has them.

    Raises:
        Mistake: a file is no image, or the images have several shapes.
    """
    first = None
    remaining = iter(files)
    with ThreadPoolExecutor() as pool:
        while some := list(islice(remaining, size)):
            tensors = list(pool.map(lambda file: _tensor(file, transform, mode), some))
            first = first if first is not None else (some[0], tensors[0].shape)
            for file, x in zip(some, tensors, strict=True):
                if x.shape != first[1]:
                    shapes = f"{_dims(first[1])}, {first[0]}, and {_dims(x.shape)}, {file}"
                    raise Mistake(f"the images must have one shape, got {shapes}: --size 224 makes them one size")
            yield some, torch.stack(tensors)


def _dims(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _tensor(file: Path, transform: Transform, mode: str | None) -> Tensor:
    with needs("images"):
        from PIL import Image
    try:
        with Image.open(file) as image:
            if mode is not None and image.mode[0] in "IF":
                raise Mistake(
                    f"{file} has pixels of more than 8 bits (mode {image.mode}), which a conversion cuts off: "
                    "--transform module:function takes it as it is",
                    FAILED,
                )
            image.load()
            pixels = image.copy() if mode is None else _converted(image, mode)
    except Mistake:
        raise
    except Exception as error:  # whatever a broken file makes its decoder raise
        raise Mistake(f"{file} cannot be read as an image: {one_line(error)}", FAILED) from error
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
