"""Train conditioned modules that regress in as many processes as ``torchrun`` starts; each writes its rows."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F

from odenets import save_weights
from odenets.module_wise import fit_in_processes
from odenets.training import Run, Task
from tests.odenets.module_wise.conditioned import loader, modules, pair

OPTIONS = {
    "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12),
    "lr_interval": "step",
    "objective": lambda k, K: Task(F.mse_loss),
    "metric": F.l1_loss,
    "collate": pair,
}


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    split = modules()
    rows = fit_in_processes(split, loader(), epochs=epochs, run=Run(folder, {}, resume=True), **OPTIONS)
    rank = distributed.get_rank()
    save_weights(split, folder / f"weights{rank}.safetensors")
    (folder / f"rows{rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
