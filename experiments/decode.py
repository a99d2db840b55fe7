"""What a network's states look like: a decoder shows the state after each block [K24, section F.2, Figs 28 to 32].

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

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from lab import images
from lab.config import ImageConfig, check_at_least
from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.networks import resnet9_decoder
from lab.training import Progress
from odenets import Network, load_weights, measures, plotting, save_weights
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective
from odenets.transport import states_of

METHODS = ("vanilla", "least action")
SETTINGS = {"digits": (5.0, 1.0, 5), "mnist": (5.0, 1.0, 5), "cifar10": (10.0, 0.1, 50)}  # lambda0, tau, s of F.2


@dataclass(frozen=True)
class Config(ImageConfig):
    """What to train.

    Attributes:
        train_size: training images; all if 0.
        epochs: of the network.
        pretraining: epochs of the autoencoder.
        batch_size: of both.
        learning_rate: of SGD with momentum 0.9, for the network.
        shown: images in the figure.
        seed: of everything.
    """

    train_size: int = 0
    epochs: int = 20
    pretraining: int = 30
    batch_size: int = 64
    learning_rate: float = 0.01
    shown: int = 6
    seed: int = 0
    output: Path = Path("runs/decode")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "shown")


@dataclass(frozen=True)
class Job:
    """The training of the autoencoder, or of a network on its encoder by one of the methods."""

    method: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.method.replace(" ", "_")


def jobs(config: Config) -> Jobs[Job]:
    """The autoencoder, then both networks."""
    yield [Job("autoencoder")]
    return (yield [Job(method) for method in METHODS])


def parts_of(config: Config) -> tuple[TensorData, TensorData]:
    """Training images, and test images, at most 1000."""
    train, test = images.train_and_test(config.dataset, config.folder, config.train_size)
    return train, datasets.subsample(test, 1000) if len(test) > 1000 else test


def build(config: Config, dataset: TensorData) -> tuple[Network, nn.Sequential]:
    """ResNet-9 and the decoder of its states."""
    network = images.resnet9(dataset, config.seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    return network, resnet9_decoder(channels, features=images.FEATURES[config.dataset], size=size)


def pretrain(config: Config, autoencoder: nn.Module, train: TensorData, report: Report) -> float:
    """Train the autoencoder on images alone; the mean squared error of the last epoch."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    batches, error = Batches(train, config.batch_size, seed=config.seed), torch.zeros(())
    for epoch in range(config.pretraining):
        error = torch.zeros(())
        for x, _ in batches.epoch(epoch):
            loss = F.mse_loss(autoencoder(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = error + loss.detach() * len(x)
        report(1)
    return (error / len(train)).item()


def objective(config: Config, method: str) -> Objective:
    """What a method minimizes."""
    lambda0, tau, every = SETTINGS[config.dataset]
    return LeastAction(lambda0=lambda0, tau=tau, every=every) if method == "least action" else CrossEntropy()


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train the autoencoder, or the blocks of one network on its frozen encoder."""
    train, test = parts_of(config)
    network, decoder = build(config, train)
    autoencoder = nn.Sequential(network.encoder, decoder)
    if job.method == "autoencoder":
        error = pretrain(config, autoencoder, train, report)
        save_weights(autoencoder, run.folder / "weights.safetensors")
        return {"error": error**0.5}
    load_weights(autoencoder, config.output / "autoencoder" / "weights.safetensors")
    network.encoder.requires_grad_(False).eval()  # fit leaves its batch norms their statistics
    fit(
        network,
        Batches(train, config.batch_size, seed=config.seed),
        epochs=config.epochs,
        optimizer=lambda parameters: torch.optim.SGD(
            [p for p in parameters if p.requires_grad], config.learning_rate, momentum=0.9, weight_decay=1e-4
        ),
        objective=objective(config, job.method),
        callbacks=[Progress(report, run)],
        run=run,
    )
    decoder.eval()
    with torch.no_grad():
        decoded = torch.stack([decoder(state) for state in states_of(network, test.x)])
        action = network.eval().record(test.x, action=measures.action)[1]["action"]
    change = (decoded[1:] - decoded[:1]).square().flatten(2).mean(2).sqrt().mean(1)
    save_weights(network, run.folder / "weights.safetensors")
    torch.save(torch.cat([test.x[None], decoded])[:, : config.shown].clone(), run.folder / "decoded.pt")
    accuracy = evaluate(network, Batches(test, 500)).accuracy
    return {"accuracy": accuracy, "action": action.sum(0).mean().item(), "change": change.tolist()}


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method."""
    return [{name: r[name] for name in ("method", "accuracy", "action", "change")} for r in results]


COLUMNS: Columns = {
    "method": "{method}",
    "test accuracy": lambda row: f"{100 * row['accuracy']:.2f}",
    "action": "{action:.3g}",
    "change of the decoded image (RMS of a pixel)": lambda row: f"{row['change'][-1]:.3f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in a sentence."""
    vanilla, least = outcome.rows
    return [
        f"after the last block the decoded image has changed by {least['change'][-1]:.3f} with least action, "
        f"{vanilla['change'][-1]:.3f} without (root mean square of a pixel in [0, 1]; one seed)"
    ]


def figures(config: Config, outcome: Outcome) -> Figures:
    """Images, decoded after each block, a figure per method."""

    def pictures(name: str) -> Figure:
        decoded = torch.load(outcome.file(f"{name}/decoded.pt"), weights_only=True)
        titles = ["original", "encoded", *(f"block {m}" for m in range(1, len(decoded) - 1))]
        return plotting.pictures(decoded.transpose(0, 1).numpy(), titles)

    return {Job(method).name: partial(pictures, Job(method).name) for method in METHODS}


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, train_size=200, epochs=2, pretraining=2),
    seeds=lambda config, job: (config.seed,),
    cost=lambda config, job: config.pretraining if job.method == "autoencoder" else config.epochs,
    keys=("method",),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
