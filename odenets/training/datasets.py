"""Data sets by name, pixels in [0, 1], and stratified parts of them by seed."""

from __future__ import annotations

import math
import warnings
from functools import cache
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from odenets.errors import needs
from odenets.training.data import Split, TensorData

__all__ = ["NAMES", "hold_out", "load", "points", "split", "subsample"]

# mean and standard deviation per channel of the training images, in [0, 1]
_STATISTICS = {
    "digits": ([0.3053], [0.3760]),
    "mnist": ([0.1307], [0.3081]),
    "fashion-mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
NAMES = ("digits", "circles", "moons", *_TORCHVISION)


def load(
    name: str, folder: str | Path | None = None, *, download: bool = True, seed: int = 0
) -> tuple[TensorData, TensorData]:
    """A known data set as ``(train, test)``, for a first try; data of one's own are a :class:`TensorData`.

    The first three come with scikit-learn; a fifth of them, stratified, is the test part. The others come through
    torchvision: with a folder from there, where nothing is downloaded; without one from ``~/.cache/odenets``, where
    they are downloaded once.

    Args:
        name: "digits" (1797 images of 8 x 8), "circles" or "moons" (1000 points in the plane, two classes); "mnist",
            "fashion-mnist", "cifar10" or "cifar100".
        folder: where torchvision's files lie, as ``torchvision.datasets.MNIST(folder)`` expects them.
        download: whether to download without a folder.
        seed: of the test part of the scikit-learn sets, and of the points.

    Returns:
        Training and test part, of images ``(N, C, H, W)`` in [0, 1] or points ``(N, 2)``, float32; labels ``(N,)``.

    Raises:
        ValueError: unknown name, or a folder for what comes with scikit-learn.
        FileNotFoundError: the folder is missing or does not hold the data set.
        ModuleNotFoundError: scikit-learn or torchvision is not installed; the error names the extra.

    >>> train, test = load("digits")
    >>> train.x.shape, test.x.shape, train.classes
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    if name in ("circles", "moons"):
        data = points(name, 1000, seed)
    elif name == "digits":
        data = _digits()
    elif name in _TORCHVISION:
        return _torchvision(name, folder, download)
    else:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    if folder is not None:
        raise ValueError(f"folder is for torchvision's sets; {name} comes with scikit-learn")
    return hold_out(data, 0.2, seed=seed)


def split(
    train: TensorData, test: TensorData, *, validation: float = 0.2, size: int | None = None, seed: int = 0
) -> Split:
    """Cut a validation part off the training part, stratified: each class has the same share of both.

    Args:
        train: training part, whose targets are labels.
        test: test part, which stays as it is.
        validation: fraction of the training part that becomes the validation part, in (0, 1).
        size: samples of training and validation together, a stratified part of ``train``; all of them if None.
        seed: decides which.

    Returns:
        The three parts.

    Raises:
        TypeError: targets that are no labels.
        ValueError: a fraction outside (0, 1), or what :func:`hold_out` and :func:`subsample` raise.

    >>> parts = split(*load("digits"), validation=0.1, size=1000)
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (900, 100, 360)
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a fraction in (0, 1), got {validation}")
    if size is not None:
        train = subsample(train, size, seed=seed)
    return Split(*hold_out(train, validation, seed=seed), test)


def hold_out(data: TensorData, part: float | int, *, seed: int = 0) -> tuple[TensorData, TensorData]:
    """The rest of a data set and a stratified part of it, in which each class has the share that it has in the whole.

    Args:
        data: whose targets are labels, ``(N,)`` int64.
        part: its size, a fraction in (0, 1) or a number of samples.
        seed: decides which.

    Returns:
        The rest, and the part; both in the order of the data.

    Raises:
        TypeError: targets that are no labels.
        ValueError: part is neither a fraction in (0, 1) nor a number of samples, the part or the rest would hold fewer
            samples than there are classes, or a class has a single sample.

    Warns:
        UserWarning: a class is so small that the part or the rest holds none of it.

    >>> rest, part = hold_out(points("moons", 100, seed=0), 0.2)
    >>> len(rest), len(part), part.y.bincount().tolist()
    (80, 20, [10, 10])
    """
    rest, held_out = _stratified(data.y, part, seed)
    return data.subset(rest), data.subset(held_out)


def subsample(data: TensorData, size: int, *, seed: int = 0) -> TensorData:
    """Some samples of a data set, stratified.

    Args:
        data: whose targets are labels, ``(N,)`` int64.
        size: how many samples; all of them is the data set itself.
        seed: decides which.

    Returns:
        The samples, in the order of the data.

    Raises:
        TypeError: targets that are no labels, or a size that is no whole number.
        ValueError: the part or the rest would be smaller than the number of classes.

    >>> subsample(points("moons", 100, seed=0), 10).y.bincount()
    tensor([5, 5])
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"size must be a number of samples, got {size!r}")
    size = int(size)
    if size == len(data):
        return data
    classes = len(data.y.unique()) if data.classes is None else data.classes
    if not classes <= size <= len(data) - classes:
        raise ValueError(
            f"size must be in [{classes}, {len(data) - classes}], so that every class is on both sides, or "
            f"all {len(data)}, got {size}"
        )
    return data.subset(_stratified(data.y, size, seed)[1])


def _stratified(y: Tensor, part: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of a part, a fraction or a number, that holds as much of every class."""
    with needs("training"):
        from sklearn.model_selection import train_test_split

    if not (0 < part < 1 or (isinstance(part, Integral) and 0 < part < len(y))):
        raise ValueError(f"part must be a fraction in (0, 1) or a number of samples below {len(y)}, got {part!r}")
    if y.dtype != torch.long or y.ndim != 1 or int(y.min()) < 0:
        raise TypeError(
            f"y must be labels (N,), int64 and not negative, to be stratified, got {y.dtype} {tuple(y.shape)}"
        )
    counts = y.cpu().bincount()
    classes, smallest = int((counts > 0).sum()), int(counts[counts > 0].min())
    size = int(part) if isinstance(part, Integral) else math.ceil(part * len(y))
    if smallest < 2 or not classes <= size <= len(y) - classes:
        raise ValueError(
            f"part must leave as many samples as there are classes, {classes}, on both sides, and each class two or "
            f"more, got part={part!r} of {len(y)} samples, {smallest} of the smallest class"
        )
    indices = np.arange(len(y))
    rest, chosen = train_test_split(indices, test_size=part, random_state=seed, stratify=y.cpu().numpy())
    rest, chosen = torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(chosen))
    for name, side in {"part": chosen, "rest": rest}.items():
        absent = (counts > 0) & (y.cpu()[side].bincount(minlength=len(counts)) == 0)
        if absent.any():
            warnings.warn(
                f"the {name} of {len(side)} samples holds none of class(es) {absent.nonzero().flatten().tolist()[:8]}, "
                "which are too few for it: choose a larger part",
                stacklevel=3,
            )
    return rest, chosen


