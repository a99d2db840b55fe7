"""The speed of solves and networks over their floors, here and in another checkout, in turns.

    python -m benchmarks.ratios
    python -m benchmarks.ratios --against ../before --rounds 40

Each tree has a process of its own and both take every case in turns: what else the machine does meets both. A figure
is the median over rounds of the processor time of a case (on several threads the time of the clock) over that of its
floor: the bare calls of its fields, the bare network, or copies of the tensors that a reduction reads and writes. With
another checkout also the median of the ratios of one to the other, round by round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from tabulate import tabulate
from torch import Tensor

SHORTEST = 0.03
"""Seconds of a round, at least: work and floor are taken again and again, in turns."""

Case = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        against: another checkout of this repository.
        rounds: of each case.
        only: cases whose name holds this.
        threads: of either process.
    """

    against: Path | None = None
    rounds: int = 20
    only: str = ""
    threads: int = 1


def cases() -> dict[str, Case]:
    """By name: a piece of work and its floor."""
    return solves() | networks() | undone() | schemes() | adapted() | reductions()


def solves() -> dict[str, Case]:
    """Solves of the three fields, over as many bare calls."""
    from benchmarks.bench_solvers import (
        FIELDS,
        calls,
        evaluations,
        make,
        passes,
        prepare,
    )  # where each checkout has them

    ways = [("bs23", "integrate"), ("rk4", "integrate"), ("dopri5", "integrate"), ("dopri5", "integrate per sample")]
    result = {}
    for name in FIELDS:
        for method, who in [*ways, ("dopri5", "odeint"), ("dopri5", "torchdiffeq")]:
            for backward in (False, True):
                field, x = make(name, "cpu")
                x.requires_grad_(backward)
                run = prepare(method, who, field, x)
                n = evaluations(field, run)
                floor = passes(lambda field=field, x=x, n=n: calls(field, x, n), backward)
                label = f"{who}, {method}, {name.split(':')[0]}, {'with gradients' if backward else 'forward'}"
                result[label] = passes(run, backward), floor
    return result


def networks() -> dict[str, Case]:
    """Networks that are measured, over the same without."""
    from torchvision.models import resnet18

    from odenets import Flow, adapt, measures, models

    images, vectors = torch.randn(16, 3, 32, 32), torch.randn(512, 128)
    result = {}
    for name, network in {
        "flow of MLPs, BS23": Flow(solver="bs23", depth=4),
        "ResNet-9, Euler": models.resnet9(3, 10, size=32, solver="euler"),
        "ResNet-9, BS23": models.resnet9(3, 10, size=32, solver="bs23"),
        "small network, BS23": models.small_network(3, 10, size=32, solver="bs23", depth=4),
        "adapted ResNet-18": adapt(resnet18(num_classes=10), images[:2]),
    }.items():
        x = vectors if isinstance(network, Flow) else images

        def train(network: torch.nn.Module = network, x: Tensor = x, **recorded: object) -> None:
            output, records = network.record(x, **recorded)  # type: ignore[operator] - a Recorder
            loss = output.square().mean() + sum(values.mean() for values in records.values())
            loss.backward()

        result[f"{name}, action in a training step"] = lambda train=train: train(action=measures.action), train
    return result


def undone() -> dict[str, Case]:
    """A training step of a hundred blocks whose states are computed again, over one that keeps them."""
    from benchmarks.bench_solvers import passes
    from odenets import ConvField, Flow
    from odenets.schemes import CoupledHalves, Hamiltonian, Momentum, RevNet, SecondOrder

    x, result = torch.randn(16, 16, 16, 16), {}
    for scheme in (RevNet(), Hamiltonian(), SecondOrder(), Momentum()):
        field = ConvField(8 if isinstance(scheme, CoupledHalves) else 16)
        flow = Flow(field, solver=scheme, depth=100)
        keeping: Any = Flow.of([*flow.blocks], solver=replace(scheme, reversible=False))  # type: ignore[list-item]
        result[f"{scheme.name}, undone"] = passes(partial(flow, x), True), passes(partial(keeping, x), True)
    return result


def schemes() -> dict[str, Case]:
    """The solve of an IMEX step, over a dense convolution of the same images; a record of the action, over a pass."""
    from odenets import ConvField, Flow, measures
    from odenets.schemes import ImplicitExplicit
    from odenets.schemes.names import SCHEMES

    scheme, result = ImplicitExplicit(channels=64), {}
    operator, dense = scheme.learned(0, 1), torch.nn.Conv2d(64, 64, 3, padding=1)
    for batch in (16, 32):
        v = torch.randn(batch, 64, 32, 32)

        def work(v: Tensor = v) -> None:
            with torch.no_grad():
                scheme.residue([lambda t, x: x], operator, 0.0, v, 0.1)

        def floor(v: Tensor = v) -> None:
            with torch.no_grad():
                dense(v)

        result[f"IMEX solve, {batch} images, over a convolution"] = work, floor
    x = torch.randn(8, 64, 32, 32)
    for name, one in SCHEMES.items():
        channels = one.fields_see(x).shape[1]
        flow = Flow(lambda channels=channels: ConvField(channels), solver=name, depth=4, h=0.1).eval()
        record = partial(flow.record, x, action=measures.action)
        result[f"{name}, record(action)"] = _without_gradients(record), _without_gradients(partial(flow, x))
    return result


