"""What least action is compared on: configuration, pairs of ResNet-14, their training, trained weights, images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from detection_pretrained_setup import Config as AttackConfig
from einops.layers.torch import Reduce
from safetensors.torch import load_file
from torch import Tensor, nn

from lab import images
from lab.config import Config as BaseConfig
from lab.config import check_any, check_at_least
from lab.runs import Run
from odenets import ConvField, Flow, Network, load_weights, save_weights
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.data import TensorData
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective

__all__ = ["LEAST_ACTION", "METHODS", "PLAIN", "Config", "parts_of", "read_pair", "resnet14", "trained"]

PLAIN, LEAST_ACTION = "plain", "least action"
METHODS: dict[str, Callable[[], Objective]] = {
    PLAIN: CrossEntropy,
    LEAST_ACTION: partial(LeastAction, lambda0=1.0, tau=1.0, every=1),
}
"""The cost is the sum over the blocks of the mean square of the residue."""
FILES = {PLAIN: "plain", LEAST_ACTION: "lap"}
"""The methods in the names of files."""


@dataclass(frozen=True)
class Config(BaseConfig):
    """Which networks, which attacks, and on how many images.

    Attributes:
        dataset: cifar10, or digits, for a look at how it runs.
        folder: where torchvision's files lie; without it they are downloaded once.
        pairs: folder with weights ``resnet14-plain-SEED.safetensors`` and ``resnet14-lap-SEED.safetensors``; the
            networks of the other seeds are trained here.
        seeds: of the networks, one plain and one with least action for each.
        epochs, batch_size, learning_rate: of their training: SGD, Nesterov 0.9, weight decay 5e-4, one cycle to that
            rate.
        apart: points of clean accuracy by which the networks of a pair may differ.
        attacks: by the names of the presets, in a ball of each size.
        eps: sizes of the attacks in the maximum norm.
        pool: test images that are attacked; the others say which networks are equal.
        train: training images for the statistics of features.
        splits: seeds of the splits of the pool.
        test, validation: share of the pool for the test; of the rest for choosing.
        points: images on which the singular values of Jacobians are computed.
        iterations: of power iteration.
        output: folder of the runs, one for each data set; networks and attacks in it serve all.
    """

    dataset: Literal["digits", "cifar10"] = "cifar10"
    folder: Path | None = None
    pairs: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 0.2
    apart: float = 0.5
    attacks: tuple[str, ...] = ("FGM", "BIM", "APGD")
    eps: tuple[float, ...] = (0.03, 0.01)
    pool: int = 400
    train: int = 2000
    splits: tuple[int, ...] = (0, 1, 2, 3, 4)
    test: float = 0.3
    validation: float = 0.25
    points: int = 40
    iterations: int = 15
    output: Path = Path("runs/detection_least_action")

    def __post_init__(self) -> None:
        check_any(self, "seeds", "splits")
        check_at_least(self, 1, "epochs", "batch_size", "iterations")
        check_at_least(self, 2, "points")
        if self.apart < 0:
            raise ValueError(f"apart must be points of accuracy, not negative, got {self.apart}")
        if self.points > self.pool:
            raise ValueError(f"points must be at most pool, got {self.points} of {self.pool}")
        _ = self.attacked  # raises where something does not fit

    @property
    def run_folder(self) -> Path:
        """One for each data set."""
        return self.output / self.dataset

    @property
    def attacked(self) -> AttackConfig:
        """The same images and attacks, as the study of trained networks has them."""
        return AttackConfig(
            network="digits" if self.dataset == "digits" else "resnet56", folder=self.folder, attacks=self.attacks,
            eps=self.eps, pool=self.pool, few=self.pool, train=self.train, seeds=self.splits, test=self.test,
            validation=self.validation,
        )  # fmt: skip


def parts_of(config: Config) -> tuple[TensorData, TensorData]:
    """The images that networks are trained on, and the test images outside the pool, by which pairs are made."""
    train, test = images.train_and_test(config.dataset, config.folder)
    return train, datasets.hold_out(test, config.pool)[0]


def resnet14(dataset: TensorData, seed: int, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> Network:
    """A pre-activation ResNet of three flows of two blocks, with the seed's weights; pixels in [0, 1] come in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Conv2d(dataset.x.shape[1], widths[0], 3, padding=1, bias=False)
        encoder = nn.Sequential(images.normalize(dataset), first, nn.BatchNorm2d(widths[0]))
        flows = [Flow(partial(ConvField, width, norm="batch"), depth=blocks, solver="euler", h=1.0) for width in widths]
        transitions = [nn.Conv2d(a, b, 1, stride=2, bias=False) for a, b in pairwise(widths)]
        head = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), Reduce("b c h w -> b c", "mean"),
            nn.Linear(widths[-1], dataset.classes),
        )  # fmt: skip
        network = Network(encoder, flows, head, transitions=transitions)
    return network.to(memory_format=torch.channels_last)  # faster for convolutions


def read_pair(network: Network, path: Path) -> Network:
    """The network of a file, whose blocks are ``stages.i.j``, in eval mode.

    Raises:
        ValueError: the file holds another network.
    """
    own, theirs = network.state_dict(), load_file(path)
    found: dict[str, Tensor] = {}
    for name, value in theirs.items():
        renamed = _renamed(name)
        found[renamed] = value.reshape(own[renamed].shape) if renamed in own else value
    of_flows = {name for name in own if name.endswith(("_extra_state", "recalibrated"))}
    if missing := sorted(own.keys() - found.keys() - of_flows) or sorted(found.keys() - own.keys()):
        raise ValueError(f"{path} holds another network: {', '.join(missing)} in one of the two alone")
    network.load_state_dict(own | found)
    return network.eval()


def _renamed(name: str) -> str:
    """A name in a file as the network has it."""
    first, *rest = name.split(".")
    if first == "stages":
        flow, block, layer, what = rest
        layer, what = layer.replace("bn", "norm"), "batches" if what == "num_batches_tracked" else what
        return f"_flows.{flow}.blocks.{block}.fields.0.{layer}.{what}"
    place = {"conv": "encoder.1", "bn": "encoder.2", "bn_out": "head.0", "linear": "head.3"}.get(first, first)
    return ".".join([place, *rest])


def trained(config: Config, method: str, seed: int, callbacks: tuple[Any, ...] = ()) -> Network:
    """The network of a method and a seed in eval mode: read where its weights are, else trained once for all runs."""
    train, _ = parts_of(config)
    network = resnet14(train, seed, widths=(4, 8, 16) if config.dataset == "digits" else (16, 32, 64))
    if config.pairs and (path := config.pairs / f"resnet14-{FILES[method]}-{seed}.safetensors").exists():
        return read_pair(network, path)
    folder = config.output / "networks" / f"{FILES[method]}-{seed}"
    settings = {name: getattr(config, name) for name in ("dataset", "epochs", "batch_size", "learning_rate")}
    run = Run(folder, {"method": method, "seed": seed, **settings}, resume=True)
    if run.finished:
        load_weights(network, folder / "weights.safetensors")
        return network.eval()
    batches = images.batches(train, config.batch_size, seed)
    training = fit(
        network, batches, epochs=config.epochs, objective=METHODS[method](), run=run, callbacks=callbacks,
        optimizer=partial(torch.optim.SGD, lr=config.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=config.learning_rate, cycle_momentum=False,
            total_steps=config.epochs * len(batches),
        ),
        lr_interval="step",
    )  # fmt: skip
    save_weights(network, folder / "weights.safetensors")
    run.finish({"rows": training.rows}, seeds=[seed])
    return network.eval()
