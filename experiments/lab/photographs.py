"""Crops of photographs in a folder, without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["crops", "photographs_in"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def photographs_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder and those in it, in the order of their paths.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} must be a folder of pictures ({', '.join(sorted(SUFFIXES))})")
    return files


def crops(files: list[Path], each: int, size: int = 224, *, seed: int = 0) -> Tensor:
    """Squares cut out of photographs at random, by seed, photograph by photograph.

    Args:
        files: the photographs.
        each: squares of each, their sides 0.4 to 1 times its shorter side.
        size: pixels of a side, to which they are scaled.
        seed: of the places and sides.

    Returns:
        Pixels in [0, 1], ``(files * each, 3, size, size)``.
    """
    generator = np.random.default_rng(seed)
    squares = []
    for file in files:
        with Image.open(file) as opened:
            opened.draft("RGB", (2 * size, 2 * size))
            picture = opened.convert("RGB")
        for _ in range(each):
            side = round(min(picture.size) * generator.uniform(0.4, 1))
            left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
            square = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            squares.append(torch.from_numpy(np.array(square)))
    return torch.stack(squares).permute(0, 3, 1, 2).float() / 255
