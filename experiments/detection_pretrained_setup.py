"""What detection on trained networks is measured on: configuration, networks, images, attacks, controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab import images
from lab.config import Config as BaseConfig
from lab.config import check_any, check_at_least
from lab.pretrained.resnets import ResNet, load_resnet
from odenets.detection import PRESETS, Attack, Attacked, in_batches, preset, run_attack, split
from odenets.training import datasets
from odenets.training.data import TensorData

__all__ = [
    "CLEAN", "EXCHANGED", "NOISE", "Config", "Set", "attack_of", "attacked", "exchanged", "images_of", "network_of",
    "noise_like", "rounded", "sets_of",
]  # fmt: skip

CLEAN, NOISE, EXCHANGED = "clean", "noise as large as ", "exchanged "
"""Names of sets of images: the pool; before the name of an attack its noise, and its changes of other images."""

FAST = {
    "FGM": {},
    "BIM": {"max_iter": 10},
    "APGD": {"max_iter": 20, "nb_random_init": 1},
}
"""Settings beside the presets' of attacks that all images of the pool are put to; steps are eps / 4, of APGD eps."""
SLOW = {
    "AA": {"apgd_iter": 20, "apgd_restarts": 1, "square_iter": 100, "deepfool_iter": 20},
    "DF": {"max_iter": 50, "epsilon": 0.02},
    "CW": {},
    "HSJ": {"max_iter": 20, "max_eval": 1000, "init_eval": 50},
    "BA": {"max_iter": 300},
}
"""And of those that a few are put to; CW has the preset's, those of [K24]."""
SIZED = ("FGM", "BIM", "APGD", "AA")
"""Attacks in a ball of the maximum norm; the others come as near as they get."""
LEVELS = 255


@dataclass(frozen=True)
class Config(BaseConfig):
    """Which network, which attacks, and on how many images.

    Attributes:
        network: a ResNet for CIFAR-10, or digits, a small one that is trained here.
        weights: file with the weights of the ResNet, or the folder of all of them.
        folder: where torchvision's files lie; without it they are downloaded once.
        attacks: by the names of the presets, in a ball of each size on all images; the first is fitted on where others
            are tested unseen.
        slow: attacks on the first of the images alone.
        eps: sizes of the attacks in the maximum norm.
        exact: whether attacks climb the cross-entropy in its exact direction; else by ART's loss, as in [K24].
        pool, few: images that are attacked, and by the slow ones.
        train: training images for the statistics of features, the network's own.
        seeds: splits of the pool.
        test, validation: share of the pool for the test; of the rest for choosing.
        starts: images from which attacks begin that know of a detector; none without.
        steps: of these.
        epochs: of the network that is trained here.
        output: folder of the runs, one for each network; attacks in it serve all.
    """

    network: Literal["digits", "resnet20", "resnet32", "resnet44", "resnet56"] = "resnet56"
    weights: Path | None = None
    folder: Path | None = None
    attacks: tuple[str, ...] = ("FGM", "BIM", "APGD")
    slow: tuple[str, ...] = ()
    eps: tuple[float, ...] = (0.03, 0.01)
    exact: bool = False
    pool: int = 600
    few: int = 100
    train: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    test: float = 0.3
    validation: float = 0.25
    starts: int = 30
    steps: int = 20
    epochs: int = 15
    output: Path = Path("runs/detection_pretrained")

    def __post_init__(self) -> None:
        check_any(self, "attacks", "eps", "seeds")
        check_at_least(self, 10, "pool", "few", "train")
        check_at_least(self, 0, "starts")
        check_at_least(self, 1, "steps")
        for name in (*self.attacks, *self.slow):
            if name not in PRESETS:
                raise ValueError(f"attacks and slow must be among {', '.join(PRESETS)}, got {name!r}")
        if min(self.eps) <= 0 or max(self.eps) > 1:
            raise ValueError(f"eps must hold sizes in (0, 1], got {self.eps}")
        if self.few > self.pool:
            raise ValueError(f"few must be at most pool, got {self.few} of {self.pool}")
        split(min(self.few, self.pool), test=self.test, validation=self.validation)  # raises where a part is empty

    @property
    def run_folder(self) -> Path:
        """One for each network."""
        return self.output / f"{self.network}{'_exact' if self.exact else ''}"


@dataclass(frozen=True)
class Set:
    """One attack at one size.

    Attributes:
        attack: its name.
        eps: its size, 0 where it has none.
        images: how many of the pool, the first ones, it is put to.
    """

    attack: str
    eps: float
    images: int

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.attack} {self.eps:g}" if self.eps else self.attack


