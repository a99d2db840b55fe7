"""What foreign images are told from: configuration, sets of images, what is read off a trained network."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from detection_pretrained_setup import Config as TrainedConfig
from detection_pretrained_setup import network_of, rounded
from ood_coverage import neuron_states
from torch import Tensor
from torch.nn import functional as F

from lab import images
from lab.config import Config as BaseConfig
from lab.config import check_any, check_at_least
from lab.pretrained.resnets import ResNet
from odenets import adapt
from odenets.detection import Separation, Trajectory, in_batches
from odenets.training import datasets
from odenets.training.data import TensorData

__all__ = [
    "NEAR",
    "ODIN_SETTINGS",
    "PATHS",
    "POOL",
    "TRAIN",
    "Config",
    "Images",
    "network",
    "phases",
    "read",
    "sets_of",
]

TRAIN, POOL, NEAR = "train", "pool", "near"
PATHS = {"eq. 34": Trajectory(), "path": Trajectory("residue", "cosine", "embedding"), "separation": Separation()}
"""Features of the path, by name."""
ODIN_SETTINGS = ((0.0014, 1000.0), (0.0014, 10.0))
"""Input steps and temperatures, those of OpenOOD among them."""


@dataclass(frozen=True)
class Config(BaseConfig):
    """Which network, and which images are foreign to it.

    Attributes:
        network: a ResNet for CIFAR-10, or digits, a small one that is trained here.
        weights: file with the weights of the ResNet, or the folder of all of them.
        folder: where torchvision's files lie; without it they are downloaded once.
        near: images of a similar collection: FILE.npz with arrays ``images`` (N, H, W, 3) of bytes and ``labels``, or
            "turned", the test images turned by 90 degrees. Some of its classes serve to choose and are not tested.
        far: other images: FILE.npz likewise; "blended", the test images of MNIST on backgrounds of training images;
            "textures", test images with the phases of their spectrum drawn at random.
        train: training images, the network's own, that scores are fitted on.
        pool: test images; a third of them serves to choose.
        foreign: images of each foreign set at most.
        seeds: splits of the pool and of the classes of the near set.
        held: share of the classes of the near set that serve to choose.
        epochs: of the network that is trained here.
        output: folder of the runs, one for each network.
    """

    network: Literal["digits", "resnet20", "resnet32", "resnet44", "resnet56"] = "resnet56"
    weights: Path | None = None
    folder: Path | None = None
    near: str = "turned"
    far: tuple[str, ...] = ("textures",)
    train: int = 5000
    pool: int = 3000
    foreign: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    held: float = 0.3
    epochs: int = 15
    output: Path = Path("runs/ood")

    def __post_init__(self) -> None:
        check_any(self, "far", "seeds")
        check_at_least(self, 30, "train", "pool", "foreign")
        if not 0 < self.held < 1:
            raise ValueError(f"held must be a share in (0, 1), got {self.held}")
        for name in (self.near, *self.far):
            if name not in ("turned", "blended", "textures") and not (name.endswith(".npz") and Path(name).is_file()):
                raise ValueError(
                    f"near and far must be turned, blended, textures or a FILE.npz that is there: {name!r}"
                )

    @property
    def run_folder(self) -> Path:
        """One for each network."""
        return self.output / self.network


@dataclass(frozen=True)
class Images:
    """Images ``x`` ``(N, C, H, W)`` in [0, 1] and labels ``y`` ``(N,)``, all 0 where there are none."""

    x: Tensor
    y: Tensor = field(repr=False)

    def some(self, count: int) -> Images:
        """So many of them at most, drawn with a seed of its own."""
        index = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))[:count]
        return Images(self.x[index], self.y[index])


def network(config: Config) -> ResNet:
    """The trained one, pixels in [0, 1] come in."""
    given = {name: getattr(config, name) for name in ("network", "weights", "folder", "epochs")}
    return cast(ResNet, network_of(TrainedConfig(**given)))


def data(config: Config) -> tuple[TensorData, TensorData]:
    """The network's training and test images."""
    return images.train_and_test("digits" if config.network == "digits" else "cifar10", config.folder)


