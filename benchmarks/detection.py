"""What detectors cost on ResNet-56 for CIFAR-10, over a forward pass of the plain network.

    PYTHONPATH=experiments python -m benchmarks.detection --weights FILE --folder DIR --output FILE.json
    PYTHONPATH=experiments python -m benchmarks.detection --table FILE.json

Images of the test set go through the network, their features are taken, and a random forest is fitted to those of clean
and attacked ones and scores them. Rounds take all in turns, on one thread; a figure is the median over rounds of the
processor time, in milliseconds an image, and of its ratio to the forward pass of its round. The whole of a detector is
its features, the statistics of training images that they need, of as many images as are looked at, and its forest.
What the trajectory's features add to a forward pass has a floor, of torch's own operations: to read the states before
and after each step, which have left the processor's cache, and to reduce as many numbers that lie in it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from tabulate import tabulate

from odenets import adapt
from odenets.detection import (
    LID,
    Detector,
    Features,
    Mahalanobis,
    Separation,
    Trajectory,
    in_batches,
    preset,
    run_attack,
)
from odenets.training import datasets
from odenets.training.runs import environment
from solvers import Step

FORWARD, TRAJECTORY = "forward pass", "trajectory"
READ, REDUCE = "floor: reading the states", "floor: reducing them in the cache"
CACHED = 8
"""Images whose states lie in the cache."""
STATISTICS, FOREST = ": statistics", ": forest, fitted and asked"
PUBLISHED = 0.001
"""Input step of the Mahalanobis detector as published [K24, appendix E.2.1]."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        weights: file with the weights of the ResNet, or the folder of all of them.
        folder: where CIFAR-10 lies.
        output: JSON file of the results.
        depth: layers of the network.
        images: of the test set that are looked at, as many that are attacked, and training images for statistics.
        batch_size: images in a pass.
        rounds: in which everything is timed in turns, after one that is not.
        commit: of the code.
        table: print the table of such a file instead.
    """

    weights: Path = Path("cifar10-resnets")
    folder: Path = Path("data")
    output: Path = Path("detection.json")
    depth: int = 56
    images: int = 128
    batch_size: int = 256
    rounds: int = 7
    commit: str = ""
    table: Path | None = None


def kinds() -> dict[str, Features]:
    """Kinds of features by name."""
    return {
        TRAJECTORY: Trajectory(),
        "separation": Separation(),
        "Mahalanobis": Mahalanobis(magnitude=PUBLISHED),
        "Mahalanobis, no input step": Mahalanobis(),
        "LID": LID(),
    }


def works(options: Options) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from lab.pretrained.resnets import load_resnet

    plain, model = (load_resnet(options.depth, options.weights) for _ in range(2))
    plain, model = (each.to(memory_format=torch.channels_last) for each in (plain, model))  # type: ignore[call-overload]
    train, test = (datasets.subsample(part, options.images) for part in datasets.load("cifar10", options.folder))
    network, size = adapt(model, test.x[:2]), options.batch_size
    moved = run_attack(network, preset("FGM"), test.x, test.y, batch_size=size).images
    y = torch.arange(2).repeat_interleave(options.images).numpy()
    with torch.no_grad():
        steps = list(network.steps(test.x))
    result: dict[str, Callable[[], object]] = {
        FORWARD: partial(in_batches, plain, plain, test.x, size),
        READ: partial(read, steps),
        REDUCE: partial(reduce, steps),
    }
    for name, kind in kinds().items():
        kind.fit(network, train.x, train.y)
        call = partial(kind, network)
        X = in_batches(call, network, torch.cat([test.x, moved]), size).numpy()

        def forest(X: Any = X) -> object:
            return Detector(random_state=0).fit(X, y).decision_function(X)

        result[name] = partial(in_batches, call, network, test.x, size)
        result[name + FOREST] = forest
        if type(kind).fit is not Features.fit:
            result[name + STATISTICS] = partial(kind.fit, network, train.x, train.y)
    return result


def read(steps: list[Step]) -> None:
    """All numbers of the states before and after each step, once."""
    for step in steps:
        _ = step.x0.sum(), step.x1.sum()


def reduce(steps: list[Step]) -> None:
    """Difference, norm and sum of states, as many numbers as the steps have, a few in turns."""
    for step in steps:
        x0, x1 = step.x0[:CACHED], step.x1[:CACHED]
        for _ in range(len(step.x0) // CACHED):
            residue = x1 - x0
            _ = residue.norm(), residue.sum()


def measure(options: Options) -> dict[str, Any]:
    """Processor and clock milliseconds of an image, by name a list over rounds."""
    timed, processor, clock = works(options), {}, {}
    for turn in range(options.rounds + 1):
        for name, work in timed.items():
            images = options.images * (2 if name.endswith(FOREST) else 1)
            began = time.process_time(), time.perf_counter()
            work()
            spent = time.process_time() - began[0], time.perf_counter() - began[1]
            if turn:  # the first warms up
                for of, seconds in zip((processor, clock), spent, strict=True):
                    of.setdefault(name, []).append(1e3 * seconds / images)
        print(f"round {turn} of {options.rounds}", flush=True)
    return {"processor": processor, "clock": clock}


def whole(milliseconds: dict[str, list[float]], name: str) -> list[float]:
    """Features, statistics and forest together, by round."""
    parts = [milliseconds[each] for each in (name, name + STATISTICS, name + FOREST) if each in milliseconds]
    return [sum(of) for of in zip(*parts, strict=True)]


def table(measured: dict[str, Any]) -> str:
    """The figures as a table, and where they were measured."""
    of, forward = measured["processor"], measured["processor"][FORWARD]

    def over(one: list[float], other: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(one, other, strict=True))

    names, lines = [name for name in of if FOREST not in name and STATISTICS not in name], []
    for name in names:
        line: list[str] = [name, f"{statistics.median(of[name]):.3f}", f"{over(of[name], forward):.2f}"]
        for part in (STATISTICS, FOREST):
            line.append(f"{statistics.median(of[name + part]):.3f}" if name + part in of else "")
        if name + FOREST in of:
            total = whole(of, name)
            line += [f"{statistics.median(total):.3f}", f"{over(total, whole(of, TRAJECTORY)):.2f}"]
        lines.append(line)
    heads = ["ms an image", "features", "over a forward pass", "statistics", "forest", "whole", "over the trajectory's"]
    by_clock = over(whole(measured["clock"], "Mahalanobis"), whole(measured["clock"], TRAJECTORY))
    where, settings = measured["environment"], measured["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    return "\n\n".join([
        f"ResNet-{settings['depth']}, {settings['images']} images, medians of {settings['rounds']} interleaved rounds, "
        f"processor time, one thread. Whole by the clock, Mahalanobis over the trajectory: {by_clock:.2f}.",
        tabulate(lines, heads, tablefmt="github", disable_numparse=True),
        f"{where['device']}, {where['threads']} thread; {versions}; commit {where['commit']}",
    ])  # fmt: skip


def main(options: Options) -> None:
    """Measure and write the file, or print the table of one."""
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    torch.set_num_threads(1)
    where: dict[str, Any] = environment()
    settings = {name: getattr(options, name) for name in ("depth", "images", "batch_size", "rounds")}
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    where |= {"command": f"python -m benchmarks.detection {given}", "commit": options.commit or where.get("commit")}
    measured = {"environment": where, "settings": settings, **measure(options)}
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
