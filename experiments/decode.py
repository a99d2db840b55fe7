"""What a network's states look like: a pretrained decoder shows the state after each block (F.2, Figs 28 to 32).

An autoencoder is trained without labels; its encoder is frozen and becomes that of ResNet-9, whose blocks and head are
trained on the task, plainly and with least action at lambda0, tau and s of F.2. The decoder then turns the state after
every block into an image. Lambda divides the action here, as in the thesis' text, and changes before each s-th step; in
its code it multiplies the loss, and with it the step. Weights are torch's own, not orthogonal ones of gain 0.01, and
training ends after a number of epochs, not at an accuracy. The CIFAR-100 networks of Figs 33 and 34 are left out, and
digits, which the thesis does not have, are trained as MNIST.

    python experiments/decode.py
    python experiments/decode.py --dataset mnist --folder DIR
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lab.networks import resnet9_decoder
from lab.runs import Run
from lab.tables import table
from odenets import Network, load_weights, measures, models, plotting, save_weights
from odenets.least_action import LeastAction
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.runs import read_summary
from odenets.transport import states

METHODS = ("vanilla", "least action")
SETTINGS = {"digits": (5.0, 1.0, 5), "mnist": (5.0, 1.0, 5), "cifar10": (10.0, 0.1, 50)}  # lambda0, tau, s of F.2


@dataclass(frozen=True)
class Config:
    """What to train.

    Attributes:
        dataset: digits, mnist or cifar10.
        folder: where torchvision's files lie; without it they are downloaded.
        train_size: training images; all if 0.
        epochs: of the network.
        pretraining: epochs of the autoencoder.
        batch_size: of both.
        learning_rate: of SGD with momentum 0.9, for the network.
        shown: images in the figure.
        quick: few images and epochs: to see that it runs.
        seed: of everything.
        output: run folder.
        resume: go on with what is there.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    folder: Path | None = None
    train_size: int = 0
    epochs: int = 20
    pretraining: int = 30
    batch_size: int = 64
    learning_rate: float = 0.01
    shown: int = 6
    quick: bool = False
    seed: int = 0
    output: Path = Path("runs/decode")
    resume: bool = False

    def __post_init__(self) -> None:
        if self.shown < 1:
            raise ValueError(f"shown must be at least 1, got {self.shown}")


def build(config: Config, dataset: data.TensorData) -> tuple[Network, nn.Sequential]:
    """ResNet-9 and the decoder of its states."""
    torch.manual_seed(config.seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    features = {"digits": 16, "mnist": 32, "cifar10": 100}[config.dataset]
    normalize = models.Normalize(list(dataset.mean), list(dataset.std))
    network = models.resnet9(channels, dataset.classes, features=features, size=size, normalize=normalize)
    return network, resnet9_decoder(channels, features=features, size=size)


def pretrain(config: Config, autoencoder: nn.Module, images: data.TensorData) -> float:
    """Train the autoencoder on images alone; the mean squared error of the last epoch."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    batches, error = data.Batches(images, config.batch_size, seed=config.seed), torch.zeros(())
    for epoch in tqdm(range(config.pretraining), desc="autoencoder", unit="epoch"):
        error = torch.zeros(())
        for x, _ in batches.epoch(epoch):
            loss = F.mse_loss(autoencoder(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = error + loss.detach() * len(x)
    return (error / len(images)).item()


class Frozen(nn.Module):
    """A module that stays as it is: its weights have no gradients, its batch norms keep their statistics."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def objective(config: Config, method: str) -> Objective:
    """What a method minimizes."""
    lambda0, tau, every = SETTINGS[config.dataset]
    return LeastAction(lambda0=lambda0, tau=tau, every=every) if method == "least action" else CrossEntropy()


def train(config: Config, method: str, images: data.TensorData, test: data.TensorData, weights: Path) -> None:
    """Train the blocks of one network on the frozen encoder, in a folder of its own."""
    run = Run(config.output / method.replace(" ", "_"), science(config) | {"method": method}, resume=True)
    network, decoder = build(config, images)
    load_weights(nn.Sequential(network.encoder, decoder), weights)
    network.encoder = Frozen(network.encoder)
    fit(
        network,
        data.Batches(images, config.batch_size, seed=config.seed),
        epochs=config.epochs,
        optimizer=lambda net: torch.optim.SGD(
            [p for p in net.parameters() if p.requires_grad], config.learning_rate, momentum=0.9, weight_decay=1e-4
        ),
        objective=objective(config, method),
        run=run,
        progress=method,
    )
    decoder.eval()
    with torch.no_grad():
        decoded = torch.stack([decoder(state) for state in states(network, test.x)])
        found = network.eval().record(test.x, action=measures.action)[1]["action"]
    change = (decoded[1:] - decoded[:1]).square().flatten(2).mean(2).sqrt().mean(1)
    save_weights(network, run.folder / "weights.safetensors")
    torch.save(decoded[:, : config.shown].clone(), run.folder / "decoded.pt")
    run.finish(
        {
            "method": method,
            "accuracy": evaluate(network, data.Batches(test, 500)).accuracy,
            "action": found.sum(0).mean().item(),
            "change": change.tolist(),
        },
        seeds=[config.seed],
    )


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome."""
    names = ("dataset", "train_size", "epochs", "pretraining", "batch_size", "learning_rate", "shown", "seed")
    return {name: getattr(config, name) for name in names}


def main(config: Config) -> None:
    """Pretrain, train both networks, print one table, write the run folder with its figures."""
    if config.quick:
        config = replace(config, train_size=200, epochs=2, pretraining=2)
    started = time.time()
    images, test = datasets.load(config.dataset, config.folder)
    images = datasets.subsample(images, config.train_size) if config.train_size else images
    test = datasets.subsample(test, 1000) if len(test) > 1000 else test
    run = Run(config.output, science(config), resume=config.resume)
    weights = run.folder / "autoencoder.safetensors"
    if not weights.exists():
        network, decoder = build(config, images)
        autoencoder = nn.Sequential(network.encoder, decoder)
        error = pretrain(config, autoencoder, images)
        save_weights(autoencoder, weights)
        tqdm.write(f"autoencoder: root mean square error {error**0.5:.3f} of a pixel in [0, 1]", file=sys.stderr)
    rows = []
    for method in METHODS:
        folder = config.output / method.replace(" ", "_")
        if not (folder / "summary.json").exists():
            train(config, method, images, test, weights)
        rows.append(read_summary(folder)["results"])
        decoded = torch.load(folder / "decoded.pt", weights_only=True)
        titles = ["original", "encoded", *(f"block {m}" for m in range(1, len(decoded)))]
        pictures = torch.cat([test.x[None, : config.shown], decoded]).transpose(0, 1).numpy()
        figure = plotting.pictures(pictures, titles)
        plotting.save({folder.name: figure}, run.folder / "figures")
    columns: dict[str, Any] = {
        "method": "{method}",
        "test accuracy": lambda row: f"{100 * row['accuracy']:.2f}",
        "action": "{action:.3g}",
        "change of the decoded image (RMS of a pixel)": lambda row: f"{row['change'][-1]:.3f}",
    }
    vanilla, least = rows
    lines = [
        f"after the last block the decoded image has changed by {least['change'][-1]:.3f} with least action, "
        f"{vanilla['change'][-1]:.3f} without (root mean square of a pixel in [0, 1]; one seed)"
    ]
    trainings = [row | {"name": row["method"].replace(" ", "_"), "seed": config.seed} for row in rows]
    print(run.conclude(trainings, ("method",), rows, table(rows, columns), lines, started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
