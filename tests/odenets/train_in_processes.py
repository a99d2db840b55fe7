"""Train a small network in as many processes as ``torchrun`` starts, and let the first one write what came out."""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from odenets import data, models, save_weights
from odenets.least_action import LeastAction
from odenets.training import fit


def main(folder: Path, **fabric: object) -> None:
    torch.set_num_threads(1)
    launcher = Fabric(accelerator="cpu", **fabric)
    launcher.launch()
    train, test = data.load("digits")
    parts = data.split(train, test, size=250)
    torch.manual_seed(0)
    network = models.small_network(features=8, solver="euler", h=1.0, depth=2)
    objective = LeastAction(tau=0.5, every=3)
    training = fit(
        network,
        data.Batches(parts.train, 33, seed=0),
        epochs=3,
        optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.02, momentum=0.9),
        objective=objective,
        clip_norm=1.0,
        fabric=launcher,
    )
    if launcher.is_global_zero:
        save_weights(network, folder / "weights.safetensors")
        row = training.rows[-1]
        found = [objective.multiplier.item(), row["train_loss"], row["train_accuracy"], row["evaluations"]]
        (folder / "found.txt").write_text(" ".join(map(str, found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), devices=2, strategy="ddp")
