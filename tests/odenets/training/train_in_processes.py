"""Train small networks in as many processes as ``torchrun`` starts, and write what came out."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from odenets import Flow, Network, models, save_weights
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.fields import ConvField
from odenets.least_action import LeastAction
from odenets.training import data, datasets
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy
from odenets.training.runs import Run


def parts() -> data.Split:
    return datasets.split(*datasets.load("digits"), size=250)


sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def main(folder: Path, launcher: Fabric) -> None:
    """The first process writes weights and figures."""
    torch.manual_seed(0)
    network = models.small_network(features=8, solver="euler", h=1.0, depth=2).double()
    train = parts().train
    objective, batches = LeastAction(tau=0.5, every=3), data.Batches(replace(train, x=train.x.double()), 33, seed=0)
    training = fit(network, batches, epochs=3, optimizer=sgd, objective=objective, clip_norm=1.0, fabric=launcher)
    if launcher.is_global_zero:
        save_weights(network, folder / "weights.safetensors")
        row = training.rows[-1]
        figures = [objective.multiplier.item(), row["train_loss"], row["train_accuracy"], row["evaluations"]]
        (folder / "figures.txt").write_text(" ".join(map(str, figures)))


def two_flows(depth: int = 1) -> Network:
    """With batch norms."""
    flows = [Flow(lambda: ConvField(4, norm="batch"), depth=depth, solver="bs23") for _ in range(2)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10))
    return Network(nn.Conv2d(1, 4, 3, padding=1), flows, head, transitions=[nn.Identity()])


class Starting(CrossEntropy):
    """Wants to be told at which row each flow begins."""

    def loss(self, network, batch, output, records):
        assert records.starts == (0, network.flows[0].depth)
        return super().loss(network, batch, output, records)


def adaptive(folder: Path, launcher: Fabric) -> None:
    """Blocks are duplicated after the first epochs; begun anew after two of four, with one run folder.

    Each process writes weights, and depth and validation loss after each epoch.
    """
    held = parts()
    inputs = data.Batches(held.validation, 100).inputs
    for epochs in (2, 4):
        torch.manual_seed(epochs)
        network = two_flows()
        training = fit(
            network,
            data.Batches(held.train, 33, seed=0),
            epochs=epochs,
            optimizer=sgd,
            objective=Starting(),
            validation=data.Batches(held.validation, 100),
            callbacks=[AdaptiveDepth(DepthRule(1e-7, max_depth=4), inputs, until=3)],
            run=Run(folder / "run", {}, resume=True) if launcher.is_global_zero else None,
            fabric=launcher,
        )
    save_weights(network, folder / f"adaptive_{launcher.global_rank}.safetensors")
    depths = [(row["depth"], row["validation_loss"]) for row in training.rows]
    (folder / f"adaptive_{launcher.global_rank}.json").write_text(json.dumps(depths))


if __name__ == "__main__":
    torch.set_num_threads(1)
    launcher = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    launcher.launch()
    main(Path(sys.argv[1]), launcher)
    adaptive(Path(sys.argv[1]), launcher)
