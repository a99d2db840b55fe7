"""The configurations of the thesis' tables on module-wise training, with its figures, and one that runs anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from lab.networks import vision
from odenets import AdaptedModel, Network, adapt, models

SCHEDULES = ("sequential", "laps", "parallel")


@dataclass(frozen=True)
class Setting:
    """A table of the thesis, or one that runs anywhere.

    Attributes:
        table: which.
        dataset: name of the data set.
        build: makes the network from channels, size and classes.
        sizes: numbers of training images, validation images not among them.
        modules: K.
        split: after how many blocks each module ends; evenly if not given.
        schedules: of the table.
        epochs: of a parallel or end-to-end training; of the first module of a sequential one; of that in a lap.
        more: by how many the epochs of a module exceed those of the module before, in sequence and in a lap.
        laps: how many.
        batch_size: of training.
        learning_rates, taus: tried for every method.
        end_to_end_rates: tried end to end.
        label_smoothing: share of the target spread over all classes.
        gain: of the orthogonal initialization.
        same_head: one classifier for all modules.
        thesis: accuracy (%) of the last module, or as ``best`` says of the best, and the half-width of its interval, by
            size, schedule and method.
        best: whether the thesis reports the best module.
    """

    table: str
    dataset: str
    build: Callable[[int, int, int, models.Normalize], Network | AdaptedModel]
    sizes: tuple[int, ...]
    modules: int
    split: tuple[int, ...] = ()
    schedules: tuple[str, ...] = SCHEDULES
    epochs: tuple[int, int, int] = (300, 50, 10)
    more: tuple[int, int] = (10, 2)
    laps: int = 5
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    taus: tuple[float, ...] = (0.1, 1.0)
    end_to_end_rates: tuple[float, ...] = (0.03, 0.1)
    label_smoothing: float = 0.0
    gain: float = 0.05
    same_head: bool = False
    thesis: dict[tuple[int, str, str], tuple[float, float]] = field(default_factory=dict)
    best: bool = False


def _resnet9(features: int, depth: int, channels: int, size: int, classes: int, normalize: models.Normalize) -> Network:
    return models.resnet9(channels, classes, features=features, size=size, depth=depth, normalize=normalize)


def _resnet_km(K: int, M: int, channels: int, size: int, classes: int, normalize: models.Normalize) -> Network:
    return models.resnet_km(K, M, channels, classes, normalize=normalize)


def _vision(name: str, stem: str, channels: int, size: int, classes: int, normalize: models.Normalize) -> AdaptedModel:
    model = vision(name, classes, stem=stem, size=size)  # type: ignore[arg-type]
    return adapt(nn.Sequential(normalize, model))


def _rows(schedule: str, rows: dict[int, tuple[float, float, float, float]]) -> dict[tuple[int, str, str], Any]:
    """VanGL and TRGL of a schedule with their half-widths, by size."""
    return {
        (size, schedule, method): values
        for size, (a, da, b, db) in rows.items()
        for method, values in (("VanGL", (a, da)), ("TRGL", (b, db)))
    }


MNIST_20_1 = {
    60000: (99.07, 0.04, 99.08, 0.04),
    6000: (98.05, 0.09, 98.16, 0.07),
    1500: (96.34, 0.12, 96.91, 0.07),
    600: (91.35, 0.99, 95.16, 0.15),
    300: (89.81, 0.73, 92.86, 0.24),
    150: (81.84, 1.22, 87.48, 0.42),
}
MNIST_20_1_END_TO_END = {150: (87.82, 0.59), 300: (92.87, 0.28), 600: (95.3, 0.17), 1500: (97.19, 0.08)}
CIFAR10_20_1 = {500: (38.61, 0.47, 41.44, 0.44), 5000: (62.31, 0.54, 64.06, 0.57)}
CIFAR10_20_1_END_TO_END = {500: (40.4, 0.6), 5000: (69.44, 0.88)}
CIFAR10_10_1 = {
    50000: (88.02, 0.18, 88.20, 0.24),
    10000: (76.0, 0.39, 77.18, 0.34),
    5000: (67.74, 0.49, 69.67, 0.44),
    1000: (45.67, 0.88, 51.34, 0.9),
}
CIFAR10_10_1_END_TO_END = {1000: (50.63, 0.98), 5000: (73.93, 0.67), 10000: (82.61, 0.35), 50000: (91.88, 0.18)}


def _end_to_end(rows: dict[int, tuple[float, float]]) -> dict[tuple[int, str, str], tuple[float, float]]:
    return {(size, "end-to-end", "end-to-end"): values for size, values in rows.items()}


SETTINGS = {
    "digits": Setting(
        "none: runs anywhere",
        "digits",
        partial(_resnet9, 16, 10),
        sizes=(200,),
        modules=10,
        epochs=(20, 10, 4),
        more=(1, 0),
        laps=4,
        batch_size=50,
        learning_rates=(0.01, 0.05),
        taus=(0.05, 0.5, 5.0),
        end_to_end_rates=(0.01, 0.05),
        gain=0.1,
    ),
    "mnist-20-1": Setting(
        "25",
        "mnist",
        partial(_resnet9, 32, 20),
        sizes=(150, 300),
        modules=20,
        schedules=("parallel",),
        epochs=(60, 0, 0),
        batch_size=64,
        same_head=True,
        thesis=_rows("parallel", MNIST_20_1) | _end_to_end(MNIST_20_1_END_TO_END),
    ),
    "cifar10-20-1": Setting(
        "26",
        "cifar10",
        partial(_resnet9, 100, 20),
        sizes=(500, 5000),
        modules=20,
        schedules=("parallel",),
        same_head=True,
        thesis=_rows("parallel", CIFAR10_20_1) | _end_to_end(CIFAR10_20_1_END_TO_END),
    ),
    "cifar10-20-1-narrow": Setting(
        "26, with 16 channels instead of 100",
        "cifar10",
        partial(_resnet9, 16, 20),
        sizes=(500,),
        modules=20,
        schedules=("parallel",),
        epochs=(40, 0, 0),
        batch_size=64,
        same_head=True,
        thesis=_rows("parallel", CIFAR10_20_1) | _end_to_end(CIFAR10_20_1_END_TO_END),
    ),
    "cifar10-10-1": Setting(
        "11",
        "cifar10",
        partial(_resnet_km, 10, 1),
        sizes=(1000, 5000),
        modules=10,
        schedules=("sequential",),
        learning_rates=(0.003, 0.007, 0.02),
        thesis=_rows("sequential", CIFAR10_10_1) | _end_to_end(CIFAR10_10_1_END_TO_END),
    ),
    "cifar100-10-1": Setting(
        "10",
        "cifar100",
        partial(_resnet_km, 10, 1),
        sizes=(5000, 12500),
        modules=10,
        learning_rates=(0.003, 0.007, 0.02),
        best=True,
        thesis=_rows("sequential", {5000: (36.37, 0.33, 36.40, 0.40), 12500: (51.64, 0.33, 51.74, 0.26)})
        | _rows("laps", {5000: (33.68, 0.48, 34.61, 0.59), 12500: (51.30, 0.22, 51.89, 0.30)})
        | _rows("parallel", {5000: (39.45, 0.23, 40.36, 0.23), 12500: (55.13, 0.24, 55.40, 0.35)})
        | _end_to_end({5000: (36.38, 0.31), 12500: (52.39, 0.97)}),
    ),
    "cifar100-50-1": Setting(
        "28",
        "cifar100",
        partial(_resnet_km, 50, 1),
        sizes=(50000,),
        modules=50,
        schedules=("sequential", "laps"),
        epochs=(300, 10, 2),
        more=(0, 0),
        thesis=_rows("sequential", {50000: (63.40, 0.46, 63.86, 0.56)})
        | _rows("laps", {50000: (62.59, 0.64, 63.24, 0.50)})
        | _end_to_end({50000: (63.34, 2.41)}),
    ),
    "cifar100-2-7": Setting(
        "23",
        "cifar100",
        partial(_resnet_km, 2, 7),
        sizes=(50000,),
        modules=2,
        schedules=("parallel",),
        batch_size=256,
        label_smoothing=0.1,
    ),
    "cifar10-2-7": Setting(
        "24",
        "cifar10",
        partial(_resnet_km, 2, 7),
        sizes=(50000,),
        modules=2,
        schedules=("parallel",),
        batch_size=256,
        label_smoothing=0.1,
        gain=0.1,
        thesis=_rows("parallel", {50000: (94.01, 0.17, 94.05, 0.18)}),
    ),
    "cifar100-resnet101": Setting(
        "5, whose TRGL has the growing weights of eq. (33) in place of a tau, and 8",
        "cifar100",
        partial(_vision, "resnet101", "cifar"),
        sizes=(50000,),
        modules=2,
        split=(17, 33),
        batch_size=256,
        label_smoothing=0.1,
        gain=0.1,
        thesis=_rows("parallel", {50000: (77.31, 0.27, 77.87, 0.44)}),
    ),
    "cifar100-resnet152": Setting(
        "5, whose TRGL has the growing weights of eq. (33) in place of a tau",
        "cifar100",
        partial(_vision, "resnet152", "cifar"),
        sizes=(50000,),
        modules=2,
        split=(25, 50),
        schedules=("parallel",),
        batch_size=256,
        label_smoothing=0.1,
        gain=0.1,
        thesis=_rows("parallel", {50000: (75.40, 0.75, 76.55, 1.90)}),
    ),
}
