"""Train on a seeded DataLoader, in processes that may kill themselves at a batch, and tell how each ended.

They are forked, after all imports.
"""

import os
import random
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
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
        fabric=Fabric(accelerator="cpu", devices=1),
    )
    (folder / "weights.txt").write_text(fingerprint(network))


def ended(folder: Path, workers: int, at: int) -> int:
    """How a training of its own process ended: 0, or the signal that killed it, negative."""
    child = os.fork()
    if child == 0:
        try:
            main(folder, workers, at)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ends = [ended(folder / "whole", workers, 0)]
    ends += [ended(folder / "killed", workers, int(at)) for at in (*sys.argv[3:], 0)]
    print(*ends)
