"""What every configuration of an experiment holds, and which of it decides an outcome."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = ["Config", "ImageConfig", "check_among", "check_any", "check_at_least", "keep_given", "recorded", "science"]


@dataclass(frozen=True)
class Config:
    """How an experiment runs.

    Attributes:
        quick: few and small trainings: to see that it runs. What is given otherwise than its default stays as given.
        workers: trainings side by side, each on one thread; 0 takes one per core on a CPU, one on a GPU.
        output: run folder.
        resume: go on with the run in the folder.
        draw: folder of a finished run, whose table and figures are made again; nothing is trained.
    """

    quick: bool = False
    workers: int = 0
    output: Path = Path("runs/experiment")
    resume: bool = False
    draw: Path | None = None

    @property
    def run_folder(self) -> Path:
        """Where the run and its trainings lie."""
        return self.output

    @property
    def processes(self) -> int:
        """Trainings side by side."""
        return self.workers or (1 if getattr(self, "device", "cpu") == "cuda" else os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageConfig(Config):
    """An experiment on images.

    Attributes:
        dataset: digits come with scikit-learn, the others through torchvision.
        folder: where torchvision's files lie; without it they are downloaded once.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None


PLACE = {"workers", "output", "resume", "draw", "folder"}
"""Settings that say where and beside what an experiment runs."""

C = TypeVar("C", bound=Config)


def science(config: Config, without: Collection[str] = ()) -> dict[str, Any]:
    """What decides the outcome: all settings but where and beside what it runs, and but those named.

    >>> science(ImageConfig(workers=2)), science(ImageConfig(), without=("quick",))
    ({'quick': False, 'dataset': 'digits'}, {'dataset': 'digits'})
    """
    return {name: value for name, value in asdict(config).items() if name not in {*PLACE, *without}}


def keep_given(quick: C, config: C) -> C:
    """A quick configuration with what another one holds otherwise than by default.

    >>> keep_given(ImageConfig(workers=1, dataset="mnist"), ImageConfig(workers=3)).workers
    3
    """
    given = {field: getattr(config, field.name) for field in fields(config)}
    return replace(quick, **{field.name: value for field, value in given.items() if value != _default(field)})


def check_at_least(config: Config, least: int, *names: str) -> None:
    """Raise ValueError where one of some settings is too small."""
    values = [getattr(config, name) for name in names]
    if min(values) < least:
        raise ValueError(f"{' and '.join(names)} must be at least {least}, got {' and '.join(map(str, values))}")


def check_any(config: Config, *names: str) -> None:
    """Raise ValueError where one of some settings is empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name} must hold at least one")


def check_among(config: Config, name: str, known: Collection[str]) -> None:
    """Raise ValueError where a setting names what is not known."""
    if unknown := sorted(set(getattr(config, name)) - set(known)):
        raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")


def recorded(cls: type[C], settings: Mapping[str, Any], folder: Path) -> C:
    """The configuration that a ``config.json`` holds; it was checked when the run began, and what it names may be gone.

    Args:
        cls: class of the configuration; what the file does not hold has its default.
        settings: what the file holds.
        folder: in which it lies.
    """
    config = object.__new__(cls)
    for field in fields(cls):
        value = settings.get(field.name, _default(field))
        object.__setattr__(config, field.name, tuple(value) if isinstance(value, list) else value)
    object.__setattr__(config, "output", folder)
    return config


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
