"""Implicit and reversible solves: beside SciPy's Radau, over their floor, and over gradients through the steps.

    python -m benchmarks.implicit --output FILE.json
    python -m benchmarks.implicit --table FILE.json

Three tables. Stiff problems, a batch of 64 samples with parameters of their own: the time of one solve with steps per
sample, of diffrax's, and of SciPy's Radau sample by sample with the exact Jacobian, and the largest relative error of a
component at the end, against Radau at a tight tolerance. One implicit step over its floor: its Jacobian, its
factorization with as many solutions, and its field calls, taken alone. Reversible gradients over direct ones: the time
of both passes, in turns, and the peak of memory with 10 and 1,000 steps.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from scipy.integrate import solve_ivp
from tabulate import tabulate
from torch import Tensor, nn

from odenets.analysis.memory import measure_memory
from odenets.training.runs import environment
from solvers import RootFinder, Tolerance, get_tableau, integrate
from solvers.implicit.linear import Dense, jacobian
from solvers.implicit.steps import ImplicitSteps

D = torch.float64
POINTS = 100


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        output: JSON file of the results.
        batch: samples of each stiff problem.
        rounds: of what is timed in turns.
        turns: the same for stiff problems, after one that is not timed.
        samples: how many of the batch the errors are measured on, and SciPy is timed on, for the batch in proportion.
        only: one of the tables alone.
        commit: of the code.
        table: print the tables of such a file instead.
    """

    output: Path = Path("implicit.json")
    batch: int = 64
    rounds: int = 15
    turns: int = 3
    samples: int = 8
    only: Literal["overhead", "reversible", "stiff"] | None = None
    commit: str = ""
    table: Path | None = None


def robertson(t: Any, x: Tensor, k: Tensor) -> Tensor:
    """Three species."""
    a, b, c = x.unbind(1)
    lost, quick = k[:, 0] * a - k[:, 1] * b * c, k[:, 2] * b * b
    return torch.stack([-lost, lost - quick, quick], 1)


def van_der_pol(t: Any, x: Tensor, k: Tensor) -> Tensor:
    """The relaxation oscillator."""
    u, v = x.unbind(1)
    return torch.stack([v, k[:, 0] * (1 - u * u) * v - u], 1)


def reaction_diffusion(t: Any, x: Tensor, k: Tensor) -> Tensor:
    """Nagumo's equation on 100 points."""
    padded = nn.functional.pad(x, (1, 1))
    bend = (padded[:, 2:] - 2 * x + padded[:, :-2]) * (POINTS + 1) ** 2
    return k[:, :1] * bend + k[:, 1:] * x * (1 - x) * (x - 0.25)


def problems() -> dict[str, tuple[Callable[..., Tensor], Tensor, float, Tensor]]:
    """By name: field, first state of a sample, end, and parameters."""
    wave = torch.sin(math.pi * torch.arange(1, POINTS + 1, dtype=D) / (POINTS + 1))
    return {
        "Robertson": (robertson, torch.tensor([1.0, 0.0, 0.0], dtype=D), 1e5, torch.tensor([0.04, 1e4, 3e7], dtype=D)),
        "Van der Pol": (van_der_pol, torch.tensor([2.0, 0.0], dtype=D), 2000.0, torch.tensor([1e3], dtype=D)),
        "reaction and diffusion": (reaction_diffusion, wave, 3.0, torch.tensor([0.01, 5.0], dtype=D)),
    }


def radau(name: str, x0: Tensor, t1: float, k: Tensor, rtol: float, atol: float) -> np.ndarray:
    """SciPy's solution of one sample, with a field and a Jacobian written in NumPy."""
    if name == "Robertson":
        k1, k2, k3 = k.tolist()

        def velocity(t: float, y: np.ndarray) -> list[float]:
            lost, quick = k1 * y[0] - k2 * y[1] * y[2], k3 * y[1] ** 2
            return [-lost, lost - quick, quick]

        matrix: Any = lambda t, y: [  # noqa: E731
            [-k1, k2 * y[2], k2 * y[1]], [k1, -k2 * y[2] - 2 * k3 * y[1], -k2 * y[1]], [0, 2 * k3 * y[1], 0],
        ]  # fmt: skip
    elif name == "Van der Pol":
        mu = k.item()
        velocity = lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]]  # noqa: E731
        matrix = lambda t, y: [[0, 1], [-2 * mu * y[0] * y[1] - 1, mu * (1 - y[0] ** 2)]]  # noqa: E731
    else:
        rate, growth = k.tolist()
        scale = rate * (POINTS + 1) ** 2
        bend = scale * (np.eye(POINTS, k=1) + np.eye(POINTS, k=-1) - 2 * np.eye(POINTS))
        velocity = lambda t, y: bend @ y + growth * y * (1 - y) * (y - 0.25)  # noqa: E731
        matrix = lambda t, y: bend + np.diag(growth * (-3 * y**2 + 2.5 * y - 0.25))  # noqa: E731
    return solve_ivp(velocity, (0, t1), x0.numpy(), method="Radau", jac=matrix, rtol=rtol, atol=atol).y[:, -1]


