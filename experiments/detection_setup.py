"""What the detection experiment trains and attacks: configuration, networks, images, kinds of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lab import images
from lab.config import ImageConfig, check_among, check_at_least
from lab.experiment import Jobs, Run
from odenets import Network, load_weights, models, save_weights
from odenets.detection import (
    LID,
    Attack,
    Attacked,
    Features,
    FourierSpectrum,
    Mahalanobis,
    NaturalSceneStatistics,
    Trajectory,
    preset,
    run_attack,
    split,
)
from odenets.detection.detector import MODES
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy

METHODS: dict[str, Callable[[], Objective]] = {
    "vanilla": CrossEntropy,
    "least action": partial(LeastAction, lambda0=1.0, tau=1.0, every=1),  # as in [K24, section 5]
    "reverse cross-entropy": ReverseCrossEntropy,
}
TRAJECTORY, MORE = "trajectory", "trajectory and stages"


@dataclass(frozen=True)
class NetworkConfig(ImageConfig):
    """What to train.

    Attributes:
        methods: vanilla, least action, reverse cross-entropy.
        network: resnet9, or resnet110 for CIFAR-10.
        solver, depth, channels: of resnet9: blocks of the solver over total time 1, or with euler h = 1.
        seeds: networks per method, each with a split of its own.
        train_size, pool_size: images that the network is trained on; images for the detectors.
        epochs, batch_size, learning_rate: of the networks: SGD, momentum 0.9, cosine to 0.
    """

    methods: tuple[str, ...] = ("vanilla", "least action")
    network: Literal["resnet9", "resnet110"] = "resnet9"
    solver: str = "bs23"
    depth: int = 4
    channels: int = 16
    seeds: int = 5
    train_size: int = 900
    pool_size: int = 600
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        check_among(self, "methods", METHODS)
        check_at_least(self, 2, "seeds")


@dataclass(frozen=True)
class Config(NetworkConfig):
    """What to train, attack and compare.

    Attributes:
        setting: "seen", a detector for each attack, tested on it; "unseen", fitted on the first attack and tested on
            the others; "ood", fitted on the first foreign set and on the first attack, tested on all foreign sets;
            "adaptive", attacks that know of the detector; "timing", of features beside a forward pass.
        attacks: by the names of the presets, FGM, APGD, BIM, AA, DF, CW, HSJ, BA; the first is the one that is seen
            where others are not, and is fitted on in "adaptive".
        eps: size of the attacks in the maximum norm; 0.1 for digits and MNIST and 0.03 [K24] for CIFAR-10 if 0.
        iterations: at most, of BIM, APGD, which then begins once, and DF; BIM and APGD then step by a quarter of the
            size, where [K24] has ART's 0.1, larger than the ball. With 0 all is the preset's, as of all others.
        foreign: sets from elsewhere: "photographs", patches of scikit-learn's two that share no pixel; "turned", the
            images turned by 90 degrees; another data set; or a file FILE.npz with an array ``images`` (N, H, W[, 3]) of
            bytes.
        modes: of the detectors among which is chosen: general, conditional, ensemble.
        magnitudes: input steps of the Mahalanobis detectors among which is chosen.
        noisy: count copies of the clean images with noise of size eps as clean.
        test, validation: share of the pool for the test (B2; 0.1 in [K24]); of the rest for choosing.
        starts: images that the adaptive attacks begin at, per network.
        queries: HopSkipJump's iterations, and its questions for a direction at most; 50 and 10000 in [K24].
        steps: of the attack through a surrogate, for each of its weights.
        rounds: of timing.
        output: folder of the runs; networks and attacks in it serve all settings.
    """

    setting: Literal["seen", "unseen", "ood", "adaptive", "timing"] = "seen"
    attacks: tuple[str, ...] = ("FGM", "BIM", "APGD", "DF")
    eps: float = 0.0
    iterations: int = 10
    foreign: tuple[str, ...] = ("photographs", "turned")
    modes: tuple[str, ...] = ("general",)
    magnitudes: tuple[float, ...] = (0.0, 0.005)
    noisy: bool = False
    test: float = 0.3
    validation: float = 0.25
    starts: int = 6
    queries: tuple[int, int] = (10, 500)
    steps: int = 100
    rounds: int = 5
    output: Path = Path("runs/detection")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, "modes", MODES)
        if not self.attacks or (self.setting == "unseen" and len(self.attacks) < 2):
            raise ValueError(f"attacks must name one, and for setting 'unseen' two or more, got {self.attacks}")
        if self.setting == "ood" and not self.foreign:
            raise ValueError("foreign must name a set from elsewhere for setting 'ood', got none")
        known = ("photographs", "turned", *datasets.NAMES)
        for name in self.foreign if self.setting == "ood" else ():
            if name not in known and not (name.endswith(".npz") and Path(name).is_file()):
                raise ValueError(f"foreign must be among {', '.join(known)}, or a FILE.npz that is there, got {name!r}")
        if not self.magnitudes or not self.modes:
            raise ValueError("modes and magnitudes must hold at least one, magnitude 0 for no input step")
        if self.eps < 0:
            raise ValueError(f"eps must be positive, or 0 for the data set's, got {self.eps}")
        # what follows raises where it does not fit
        kinds_of(self)
        for name in self.attacks:
            attack_of(self, name)
        split(self.pool_size, test=self.test, validation=self.validation)

    @property
    def strength(self) -> float:
        """Size of the attacks."""
        return self.eps or (0.03 if self.dataset == "cifar10" else 0.1)

    @property
    def run_folder(self) -> Path:
        """One for each setting."""
        return self.output / self.setting

    @property
    def processes(self) -> int:
        """One where time is taken."""
        return 1 if self.setting == "timing" else super().processes


@dataclass(frozen=True)
class Job:
    """One network and what is done with it."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.replace(' ', '_')}_seed{self.seed}"


