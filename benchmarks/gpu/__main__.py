"""What kernels, solves and trainings cost on a GPU.

    python -m benchmarks.gpu --output FILE.json
    python -m benchmarks.gpu --table FILE.json

All parts take five minutes on an H100; the trainings are of CIFAR-10.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.gpu.table import tables
from odenets.training.runs import environment

PARTS = ("kernels", "waiting", "trainings", "solves", "compiled", "graphs")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        output: file of the rows.
        parts: kernels, waiting, trainings, solves, compiled (kernels), graphs.
        images: array file with train_x, train_y, test_x and test_y in place of CIFAR-10 by torchvision.
        commit: of the code, for the file.
        device: on a CPU nothing but that it runs can be seen.
        quick: little of everything.
        table: such a file, whose tables are printed; nothing is measured.
    """

    output: Path = Path("gpu.json")
    parts: tuple[str, ...] = PARTS
    images: Path | None = None
    commit: str = ""
    device: str = "cuda"
    quick: bool = False
    table: Path | None = None


def main(options: Options) -> None:
    """Measure, or print the tables of what was measured."""
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return
    from benchmarks.gpu.kernels import kernels
    from benchmarks.gpu.solves import graphs, solves, waiting
    from benchmarks.gpu.training import trainings

    parts: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "kernels": kernels, "solves": solves, "waiting": waiting, "graphs": graphs,
        "trainings": partial(trainings, file=options.images), "compiled": partial(kernels, people=("compiled",)),
    }  # fmt: skip
    measured: dict[str, Any] = {"environment": environment() | {"commit": options.commit, "cuda": torch.version.cuda}}
    for name in options.parts:
        measured[name] = rows = []
        started = time.perf_counter()
        try:
            for row in parts[name](options.device, quick=options.quick):
                rows.append(row)
                save(measured, options.output)
        except Exception:  # the other parts are measured all the same
            measured[f"{name} failed"] = traceback.format_exc()
            print(measured[f"{name} failed"], flush=True)
        measured[f"{name} seconds"] = time.perf_counter() - started
        print(f"{name}: {len(rows)} rows in {measured[f'{name} seconds']:.0f} s", flush=True)
        save(measured, options.output)


def save(measured: dict[str, Any], file: Path) -> None:
    """Write what there is by now."""
    file.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(tyro.cli(Options, description=__doc__))