def stiff(options: Options) -> list[dict[str, Any]]:
    """Times and errors of the stiff problems: rounds in which every solver has its turn."""
    rows = []
    for name, (field, x0, t1, k) in problems().items():
        spread = 1 + 0.1 * torch.linspace(0, 1, options.batch, dtype=D)[:, None]
        ks, starts = k * spread, x0.repeat(options.batch, 1)
        some = range(0, options.batch, options.batch // options.samples)
        exact = np.stack([radau(name, x0, t1, ks[i], 1e-11, 1e-15) for i in some])

        def ours(
            method: Any, tolerance: float, field: Any = field, t1: float = t1, rest: Any = (starts, ks, some)
        ) -> Any:
            control = Tolerance(tolerance, tolerance * 1e-4, max_steps=100_000)
            starts, ks, some = rest
            return integrate(
                field, starts, 0.0, t1, args=(ks,), solver=method, control="sample", keep="last", tolerance=control
            ).x1[list(some)].numpy()  # fmt: skip

        def theirs(method: Any, tolerance: float, name: str = name, rest: Any = (x0, t1, ks, some)) -> Any:
            x0, t1, ks, some = rest
            return np.stack([radau(name, x0, t1, ks[i], tolerance, tolerance * 1e-4) for i in some])

        runs: list[tuple[str, Any, Callable[..., Any], float]] = [
            (method, method, ours, 1.0) for method in ("rodas4", "kvaerno5")
        ]
        if name == "reaction and diffusion":
            banded = {method: get_tableau(method).solved_by(RootFinder(band=1)) for method in ("rodas4", "kvaerno5")}
            runs += [(f"{method}, band=1", tableau, ours, 1.0) for method, tableau in banded.items()]
        if peer := in_jax(name, starts, t1, ks):
            jax = lambda _, tolerance, solve=peer, some=some: solve(tolerance)[list(some)]  # noqa: E731
            runs.append(("diffrax Kvaerno5, vmap", None, jax, 1.0))
        runs.append(("SciPy Radau, a loop", None, theirs, options.batch / len(some)))
        for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
            seconds: dict[str, list[float]] = {}
            for turn in range(options.turns + 1):
                for label, method, solve, share in runs:
                    began = time.perf_counter()
                    x1 = solve(method, tolerance)
                    if turn:  # the first compiles what is compiled
                        seconds.setdefault(label, []).append((time.perf_counter() - began) * share)
                        continue
                    error = float((np.abs(x1 - exact) / np.abs(exact)).max())
                    rows.append({"problem": name, "solver": label, "tolerance": tolerance, "error": error})
            for row in rows[-len(runs) :]:
                row |= {"seconds": statistics.median(seconds[row["solver"]]), "rounds": seconds[row["solver"]]}
                print({key: value for key, value in row.items() if key != "rounds"}, flush=True)
    return rows


def in_jax(name: str, starts: Tensor, t1: float, ks: Tensor) -> Callable[[float], np.ndarray] | None:
    """diffrax's solution of the batch, vmapped and compiled, by tolerance; None where it is not installed."""
    try:
        diffrax, jax, jnp = (import_module(module) for module in ("diffrax", "jax", "jax.numpy"))
    except ImportError:
        return None
    jax.config.update("jax_enable_x64", True)

    def velocity(t: Any, y: Any, k: Any) -> Any:
        if name == "Robertson":
            lost, quick = k[0] * y[0] - k[1] * y[1] * y[2], k[2] * y[1] ** 2
            return jnp.stack([-lost, lost - quick, quick])
        if name == "Van der Pol":
            return jnp.stack([y[1], k[0] * (1 - y[0] ** 2) * y[1] - y[0]])
        padded = jnp.pad(y, 1)
        bend = (padded[2:] - 2 * y + padded[:-2]) * (POINTS + 1) ** 2
        return k[0] * bend + k[1] * y * (1 - y) * (y - 0.25)

    def one(x0: Any, k: Any, tolerance: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), diffrax.Kvaerno5(), 0.0, t1, None, x0, k, max_steps=None,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance * 1e-4),
        ).ys[-1]  # fmt: skip

    solve = jax.jit(jax.vmap(one, (0, 0, None)))
    x0, k = starts.numpy(), ks.numpy()
    return lambda tolerance: np.asarray(solve(x0, k, tolerance))


