"""Solves beside their floor, as many bare field calls: this package, loops by hand, torchdiffeq and torchode.

    pytest benchmarks --benchmark-only --benchmark-json=FILE.json
    python -m benchmarks.table FILE.json

torchdiffeq's rk4 is the 3/8 rule. torchode has dopri5 alone of these, and a step size for each sample; it needs
``pip install --no-deps torchode torchtyping`` (torchtyping asks for an old typeguard that others cannot use, and works
without it).
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from odenets.analysis.memory import measure_memory
from odenets.command.speed.fields import FIELDS, calls, make
from odenets.command.speed.solves import PEERS, ROWS, STEPS, evaluations, missing_peers, passes, prepare
from solvers import integrate

Measure = Callable[..., None]


@pytest.fixture(params=FIELDS)
def name(request: pytest.FixtureRequest) -> str:
    """A field's name."""
    return request.param


@pytest.mark.parametrize(("method", "who"), [(method, who) for method, all_ in ROWS.items() for who in all_])
@pytest.mark.parametrize("backward", [False, True])
def bench_solve(
    measure: Measure, benchmark: Any, device: str, name: str, backward: bool, method: str, who: str
) -> None:
    """One solve, eager."""
    if who in missing_peers():
        pytest.skip(PEERS[who])
    benchmark.group = f"{method}, {name}, {'forward + backward' if backward else 'forward'}, {device}"
    field, x = make(name, device)
    x.requires_grad_(backward)
    run = prepare(method, who, field, x)
    n = evaluations(field, run)
    floor = passes(lambda: calls(field, x, n), backward)
    measure(passes(run, backward), floor, field=name, backward=backward, method=method, who=who, evaluations=n)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("name", "backward"), [*((name, False) for name in FIELDS), (FIELDS[0], True)])
def bench_compiled(measure: Measure, benchmark: Any, device: str, name: str, backward: bool) -> None:
    """Ten steps of bs23 as one graph over as many eager field calls; compiling takes a minute or two."""
    benchmark.group = f"bs23 compiled, {name}, {'forward + backward' if backward else 'forward'}, {device}"
    field, x = make(name, device)
    x.requires_grad_(backward)
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def solve(x: Tensor) -> Tensor:
        return integrate(field, x, 0.0, 1.0, solver="bs23", steps=STEPS, keep="last").x1

    run, floor = passes(lambda: solve(x), backward), passes(lambda: calls(field, x, 3 * STEPS), backward)
    run()  # compiles
    info = {"field": name, "backward": backward, "method": "bs23 compiled", "who": "integrate"}
    measure(run, floor, evaluations=3 * STEPS, **info)


@pytest.mark.parametrize("who", ["by hand", "integrate"])
def bench_memory(benchmark: Any, device: str, machine: dict[str, Any], name: str, who: str) -> None:
    """Bytes that ten steps of bs23 leave for the backward pass, and their peak with it, over those of field calls."""
    benchmark.group = f"memory of bs23, {name}, {device}"
    field, x = make(name, device)
    x.requires_grad_()
    run = prepare("bs23", who, field, x)
    passes(run, backward=True)()  # gradients stand before
    found = {}
    for part, work in (("solve", run), ("calls", lambda: calls(field, x, 3 * STEPS))):
        found[f"{part} left"] = measure_memory(work, device).left
        found[f"{part} peak"] = measure_memory(passes(work, backward=True), device).peak
    benchmark.pedantic(passes(run, backward=True), rounds=1)
    benchmark.extra_info.update(found, memory=True, field=name, who=who, device=device, machine=machine)