def _without_gradients(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            work()

    return run


def adapted() -> dict[str, Case]:
    """Features of a detector, and the search for steps, over a forward pass of the plain model."""
    from benchmarks.bench_adapting import MODELS, work

    made = cache(work)  # when it is first asked for: some of the models are large

    def case(name: str, what: str) -> Case:
        return (lambda: made(name)[what]()), (lambda: made(name)["forward pass"]())

    return {f"{name}, {what}": case(name, what) for name in MODELS for what in ("features", "finding")}


def reductions() -> dict[str, Case]:
    """Reductions and the finish of a step, over copies of what they read and write at least."""
    from solvers import combine, finish_step, get_tableau
    from solvers.reductions import displaced, mean_square, mean_square_and_cosine, weighted_action

    bs23, euler, weights = get_tableau("bs23"), get_tableau("euler"), (2 / 9, 1 / 3, 4 / 9)

    def finish(x0: Tensor, *p: Tensor, **reductions: bool) -> list[Tensor]:
        x1, values = finish_step(x0, p, euler if len(p) == 1 else bs23, 1.0, action=True, **reductions)
        return [x for x in (x1, *values.values()) if x is not None]

    operations: dict[str, tuple[int, int, Callable[..., Sequence[Tensor]]]] = {  # read, written, the operation
        "mean square": (1, 0, lambda r: [mean_square(r)]),
        "mean square and cosine": (1, 0, mean_square_and_cosine),
        "displacement, mean square and cosine": (2, 0, displaced),
        "action of three stages": (3, 0, lambda *p: [weighted_action(p, weights, 0.1)]),
        "combination of three stages": (4, 1, lambda x, *p: [combine(x, p, weights, 0.1)]),
        "Euler step with action": (2, 1, finish),
        "BS23 step with action": (4, 1, finish),
        "BS23 step with action and error": (5, 1, partial(finish, error=True)),
    }
    result = {}
    for size, batch in (("3 MB", 32), ("13 MB", 128), ("51 MB", 500)):
        for name, (reads, writes, operation) in operations.items():
            for backward in (False, True):
                label = f"{name}, {size}, {'with gradients' if backward else 'forward'}"
                result[label] = _reduction(operation, (batch, 100, 16, 16), reads, writes, backward)
    return result


@cache
def _operands(shape: tuple[int, ...], gradients: bool) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=gradients) for _ in range(6)]


def _reduction(
    operation: Callable[..., Sequence[Tensor]], shape: tuple[int, ...], reads: int, writes: int, backward: bool
) -> Case:
    def work() -> None:
        operands = _operands(shape, backward)[:reads]
        values = operation(*operands)
        if backward:
            torch.autograd.grad([v.sum() for v in values], operands)

    def floor() -> None:
        to, *operands = _operands(shape, False)
        for i in range(max(1, (reads + writes) * (2 if backward else 1) // 2)):
            to.copy_(operands[i % 5])

    return work, floor


def serve() -> None:
    """Take cases from the standard input by name, and answer with the time of its work over that of its floor."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    served = cases()
    print("\t".join(served), flush=True)
    for line in sys.stdin:
        work, floor = served[line.rstrip("\n")]
        seconds, spent = [0.0, 0.0], 0.0
        while spent < SHORTEST:
            for i, part in enumerate((floor, work)):
                begin = clock()
                part()
                seconds[i] += clock() - begin
            spent = sum(seconds)
        print(seconds[1] / seconds[0], flush=True)


class Tree:
    """A checkout and the process that runs its code."""

    def __init__(self, folder: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        code = f"import runpy, sys; runpy.run_path({__file__!r}, run_name='serve')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.names = self._line().split("\t")

    def _line(self) -> str:
        assert self.process.stdout is not None  # it is a pipe
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a checkout ended with {self.process.wait()}")
        return line.rstrip("\n")

    def time(self, name: str) -> float:
        """The work of a case over its floor."""
        assert self.process.stdin is not None  # it is a pipe
        print(name, file=self.process.stdin, flush=True)
        return float(self._line())


def main(options: Options) -> None:
    """Print a table of ratios."""
    here = Path(__file__).parents[1]
    folders = [here, options.against.resolve()] if options.against else [here]
    trees = [Tree(folder, options.threads) for folder in folders]
    names = [name for name in trees[0].names if options.only in name and all(name in tree.names for tree in trees)]
    for tree in trees:  # warm
        for name in names:
            tree.time(name)
    ratios = {name: [[tree.time(name) for tree in trees] for _ in range(options.rounds)] for name in names}
    lines = []
    for name, rounds in ratios.items():
        cells = [f"{statistics.median(values):.3f}" for values in zip(*rounds, strict=True)]
        if options.against:
            quotients = [one / other for one, other in rounds]
            low, middle, high = statistics.quantiles(quotients, n=4)
            cells += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append([name, *cells])
    heads = ["here"] + (["there", "here / there", "quartiles"] if options.against else [])
    print(tabulate(lines, ["time over that of the floor", *heads], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
elif __name__ == "serve":
    serve()
