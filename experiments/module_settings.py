"""The networks and trainings of [K24]'s tables on module-wise training, and one that runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lab.networks import vision
from lab.settings import read_settings
from odenets import AdaptedModel, Network, adapt, models

SCHEDULES = ("sequential", "laps", "parallel")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A table of [K24], or one that runs anywhere.

    Attributes:
        table: which.
        thesis: name of its figures in lab/thesis.json.
        best: whether they are those of the best module, not of the last one.
        dataset: name of the data set.
        network: name and arguments.
        sizes: numbers of training images, validation images not among them.
        modules: K.
        split: after how many blocks each module ends; evenly if empty.
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
    """

    table: str
    thesis: str = ""
    best: bool = False
    dataset: str
    network: Mapping[str, Any]
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

    def build(self, channels: int, size: int, classes: int, normalize: models.Normalize) -> Network | AdaptedModel:
        """The network for images of a data set."""
        options = dict(self.network)
        name = options.pop("name")
        if name == "resnet9":
            return models.resnet9(channels, classes, size=size, normalize=normalize, **options)
        if name == "resnet_km":
            return models.resnet_km(in_channels=channels, classes=classes, normalize=normalize, **options)
        return adapt(nn.Sequential(normalize, vision(name, classes, stem="cifar", size=size)))


SETTINGS = read_settings(Setting, Path(__file__).with_name("module_settings.toml"))
