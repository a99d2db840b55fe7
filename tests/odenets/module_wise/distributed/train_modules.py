"""Train modules in as many processes as ``torchrun`` starts; each writes its weights and metrics."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from odenets import models, save_weights
from odenets.module_wise import fit_in_processes, infopro, split_into_modules, trgl_multipliers
from odenets.training import data, datasets
from odenets.training.runs import Run

DIGITS = datasets.subsample(datasets.load("digits")[0], 120)
BATCHES = data.Batches(DIGITS, 40, seed=0)
EPOCHS = 4
OBJECTIVE = trgl_multipliers(every=2)


def network(dtype="float32"):
    torch.manual_seed(0)
    net = models.resnet9(1, 10, features=8, size=8, depth=4, norm="group").to(getattr(torch, dtype))
    return split_into_modules(net, 4, DIGITS.x[:4], local_loss=None if dtype == "float32" else infopro())


class Troubled(torch.optim.SGD):
    """SGD that leaves a file at its process' last step, waits for one at the third, or kills its process at some."""

    steps = 0

    def __init__(self, parameters, last="", wait="", kill=0):
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.last, self.wait, self.kill = last, wait, kill

    def step(self, closure=None):  # type: ignore[override]
        Troubled.steps += 1
        if self.last and Troubled.steps == 2 * EPOCHS * len(BATCHES):  # of two modules
            Path(self.last).touch()
        if self.wait and Troubled.steps == 3:  # of the second batch
            deadline = time.monotonic() + 300
            while not Path(self.wait).exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("the other process has not ended")
                time.sleep(0.05)
        if Troubled.steps == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


def main(folder: Path, trouble: dict, options: dict, dtype: str = "float32") -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    modules = network(dtype)
    run = Run(folder, {}, resume=True)
    rows = fit_in_processes(modules, BATCHES, epochs=EPOCHS, optimizer=partial(Troubled, **trouble.get(str(rank), {})),
                            objective=OBJECTIVE, run=run, timeout=600, **options)  # fmt: skip
    save_weights(modules, folder / f"weights{rank}.safetensors")
    (folder / f"rows{rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:])