def jobs(config: NetworkConfig) -> Jobs[Job]:
    """A network of every method and seed."""
    return (yield [Job(method, seed) for method in config.methods for seed in range(config.seeds)])


def parts_of(config: NetworkConfig) -> tuple[TensorData, TensorData]:
    """Images that networks are trained on, and those that they have not seen."""
    train, test = datasets.load(config.dataset, config.folder)
    if config.dataset == "digits":  # their test part alone is too small: all images, cut anew
        everything = replace(train, x=torch.cat([train.x, test.x]), y=torch.cat([train.y, test.y]))
        train, test = datasets.hold_out(everything, config.pool_size)
    train = datasets.subsample(train, min(config.train_size, len(train)))
    return train, datasets.subsample(test, min(config.pool_size, len(test)))


def build(config: NetworkConfig, dataset: TensorData, seed: int) -> Network:
    """The network with the seed's weights."""
    euler = config.solver == "euler"
    if config.network == "resnet110":
        torch.manual_seed(seed)
        network = models.resnet110(dataset.x.shape[1], dataset.classes, normalize=images.normalize(dataset))
    else:
        network = images.resnet9(
            dataset, seed, features=config.channels, depth=config.depth, solver=config.solver,
            norm="batch" if euler else "group", total_time=float(config.depth) if euler else 1.0,
        )  # fmt: skip
    return network.to(memory_format=torch.channels_last)  # faster for convolutions


def trained(config: NetworkConfig, job: Job, train: TensorData) -> Network:
    """The network of a job, trained once for all settings."""
    network = build(config, train, job.seed)
    folder = config.output / "networks" / job.name
    decisive = ("dataset", "network", "solver", "depth", "channels", "train_size", "pool_size", "epochs", "batch_size")
    settings = {name: getattr(config, name) for name in (*decisive, "learning_rate")}
    run = Run(folder, asdict(job) | settings, resume=True)
    if run.finished:
        load_weights(network, folder / "weights.safetensors")
        return network.eval()
    batches = images.batches(train, config.batch_size, job.seed)
    sgd = partial(torch.optim.SGD, lr=config.learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=config.epochs)
    fit(
        network, batches, epochs=config.epochs, optimizer=sgd, lr_scheduler=cosine,
        objective=METHODS[job.method](), run=run, clip_norm=5.0,
    )  # fmt: skip
    save_weights(network, folder / "weights.safetensors")
    run.finish({"accuracy": evaluate(network, Batches(train, 500)).accuracy}, seeds=[job.seed])
    return network.eval()


def attack_of(config: Config, name: str) -> Attack:
    """The attack of [K24] by that name, of the size and with the iterations of the configuration, and ART's own loss.

    Few iterations need steps that stay in the ball: a quarter of its size, instead of ART's 0.1.
    """
    settings: dict[str, Any] = {"eps": config.strength} if "eps" in dict(preset(name).settings) else {}
    if config.iterations and name in ("BIM", "APGD", "DF"):
        settings |= {"max_iter": config.iterations}
        settings |= {"eps_step": config.strength / 4} if name != "DF" else {}
        settings |= {"nb_random_init": 1} if name == "APGD" else {}
    settings |= {"exact": False} if name in ("FGM", "BIM", "APGD", "AA") else {}
    return preset(name, **settings)


def attacked(config: Config, network: Network, job: Job, name: str, pool: TensorData) -> Attacked:
    """The pool under an attack, computed once."""
    return run_attack(
        network, attack_of(config, name), pool.x, pool.y, cache=config.output / "attacks", batch_size=200, seed=job.seed
    )


def foreign(config: Config, name: str, like: TensorData) -> Tensor:
    """Images from elsewhere, as many channels and pixels as those of a data set, at most as many images."""
    if name == "turned":
        return like.x.rot90(1, (2, 3))
    if name == "photographs":
        from sklearn.datasets import load_sample_images

        patches = [torch.from_numpy(i.copy()).unfold(0, 32, 32).unfold(1, 32, 32) for i in load_sample_images().images]
        x = torch.cat([patch.reshape(-1, 3, 32, 32) for patch in patches]).float() / 255
    elif name.endswith(".npz"):
        with np.load(name, allow_pickle=False) as file:
            if "images" not in file or file["images"].dtype != np.uint8:
                raise ValueError(f"{name} must hold an array 'images' of bytes, (N, H, W) or (N, H, W, 3)")
            x = torch.from_numpy(file["images"]).float() / 255
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    else:
        x = datasets.load(name, None if name == "digits" else config.folder)[1].x
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(like)]]
    channels, size = like.x.shape[1], like.x.shape[-1]
    x = x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, channels, -1, -1)
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1).contiguous()


def kinds_of(config: Config) -> dict[str, dict[str, Features]]:
    """Kinds of features by name, each with its variants."""
    kinds: dict[str, dict[str, Features]] = {TRAJECTORY: {"": Trajectory()}}
    if config.solver != "euler" and config.network == "resnet9":
        kinds[MORE] = {"": Trajectory("residue", "cosine", "action", "stages", "error")}
    steps = config.magnitudes
    kinds["Mahalanobis"] = {f"step {m:g}": Mahalanobis(magnitude=m) for m in steps}
    kinds["relative Mahalanobis"] = {f"step {m:g}": Mahalanobis(magnitude=m, relative=True) for m in steps}
    fourier = {part: FourierSpectrum(part) for part in ("magnitude", "phase")}
    return kinds | {"LID": {"": LID()}, "scenes": {"": NaturalSceneStatistics()}, "Fourier": fourier}