def timed(work: Callable[[], object], shortest: float = 0.02) -> float:
    """Seconds of one call."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < shortest:
        work()
        count += 1
    return spent / count


def overhead(options: Options) -> list[dict[str, Any]]:
    """A step of kvaerno5 over its Jacobian, its factorization and solutions, and its field calls."""
    rows = []
    for features in (2, 8, 32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, features)).requires_grad_(False).double()
        x = torch.randn(options.batch, features, dtype=D)

        def field(t: Any, x: Tensor, net: nn.Module = net) -> Tensor:
            return net(x) - 20 * x

        take = ImplicitSteps(get_tableau("kvaerno5"), 1e-6, 1e-8)
        with torch.no_grad():
            take(field, 0.0, x, 0.05)
        calls = take.calls - take.jacobians
        matrix, right = jacobian(field, 0.0, x), torch.randn_like(x)

        def step(field: Any = field, x: Tensor = x) -> None:
            ImplicitSteps(get_tableau("kvaerno5"), 1e-6, 1e-8)(field, 0.0, x, 0.05)

        def floor(
            field: Any = field, x: Tensor = x, matrix: Tensor = matrix, right: Tensor = right, calls: int = calls
        ) -> None:
            jacobian(field, 0.0, x)
            system = Dense(matrix, 0.013)
            for _ in range(calls):
                field(0.0, x)
                system.solve(right)

        with torch.no_grad():
            ratios = [timed(step) / timed(floor) for _ in range(options.rounds)]
        rows.append({"features": features, "calls": calls, "ratio": statistics.median(ratios), "rounds": ratios})
        print(rows[-1], flush=True)
    return rows


def reversible(options: Options) -> list[dict[str, Any]]:
    """Reversible gradients over direct ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    start, rows = torch.randn(256, 32), []

    class Velocity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Any, x: Tensor) -> Tensor:
            return self.net(x)

    field = Velocity()
    ways: dict[str, dict[str, Any]] = {
        "euler, 50 steps": {"solver": "euler", "steps": 50}, "bs23, 50 steps": {"solver": "bs23", "steps": 50},
        "rk4, 50 steps": {"solver": "rk4", "steps": 50},
        "bs23, adaptive": {"solver": "bs23", "tolerance": Tolerance(1e-5, 1e-6)},
        "dopri5, adaptive": {"solver": "dopri5", "tolerance": Tolerance(1e-6, 1e-7)},
    }  # fmt: skip

    def passes(gradient: Any, **way: Any) -> None:
        x = start.clone().requires_grad_()
        integrate(field, x, 0.0, 1.0, gradient=gradient, keep="last", **way).x1.square().sum().backward()

    for name, way in ways.items():
        ratios = [
            timed(lambda way=way: passes("reversible", **way)) / timed(lambda way=way: passes("direct", **way))
            for _ in range(options.rounds)
        ]
        row: dict[str, Any] = {"way": name, "ratio": statistics.median(ratios), "rounds": ratios}
        if "steps" in way:
            for n in (10, 1000):
                longer = way | {"steps": n}
                row[f"peak of {n} steps"] = measure_memory(lambda way=longer: passes("reversible", **way)).peak
        rows.append(row)
        print(row, flush=True)
    return rows


def table(measured: dict[str, Any]) -> str:
    """The rows as tables, and where they were measured."""
    rows = measured["stiff"]
    tolerances = sorted({row["tolerance"] for row in rows}, reverse=True)
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        peers = [one for one in rows if one["problem"] == row["problem"] and "SciPy" in one["solver"]]
        errors, seconds = ([math.log(one[key]) for one in peers] for key in ("error", "seconds"))
        peer = math.exp(np.interp(-math.log(row["error"]), [-error for error in errors], seconds))
        inside = min(errors) <= math.log(row["error"]) <= max(errors)
        share = f", {row['seconds'] / peer:.2f}" if inside and row not in peers else ""
        cell = f"{row['seconds']:.2g} ({row['error']:.0e}{share})"
        lines.setdefault((row["problem"], row["solver"]), []).append(cell)
    stiff = [[*names, *cells] for names, cells in lines.items()]
    over = [[row["features"], row["calls"], f"{row['ratio']:.2f}"] for row in measured["overhead"]]
    pair = [
        [row["way"], f"{row['ratio']:.2f}", *(row.get(f"peak of {n} steps", "") for n in (10, 1000))]
        for row in measured["reversible"]
    ]
    where = measured["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    heads = ["problem", "solver", *(f"tolerance {tolerance:g}" for tolerance in tolerances)]
    return "\n\n".join([
        "Seconds of a batch of 64 (largest relative error of a component at the end; over the time that Radau takes "
        "for as small an error, where it was measured around that).",
        tabulate(stiff, heads, tablefmt="github", disable_numparse=True),
        "A step of kvaerno5 over its Jacobian, its factorization, and as many field calls and solutions as it takes.",
        tabulate(over, ["features", "field calls", "ratio"], tablefmt="github", disable_numparse=True),
        "Gradients by reversible steps over those through the steps, both passes; peak of memory in bytes.",
        tabulate(pair, ["", "ratio", "10 steps", "1,000 steps"], tablefmt="github", disable_numparse=True),
        f"{where['device']}, {where['threads']} thread; {versions}; commit {where['commit']}",
    ])  # fmt: skip


def main(options: Options) -> None:
    """Measure and write the file, or print the tables of one."""
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    torch.set_num_threads(1)
    where: dict[str, Any] = environment()
    where |= {"command": "python -m benchmarks.implicit", "commit": options.commit}
    peers = ("scipy", "diffrax", "jax")
    where["versions"] |= {name: version(name) for name in peers if find_spec(name)}
    measured: dict[str, Any] = {"environment": where}
    tables = {"overhead": overhead, "reversible": reversible, "stiff": stiff}
    measured |= {name: make(options) for name, make in tables.items() if options.only in (None, name)}
    options.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
