"""What is timed: one problem from 0 to 1, by each method, solved by each solver."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from odenets.command.speed import by_hand
from odenets.command.speed.fields import Field
from solvers import Tolerance, integrate, odeint

__all__ = ["COLUMNS", "PEERS", "ROWS", "STEPS", "evaluations", "missing_peers", "passes", "prepare"]

STEPS, RTOL, ATOL = 10, 1e-3, 1e-4
FIXED = ("euler", "midpoint", "rk4", "bs23")
COLUMNS = ("by hand", "integrate", "odeint", "torchdiffeq", "integrate per sample", "torchode")
# By method, who has it: with a fixed number of steps, or at a tolerance (bosh3 is bs23 to torchdiffeq).
ROWS = {
    "euler": COLUMNS[:4],
    "midpoint": COLUMNS[:4],
    "rk4": COLUMNS[:4],
    "bs23": ("by hand", "integrate"),
    "bosh3": COLUMNS[:4],
    "dopri5": COLUMNS[1:],
}
PEERS = {  # other libraries, and the line that installs each
    "torchdiffeq": "pip install torchdiffeq",
    "torchode": "pip install --no-deps torchode torchtyping",  # torchtyping wants a typeguard that others cannot use
}


def missing_peers() -> dict[str, str]:
    """The other libraries that are not installed, each with the line that does."""
    return {name: line for name, line in PEERS.items() if find_spec(name) is None}


def prepare(method: str, who: str, field: Field, x: Tensor) -> Callable[[], Tensor]:
    """A solve, ready to be timed."""
    if who == "by hand":
        if method in FIXED:
            return lambda: by_hand.FIXED[method](field, x, STEPS)
        return lambda: by_hand.bosh3(field, x, RTOL, ATOL)
    if who.startswith("integrate"):
        return _integrate(method, field, x, "sample" if who.endswith("per sample") else "batch")
    if who == "torchode":
        return _torchode(field, x)
    solve: Callable[..., Any] = odeint if who == "odeint" else import_module(who).odeint
    if method in FIXED:
        times = torch.linspace(0.0, 1.0, STEPS + 1, device=x.device)
        return lambda: solve(field, x, times, method=method)[-1]
    ends = torch.tensor([0.0, 1.0], device=x.device)
    return lambda: solve(field, x, ends, method=method, rtol=RTOL, atol=ATOL)[-1]


def _integrate(method: str, field: Field, x: Tensor, control: Literal["batch", "sample"]) -> Callable[[], Tensor]:
    if method in FIXED:
        return lambda: integrate(field, x, 0.0, 1.0, solver=method, steps=STEPS, keep="last").x1
    name = "bs23" if method == "bosh3" else method
    options: dict[str, Any] = {"solver": name, "tolerance": Tolerance(RTOL, ATOL), "control": control, "keep": "last"}
    return lambda: integrate(field, x, 0.0, 1.0, **options).x1


def _torchode(field: Field, x: Tensor) -> Callable[[], Tensor]:
    """torchode's dopri5, with flat states and a step size for each sample, as it always has."""
    torchode = import_module("torchode")
    term = torchode.ODETerm(lambda t, y: field(t, y.unflatten(1, x.shape[1:])).flatten(1))
    controller = torchode.IntegralController(atol=ATOL, rtol=RTOL, term=term)
    method = torchode.Dopri5(term=term)
    solver = torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False).to(x.device)
    starts, ends = x.new_zeros(len(x)), x.new_ones(len(x))

    def solve() -> Tensor:
        problem = torchode.InitialValueProblem(x.flatten(1), starts, ends)
        return solver.solve(problem).ys[:, -1].view_as(x)

    return solve


def passes(run: Callable[[], Tensor], backward: bool) -> Callable[[], None]:
    """Forward alone, or forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        with torch.enable_grad():
            run().sum().backward()

    return both if backward else forward


def evaluations(field: Field, run: Callable[[], object]) -> int:
    """The field calls of a solve."""
    count = [0]
    handle = field.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with torch.no_grad():
        run()
    handle.remove()
    return count[0]
