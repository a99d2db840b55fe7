"""Images of the experiments, cut and mislabeled by seed, and the residual networks that they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odenets import Network, models
from odenets.training import datasets
from odenets.training.data import Batches, Split, TensorData

__all__ = ["batches", "mislabel", "normalize", "pool_validation_test", "resnet9", "split", "train_and_test"]

FEATURES = {"digits": 16, "mnist": 32, "cifar10": 100}
"""Channels of ResNet-9 by data set; those of the thesis but for digits."""


def train_and_test(
    dataset: str, folder: Path | None, train_size: int = 0, test_size: int = 0
) -> tuple[TensorData, TensorData]:
    """Training and test images; all if a size is 0.

    A data set whose name ends so is a FILE.npz in the folder.
    """
    load = _of_file if dataset.endswith(".npz") else datasets.load
    train, test = load(dataset, folder)
    train = datasets.subsample(train, train_size) if train_size else train
    return train, datasets.subsample(test, test_size) if test_size else test


def _of_file(name: str, folder: Path | None) -> tuple[TensorData, TensorData]:
    """Training and test images of a file, normalized by the training images' own statistics.

    It holds arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``: bytes (N, H, W, C), and
    numbers from 0 on.
    """
    path = (folder or Path()) / name
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist; give its folder as folder")
    with np.load(path, allow_pickle=False) as file:
        missing = {f"{part}_{what}" for part in ("train", "test") for what in ("images", "labels")} - set(file)
        if missing:
            raise ValueError(f"{str(path)!r} must hold arrays {', '.join(sorted(missing))}, got {', '.join(file)}")
        arrays = {each: torch.from_numpy(file[each]) for each in file}
    train = arrays["train_images"].double().div_(255)
    mean, std = (tuple(each.tolist()) for each in (train.mean((0, 1, 2)), train.std((0, 1, 2))))
    classes = int(arrays["train_labels"].max()) + 1
    return tuple(  # type: ignore[return-value]  # of two
        TensorData(
            arrays[f"{part}_images"].permute(0, 3, 1, 2).float().div_(255).contiguous(),
            arrays[f"{part}_labels"].long(), path.stem, classes, mean, std,
        )
        for part in ("train", "test")
    )  # fmt: skip


def split(dataset: str, folder: Path | None, train_size: int = 0, test_size: int = 0) -> Split:
    """Training, validation and test parts; ``train_size`` is that of training and validation, 0 takes all."""
    train, test = train_and_test(dataset, folder, test_size=test_size)
    return datasets.split(train, test, size=train_size or None)


def pool_validation_test(
    dataset: str, folder: Path | None, validation_size: int, test_size: int = 0
) -> tuple[TensorData, TensorData, TensorData]:
    """Images to draw training images from, images to choose on, and test images, all if ``test_size`` is 0."""
    pool, test = train_and_test(dataset, folder, test_size=test_size)
    return *datasets.hold_out(pool, validation_size, seed=0), test


def mislabel(part: TensorData, share: float, seed: int) -> TensorData:
    """The same images; a share of the labels is drawn anew from all classes, by seed."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(part), generator=generator) < share
    labels = torch.randint(part.classes, (len(part),), generator=generator)
    return replace(part, y=torch.where(noisy, labels, part.y))


def batches(part: TensorData, batch_size: int, seed: int) -> Batches:
    """Batches of training images in the order of a seed: all but digits cropped, and CIFAR's flipped."""
    crop, flip = 0 if part.name == "digits" else 4, part.name.startswith("cifar")
    return Batches(part, batch_size, seed=seed, crop=crop, flip=flip)


def normalize(dataset: TensorData) -> models.Normalize:
    """The layer that normalizes the images of a data set."""
    return models.Normalize([*dataset.mean], [*dataset.std])


def resnet9(dataset: TensorData, seed: int, *, features: int = 0, **options: Any) -> Network:
    """ResNet-9 for the images of a data set with the seed's weights.

    Args:
        dataset: the images.
        seed: of the weights.
        features: channels; the data set's own if 0.
        options: of :func:`odenets.models.resnet9`.
    """
    torch.manual_seed(seed)
    options = {"features": features or FEATURES[dataset.name], "normalize": normalize(dataset)} | options
    return models.resnet9(dataset.x.shape[1], dataset.classes, size=dataset.x.shape[-1], **options)