@cache  # which scikit-learn reads from text
def _digits() -> TensorData:
    with needs("training"):
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8)
    mean, std = _STATISTICS["digits"]
    return TensorData(x, torch.from_numpy(labels).long(), "digits", 10, tuple(mean), tuple(std))


def points(name: str, size: int, seed: int) -> TensorData:
    """Points of two classes in the plane, drawn by scikit-learn: two circles, one in the other, or two half moons.

    Args:
        name: "circles" (``make_circles``, noise 0.05, factor 0.3) or "moons" (``make_moons``, noise 0.05).
        size: how many.
        seed: of the draw.

    Returns:
        Points ``(size, 2)`` float32, and their classes.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: scikit-learn is not installed: ``pip install 'odenets[training]'``.

    >>> data = points("moons", 50, seed=0)
    >>> data.x.shape, data.y.bincount()
    (torch.Size([50, 2]), tensor([25, 25]))
    """
    with needs("training"):
        from sklearn.datasets import make_circles, make_moons

    if name == "circles":
        x, y = make_circles(size, noise=0.05, factor=0.3, random_state=seed)
    elif name == "moons":
        x, y = make_moons(size, noise=0.05, random_state=seed)
    else:
        raise ValueError(f"name must be 'circles' or 'moons', got {name!r}")
    return TensorData(torch.from_numpy(x).float(), torch.from_numpy(y).long(), name, 2, (0.0, 0.0), (1.0, 1.0))


def _torchvision(name: str, folder: str | Path | None, download: bool) -> tuple[TensorData, TensorData]:
    with needs("images"):
        from torchvision import datasets

    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist; give the one that holds torchvision's {name}")
    root = Path(folder) if folder is not None else Path.home() / ".cache" / "odenets"
    cls = getattr(datasets, _TORCHVISION[name])
    parts = []
    for train in (True, False):
        try:
            parts.append(cls(root, train=train, download=download and folder is None))
        except RuntimeError as error:
            raise FileNotFoundError(
                f"folder {str(root)!r} does not hold {name} as torchvision stores it ({error}); "
                "leave the folder out to download it"
            ) from error
    return _images(name, parts[0]), _images(name, parts[1])


def _images(name: str, part) -> TensorData:
    x = torch.as_tensor(part.data)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    mean, std = _STATISTICS[name]
    y = torch.as_tensor(part.targets).long()
    return TensorData(x.float().div_(255).contiguous(), y, name, len(part.classes), tuple(mean), tuple(std))