def sets_of(config: Config) -> list[Set]:
    """All attacks of a configuration."""
    fast = [Set(name, eps, config.pool) for name in config.attacks for eps in config.eps]
    slow = [Set(name, eps, config.few) for name in config.slow for eps in (config.eps if name in SIZED else (0.0,))]
    return fast + slow


def images_of(config: Config) -> tuple[TensorData, TensorData]:
    """The network's training images that statistics are taken of, and the pool, of the test images."""
    train, test = images.train_and_test("digits" if config.network == "digits" else "cifar10", config.folder)
    if config.network == "digits":  # at 17 levels
        test = replace(test, x=rounded(test.x))
    # the pool in an order by seed, so that its first ones are of all classes
    pool = datasets.subsample(test, config.pool) if config.pool < len(test) else test
    pool = pool.subset(torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)))
    return datasets.subsample(train, config.train) if config.train < len(train) else train, pool


def network_of(config: Config) -> nn.Module:
    """The trained network; pixels in [0, 1] come in.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    if config.network != "digits":
        if config.weights is None:
            raise FileNotFoundError("weights must name the file with the weights of the ResNet")
        network = load_resnet(int(config.network.removeprefix("resnet")), config.weights)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's own types
    return _of_digits(config)


def _of_digits(config: Config) -> ResNet:
    """ResNet-20 of a quarter of the width, trained by Adam with a cosine, the same for the same configuration."""
    train, _ = images.train_and_test("digits", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResNet(3, (4, 8, 16), channels=1, normalize=([*train.mean], [*train.std]), classes=train.classes)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        for _ in range(config.epochs):
            for part in torch.randperm(len(train)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(train.x[part]), train.y[part]).backward()
                optimizer.step()
            scheduler.step()
    return network.eval()


def attack_of(each: Set, exact: bool) -> Attack:
    """The attack with its settings."""
    settings: dict[str, Any] = dict((FAST | SLOW)[each.attack])
    if each.eps:
        settings |= {"eps": each.eps, "exact": exact}
    if "eps_step" in dict(PRESETS[each.attack].settings):
        settings["eps_step"] = each.eps if each.attack == "APGD" else each.eps / 4
    return preset(each.attack, **settings)


def attacked(config: Config, network: nn.Module, each: Set, pool: TensorData, cache: Path) -> Attacked:
    """The first images of the pool under an attack, rounded to 8 bits as clean ones are; computed once."""
    x, y = pool.x[: each.images], pool.y[: each.images]
    raw = run_attack(network, attack_of(each, config.exact), x, y, cache=cache, batch_size=100, seed=0)
    moved = rounded(raw.images)
    change = (moved - x).flatten(1)
    predicted = in_batches(network, network, moved).argmax(1)
    return replace(raw, images=moved, predicted=predicted, linf=change.abs().amax(1), l2=change.norm(dim=1))


def rounded(x: Tensor) -> Tensor:
    """Pixels in [0, 1] at the nearest of 256 levels.

    >>> rounded(torch.tensor([0.0, 0.501, 1.0])).mul(255)
    tensor([  0., 128., 255.])
    """
    return (x * LEVELS).round() / LEVELS


def noise_like(clean: Tensor, moved: Tensor, seed: int) -> Tensor:
    """Clean images with noise of an attack's own size: its changes, each at another place and of a random sign.

    So the noise has the L1, L2 and maximum norm of the attack, level by level. A change that would leave [0, 1] has the
    other sign.

    Args:
        clean: images ``(N, C, H, W)`` at 8 bits.
        moved: the same ones under the attack, at 8 bits.
        seed: of places and signs.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = (clean * LEVELS).round().flatten(1)
    size = ((moved - clean) * LEVELS).round().abs().flatten(1)
    size = size.gather(1, torch.rand(size.shape, generator=generator).argsort(1))
    sign = 1.0 - 2 * torch.randint(2, size.shape, generator=generator)
    return _changed(levels, sign * size).reshape(clean.shape)


def exchanged(clean: Tensor, moved: Tensor) -> Tensor:
    """Clean images, each with the change that an attack makes to the one before it, of those that it changes at all.

    A change that would leave [0, 1] has the other sign.

    Args:
        clean: images ``(N, C, H, W)`` at 8 bits.
        moved: the same ones under the attack, at 8 bits.
    """
    levels = (clean * LEVELS).round()
    change = (moved * LEVELS).round() - levels
    index = change.flatten(1).any(1).nonzero()[:, 0]
    change[index] = change[index.roll(1)]
    return _changed(levels, change)


def _changed(levels: Tensor, change: Tensor) -> Tensor:
    """Pixels in [0, 1]; levels and change are of 255."""
    there = levels + change
    there = torch.where((there < 0) | (there > LEVELS), levels - change, there)
    return there.clamp(0, LEVELS) / LEVELS  # a change of more than half of the levels may leave both ways
