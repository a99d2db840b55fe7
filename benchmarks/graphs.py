"""Adaptive solves as one graph, beside the loop on the host, torchdiffeq and diffrax, over their field calls.

    python -m benchmarks.graphs --output FILE.json
    python -m benchmarks.graphs --table FILE.json ...

Every solver of a case is timed once a round, for some hundredths of a second, and so is the floor: as many bare calls
of the field as ``integrate`` makes. A figure is the median over rounds of a solver's time over the floor's in a round.
diffrax needs ``pip install diffrax``; its field is the same network with the same weights, compiled by XLA.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
import tyro
from tabulate import tabulate
from torch import Tensor

from benchmarks.gpu.timing import waits
from odenets.command.speed.fields import FIELDS, Field, calls, make
from odenets.command.speed.solves import passes
from odenets.training.runs import environment
from solvers import Tolerance, integrate
from solvers.graph.compilation import WRITES

RTOL, ATOL = 1e-3, 1e-6
WHO = ("graph", "integrate", "torchdiffeq", "diffrax", "graph per sample", "integrate per sample")
SHORTEST = 0.02
"""Seconds of a solver in a round, at least."""
METHODS = ("bosh3", "dopri5")
FIRST = """
import sys, time
import torch
torch.set_num_threads(1)
if sys.argv[1] == "warm":  # what any first compilation takes: the compiler's own checks, headers
    torch.compile(lambda x: x.sin() + 1)(torch.ones(9, device=sys.argv[3]))