def sets_of(config: Config) -> dict[str, Images]:
    """All sets by name: training images, pool, and the foreign ones, without lossy compression."""
    train, test = data(config)
    # apart by index: the pool, test images to be turned, test images whose spectra make textures
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    pool, turned, spectra = order.split([size := min(config.pool, len(test) // 3), size, len(test) - 2 * size])
    fitted = train if config.train >= len(train) else datasets.subsample(train, config.train)
    sets = {TRAIN: Images(fitted.x, fitted.y), POOL: Images(test.x[pool], test.y[pool])}
    for name in (config.near, *config.far):
        if name == "turned":
            images = Images(test.x[turned].rot90(1, (2, 3)), test.y[turned])
        elif name == "textures":
            images = Images(phases(test.x[spectra][: config.foreign]), test.y[spectra][: config.foreign])
        elif name == "blended":
            images = _blended(config, train.x, config.foreign)
        else:
            images = _of_file(Path(name))
        sets[NEAR if name == config.near else Path(name).stem] = images.some(config.foreign)
    return sets


def _of_file(path: Path) -> Images:
    with np.load(path, allow_pickle=False) as file:
        if "images" not in file or file["images"].dtype != np.uint8:
            raise ValueError(f"{path} must hold an array 'images' of bytes, (N, H, W, 3)")
        x = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        return Images(x, torch.from_numpy(file["labels"]).long() if "labels" in file else torch.zeros(len(x)).long())


def _blended(config: Config, backgrounds: Tensor, count: int) -> Images:
    """``|background - digit|``, as MNIST-M has it (Ganin and Lempitsky 2015), on training images."""
    mnist = datasets.load("mnist", config.folder)[1]
    digits = F.pad(mnist.x[:count], (2, 2, 2, 2))
    draw = torch.randint(len(backgrounds), (len(digits),), generator=torch.Generator().manual_seed(0))
    return Images((backgrounds[draw] - digits).abs(), mnist.y[:count])


def phases(x: Tensor, seed: int = 0) -> Tensor:
    """Images with the amplitudes of the spectra of images ``(N, C, H, W)`` and phases drawn at random.

    The same change of phase for all channels of an image, so that its colors stay as correlated as they are; clipped,
    and at 8 bits.
    """
    noise = torch.rand(len(x), 1, *x.shape[2:], generator=torch.Generator().manual_seed(seed))
    turn = torch.fft.fft2(noise)
    turn = turn / turn.abs().clamp(min=1e-12)  # of a real image, so that the result is real; the mean stays
    return rounded(torch.fft.ifft2(torch.fft.fft2(x) * turn).real.clamp(0, 1))


def read(config: Config, x: Tensor, *, odin: bool) -> dict[str, np.ndarray]:
    """What scores need of images: logits, states before the head, features of the path, predictions by ODIN.

    And of each stage, first to last, "neurons 1" and so on, as :func:`ood_coverage.neuron_states` has them.
    """
    model = network(config)
    adapted = adapt(model, x[:2])
    parts = [neuron_states(model, part) for part in x.split(100)]
    values = {
        "logits": torch.cat([logits for logits, _, _ in parts]),
        "z": torch.cat([means[-1] for _, means, _ in parts]),
    }
    for i in range(len(model.stages)):
        values[f"neurons {i + 1}"] = torch.cat([products[i] for _, _, products in parts])
    for name in ("path", "separation"):
        values[name] = in_batches(partial(PATHS[name], adapted), adapted, x, 100)
    values["eq. 34"] = values["path"][:, : 2 * adapted.depth]  # the residues; states come after them
    if odin:
        from pytorch_ood.detector import ODIN

        for eps, temperature in ODIN_SETTINGS:
            detector = ODIN(model, eps=eps, temperature=temperature)
            values[f"ODIN {eps:g} {temperature:g}"] = torch.cat([detector.predict(part) for part in x.split(100)])
    return {name: each.detach().numpy() for name, each in values.items()}
