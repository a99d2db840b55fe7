"""Train on a seeded DataLoader, kill oneself at a batch, and write the weights' digest in the end."""

import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from odenets import models
from odenets.checkpoints import fingerprint
from odenets.least_action import LeastAction
from odenets.training import BestWeights, EarlyStopping, Run, fit


class Noisy(Dataset):
    """Images that are never twice the same."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return (torch.rand(1, 8, 8) + random.random()) / 2, i % 10


class Killing(LeastAction):
    """Kills its process after so many batches."""

    def __init__(self, at: int) -> None:
        super().__init__(every=2)
        self.left = at

    def after_step(self, network, batch):
        super().after_step(network, batch)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, workers: int, at: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # all that is drawn comes from seeds below, or from the checkpoint
    loader = DataLoader(
        Noisy(), 6, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1), drop_last=True
    )
    run = Run(folder, {}, resume=True)
    if not (folder / "resume.pt").exists():
        torch.manual_seed(0), random.seed(0)
    network = models.small_network(features=4, solver="euler", h=1.0, depth=2)
    fit(
        network,
        loader,
        epochs=5,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=20),
        lr_interval="step",
        objective=Killing(at),
        validation=loader,
        callbacks=[BestWeights(), EarlyStopping(patience=5)],
        run=run,
    )
    (folder / "weights.txt").write_text(fingerprint(network))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