from benchmarks.graphs import solver_of
from benchmarks.gpu.timing import waits
from odenets.command.speed.fields import FIELDS, make
from odenets.command.speed.solves import passes
field, x = make(FIELDS[0], sys.argv[3])
x.requires_grad_(sys.argv[2] == "True")
run = passes(solver_of("graph", "bosh3", field, x), sys.argv[2] == "True")
started = time.perf_counter()
run()
print(time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        output: file of the rows.
        seconds: of each case.
        device: cpu or cuda.
        threads: of torch and XLA.
        fields: first letters of the fields.
        methods: bosh3, dopri5.
        first: whether the first call is timed too, in new processes.
        commit: of the code, where it lies in no repository.
        table: such files, whose tables are printed; nothing is measured.
    """

    output: Path = Path("graphs.json")
    seconds: float = 8.0
    device: str = "cpu"
    threads: int = 1
    fields: str = "abc"
    methods: tuple[str, ...] = METHODS
    first: bool = True
    commit: str = ""
    table: tuple[Path, ...] = ()


def solver_of(who: str, method: str, field: Field, x: Tensor) -> Callable[[], Tensor]:
    """A solve from 0 to 1 that ends with the last state."""
    if who == "torchdiffeq":
        ends = torch.tensor([0.0, 1.0], device=x.device)
        peer: Any = torchdiffeq.odeint
        return lambda: peer(field, x, ends, rtol=RTOL, atol=ATOL, method=method)[-1]
    options: dict[str, Any] = {
        "solver": "bs23" if method == "bosh3" else method, "tolerance": Tolerance(RTOL, ATOL), "keep": "last",
        "graph": who.startswith("graph"), "control": "sample" if who.endswith("per sample") else "batch",
    }  # fmt: skip
    return lambda: integrate(field, x, 0.0, 1.0, **options).x1


def diffrax_of(method: str, field: Any, x: Tensor, backward: bool) -> tuple[Callable[[], object], int]:
    """diffrax's solve, or its gradient for weights and state, compiled by XLA; and the steps that it takes."""
    diffrax, jax, jnp = (import_module(name) for name in ("diffrax", "jax", "jax.numpy"))
    pairs = [tuple(jnp.asarray(p.detach().cpu().numpy()) for p in layer.parameters()) for layer in field.network]
    weights = [pair for pair in pairs if pair]

    def layer(weight: Any, bias: Any, y: Any) -> Any:
        if weight.ndim == 2:
            return y @ weight.T + bias
        names = ("NCHW", "OIHW", "NCHW")
        out = jax.lax.conv_general_dilated(y, weight, (1, 1), [(1, 1), (1, 1)], dimension_numbers=names)
        return out + bias[None, :, None, None]

    def velocity(t: Any, y: Any, weights: Any) -> Any:
        (one, b), (other, c) = weights
        return layer(other, c, jax.nn.relu(layer(one, b, y)))

    term, rule = diffrax.ODETerm(velocity), {"bosh3": diffrax.Bosh3, "dopri5": diffrax.Dopri5}[method]()
    control = diffrax.PIDController(rtol=RTOL, atol=ATOL)

    def solve(weights: Any, y: Any) -> Any:
        return diffrax.diffeqsolve(term, rule, 0.0, 1.0, None, y, weights, stepsize_controller=control)

    def last(weights: Any, y: Any) -> Any:
        return solve(weights, y).ys[-1]

    y = jnp.asarray(x.detach().cpu().numpy())
    gradient = jax.grad(lambda weights, y: last(weights, y).sum(), argnums=(0, 1))
    work = jax.jit(gradient if backward else last)
    steps = int(jax.jit(lambda weights, y: solve(weights, y).stats["num_steps"])(weights, y))
    return lambda: jax.block_until_ready(work(weights, y)), steps


def case(name: str, method: str, backward: bool, options: Options) -> Iterator[dict[str, Any]]:
    """A row for each solver."""
    field, x = make(name, options.device)
    x.requires_grad_(backward)
    stats = {}
    for who in ("integrate", "integrate per sample"):
        control: Any = "sample" if who.endswith("per sample") else "batch"
        solver = "bs23" if method == "bosh3" else method
        with torch.no_grad():
            solution = integrate(field, x, 0.0, 1.0, solver=solver, tolerance=Tolerance(RTOL, ATOL), control=control)
        stats[control] = solution.stats
    n = stats["batch"].evaluations
    works: dict[str, Callable[[], object]] = {"floor": passes(lambda: calls(field, x, n), backward)}
    steps: dict[str, int] = {}
    for who in WHO:
        if backward and who.startswith("graph") and not WRITES:
            continue  # this torch has no graph with a gradient
        if who == "diffrax":
            if find_spec("diffrax") is None:
                continue
            works[who], steps[who] = diffrax_of(method, field, x, backward)
        else:
            works[who] = passes(solver_of(who, method, field, x), backward)
            count = stats["sample" if who.endswith("per sample") else "batch"]
            steps[who] = count.accepted + count.rejected
    for work in works.values():
        for _ in range(3):
            work()
    taken: dict[str, list[float]] = {who: [] for who in works}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(taken["floor"]) < 5:
        for who, work in works.items():
            taken[who].append(_seconds(work, x.is_cuda))
    for who, seconds in taken.items():
        ratios = [one / floor for one, floor in zip(seconds, taken["floor"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        counted = {"waits": waits(works[who])} if x.is_cuda and who in steps and who != "diffrax" else {}
        yield counted | {
            "field": name, "method": method, "backward": backward, "who": who, "evaluations": n,
            "steps": steps.get(who), "rounds": len(seconds), "seconds": statistics.median(seconds), "ratio": middle,
            "quartiles": [low, high],
        }  # fmt: skip


def _seconds(work: Callable[[], object], cuda: bool) -> float:
    """Of a call, the mean of some in a row."""
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < SHORTEST:
        work()
        if cuda:
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - started) / count


def first_calls(device: str) -> Iterator[dict[str, Any]]:
    """Seconds of the first solve of a process, of the first field: compiled, and from what is kept on disk."""
    here = Path(__file__).parents[1]
    for backward in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            for kept in (False, True):
                variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": str(here)}
                command = [sys.executable, "-c", FIRST, "cold" if kept else "warm", str(backward), device]
                done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=here)
                yield {"backward": backward, "kept": kept, "seconds": float(done.stdout.split()[-1])}


def table(measured: dict[str, Any]) -> str:
    """The rows as tables, and where they were measured."""
    rows, where = measured["rows"], measured["environment"]
    found: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["field"], row["method"], row["backward"]), {})[row["who"]] = row
    who = [each for each in WHO if any(each in row for row in found.values())]
    lines = []
    for (name, method, backward), cells in found.items():
        floor, peer = cells["floor"], cells["torchdiffeq"]["seconds"]
        shown = [_cell(cells[each]) if each in cells else "" for each in who]
        times = ", ".join(f"{peer / cells[each]['seconds']:.1f}" for each in ("graph", "integrate") if each in cells)
        kind = "with gradients" if backward else "forward"
        lines.append([name, kind, method, f"{1e6 * floor['seconds']:.0f} ({floor['evaluations']})", *shown, times])
    heads = ["field", "", "method", "field calls (µs)", *who, "torchdiffeq / graph, / integrate"]
    text = [
        "Time over that of the field calls alone (accepted and rejected steps, on a GPU how often the solve waits for "
        f"it); medians of interleaved rounds, rtol {RTOL:g}, atol {ATOL:g}.",
        tabulate(lines, heads, tablefmt="github", disable_numparse=True),
    ]
    if measured["first"]:
        cells = [
            ["with gradients" if row["backward"] else "forward", "from disk" if row["kept"] else "compiled",
             f"{row['seconds']:.1f}"] for row in measured["first"]
        ]  # fmt: skip
        text += [
            "Seconds of the first solve of a process, bosh3 of the first field; where it is compiled another function "
            "was compiled before.",
            tabulate(cells, ["", "", "seconds"], tablefmt="github", disable_numparse=True),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    text.append(f"{where['device']}, {where['threads']} thread(s); {versions}; commit {where['commit']}")
    return "\n\n".join(text)


def _cell(row: dict[str, Any]) -> str:
    waits = f", {row['waits']} waits" if "waits" in row else ""
    return f"{row['ratio']:.2f} ({row['steps']}{waits})"


def main(options: Options) -> None:
    """Measure, or print the tables of what was measured."""
    if options.table:
        print("\n\n".join(table(json.loads(path.read_text())) for path in options.table))
        return
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    where = environment()
    where["versions"]["torchdiffeq"] = torchdiffeq.__version__
    if find_spec("diffrax"):
        where["versions"] |= {name: import_module(name).__version__ for name in ("diffrax", "jax")}
    where |= {"commit": options.commit or where.get("commit"), "threads": options.threads}
    measured: dict[str, Any] = {"environment": where, "rows": [], "first": []}
    if options.first:
        measured["first"] = list(first_calls(options.device))
    for name in (each for each in FIELDS if each[0] in options.fields):
        for method in options.methods:
            for backward in (False, True):
                measured["rows"] += case(name, method, backward, options)
                options.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
