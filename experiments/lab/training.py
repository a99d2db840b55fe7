"""A training that several experiments share, and its place under the progress bar of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric

from lab import images
from lab.config import Config, check_any
from lab.runs import Run
from lab.workers import Report
from odenets import Network
from odenets.training.callbacks import Callback
from odenets.training.data import Batches, Split
from odenets.training.loop import fit
from odenets.training.optimization import MakeLRScheduler
from odenets.training.state import Training

__all__ = ["Progress", "TrainingConfig", "fit_network", "parts_of"]


class Progress(Callback):
    """Moves the bar on after each epoch, and at once past those that a checkpoint holds."""

    def __init__(self, report: Report, run: Run) -> None:
        self.report = report
        state = run.load_state()
        report(state["epoch"] if state else 0)

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """One epoch more."""
        self.report(1)


@dataclass(frozen=True)
class TrainingConfig(Config):
    """On what a network is trained, and how.

    Attributes:
        dataset: digits, circles and moons come with scikit-learn, the others through torchvision.
        folder: where torchvision's files lie; without it they are downloaded once.
        train_size: samples for training and validation, stratified; 0 takes all.
        test_size: the same for the test.
        seeds: of weights and batch order.
        epochs: of every training.
        batch_size: samples per step.
        learning_rate: at the start, for SGD with momentum 0.9; a cosine brings it to 0.
        device: "cpu" or "cuda".
    """

    dataset: str = "digits"
    folder: Path | None = None
    train_size: int = 0
    test_size: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.02
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        check_any(self, "seeds")


def parts_of(config: TrainingConfig) -> Split:
    """The data, cut the same for every job."""
    return images.split(config.dataset, config.folder, config.train_size, config.test_size)


def fit_network(
    config: TrainingConfig, network: Network, batches: Batches, run: Run, report: Report,
    *, callbacks: Sequence[Callback] = (), rate: float | None = None, optimizer: Callable[..., Any] | None = None,
    lr_scheduler: MakeLRScheduler | None = None, **options: Any,
) -> Training:  # fmt: skip
    """Train a network; the options are those of :func:`odenets.training.loop.fit`.

    The optimizer is SGD with momentum unless another class is given, its learning rate that of the configuration unless
    a ``rate`` is, and a cosine brings it to 0 unless there is another scheduler.
    """
    sgd = partial(torch.optim.SGD, momentum=0.9)
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=config.epochs)
    return fit(
        network,
        batches,
        epochs=config.epochs,
        optimizer=partial(optimizer or sgd, lr=config.learning_rate if rate is None else rate),
        callbacks=[*callbacks, Progress(report, run)],
        run=run,
        fabric=Fabric(accelerator=config.device, devices=1),
        lr_scheduler=lr_scheduler or cosine,
        **options,
    )
