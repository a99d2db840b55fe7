"""Time of a solve over the time of its field calls alone, this package beside torchdiffeq, interleaved in one process.

    python -m benchmarks.ratios

Rounds alternate between the solvers and the floor, on one thread; the ratio is that of the medians, each floor with the
solver's own number of field calls.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.fields import FIELDS, Field, calls, make
from odenets.runs import environment
from solvers import Tolerance, integrate, odeint

STEPS, RTOL, ATOL = 10, 1e-3, 1e-4


def solves(field: Field, x: Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    """By method, what solves the problem, by solver."""
    grid, ends = torch.linspace(0.0, 1.0, STEPS + 1), torch.tensor([0.0, 1.0])
    tolerance = Tolerance(RTOL, ATOL)
    table: dict[str, dict[str, Callable[[], Any]]] = {}
    for method, theirs in (("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4"), ("bs23", None)):
        row: dict[str, Callable[[], Any]] = {
            "integrate": lambda m=method: integrate(field, x, 0.0, 1.0, solver=m, steps=STEPS, keep="last").x1
        }
        if theirs is not None:
            row["odeint"] = lambda m=method: odeint(field, x, grid, method=m)[-1]
            row["torchdiffeq"] = lambda m=theirs: torchdiffeq.odeint(field, x, grid, method=m)[-1]
        table[f"{method}, {STEPS} steps"] = row
    for method, name in (("bosh3", "bs23"), ("dopri5", "dopri5")):
        table[f"{method}, rtol {RTOL:g}"] = {
            "integrate": lambda m=name: integrate(field, x, 0.0, 1.0, solver=m, tolerance=tolerance, keep="last").x1,
            "odeint": lambda m=method: odeint(field, x, ends, method=m, rtol=RTOL, atol=ATOL)[-1],
            "torchdiffeq": lambda m=method: torchdiffeq.odeint(field, x, ends, method=m, rtol=RTOL, atol=ATOL)[-1],
        }
    return table


def ratios(field: Field, x: Tensor, row: dict[str, Callable[[], Any]], backward: bool, rounds: int) -> dict[str, float]:
    """Each solver's median time over its floor's, and torchdiffeq's over ``odeint``'s."""
    counts = [0]
    handle = field.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    evaluations = {}
    for who, solve in row.items():
        counts[0] = 0
        solve()
        evaluations[who] = counts[0]
    handle.remove()
    floors = {n: lambda n=n: calls(field, x, n) for n in set(evaluations.values())}
    times: dict[str | int, list[float]] = {key: [] for key in (*row, *floors)}
    for _ in range(rounds + 3):
        for key, run in (*row.items(), *floors.items()):
            with torch.set_grad_enabled(backward):
                started = time.perf_counter()
                out = run()
                if backward:
                    out.sum().backward()
                times[key].append(time.perf_counter() - started)
    median = {key: statistics.median(values[3:]) for key, values in times.items()}
    found = {who: median[who] / median[evaluations[who]] for who in row}
    if "torchdiffeq" in row:
        found["torchdiffeq / odeint"] = median["torchdiffeq"] / median["odeint"]
    return found


def main() -> None:
    """Measure everything and print one table."""
    torch.set_num_threads(1)
    lines = []
    jobs = [(name, backward) for name in FIELDS for backward in (False, True)]
    for name, backward in tqdm(jobs, desc="ratios"):
        field, x = make(name)
        x.requires_grad_(backward)
        for method, row in solves(field, x).items():
            found = ratios(field, x, row, backward, rounds=10 if name == FIELDS[2] else 40)
            columns = ("integrate", "odeint", "torchdiffeq", "torchdiffeq / odeint")
            what = "forward + backward" if backward else "forward"
            lines.append([name, what, method, *(f"{found[c]:.2f}" if c in found else "" for c in columns)])
    headers = ["field", "", "method", "integrate", "odeint", "torchdiffeq", "torchdiffeq / odeint"]
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    made = environment()
    print(f"\n{made['device']}, one thread, torch {made['versions']['torch']}, commit {made['commit']}")


if __name__ == "__main__":
    main()
