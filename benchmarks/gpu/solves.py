"""Solves over their field calls, waits for the device and launches, and fixed steps as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import in_turns, launches, waits
from odenets.command.speed import fields
from odenets.command.speed.fields import Field, calls
from odenets.command.speed.solves import STEPS, evaluations, missing_peers, passes, prepare
from solvers import integrate

__all__ = ["graphs", "solves", "waiting"]

SMALL, MLP, LITTLE, LARGE = (
    "MLP 2-64-2, batch 256",
    "MLP 512-2048-512, batch 4096",
    "conv 32 x 14 x 14, batch 32",
    "conv 64 x 32 x 32, batch 256",
)
ROWS = {
    "euler": ("by hand", "integrate", "odeint", "torchdiffeq"),
    "bs23": ("by hand", "integrate"),
    "bosh3": ("by hand", "integrate", "odeint", "torchdiffeq"),
    "dopri5": ("integrate", "odeint", "torchdiffeq", "integrate per sample", "torchode"),
}


def make(name: str, device: str) -> tuple[Field, Tensor]:
    """A field, with the seed's weights, and a first state."""
    if name in (SMALL, LITTLE):
        return fields.make(next(each for each in fields.FIELDS if each.endswith(name)), device)
    torch.manual_seed(0)
    if name == MLP:
        network, shape = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)), (4096, 512)
    else:
        layers = nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
        network, shape = nn.Sequential(*layers), (256, 64, 32, 32)
    return Field(network).to(device), torch.randn(shape, device=device)


def solves(device: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each field, method, pass and solver."""
    for name in (SMALL,) if quick else (SMALL, LITTLE, MLP, LARGE):
        for backward in (False, True):
            for method, who in ((method, who) for method, everyone in ROWS.items() for who in everyone):
                if who in missing_peers():
                    continue
                field, x = make(name, device)
                x.requires_grad_(backward)
                run = prepare(method, who, field, x)
                n = evaluations(field, run)
                seconds, floor = in_turns(
                    passes(run, backward), passes(partial(calls, field, x, n), backward), seconds=0.1
                )
                yield {
                    "field": name, "backward": backward, "method": method, "who": who, "evaluations": n,
                    "seconds": seconds, "floor": floor, "ratio": seconds / floor,
                }  # fmt: skip


def waiting(device: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    """How often solves wait for the device, and how much they give it to do beside their field calls."""
    for name in (SMALL, LITTLE):
        for method, who in [("bs23", "by hand"), ("bs23", "integrate"), *(("dopri5", who) for who in ROWS["dopri5"])]:
            if who in missing_peers():
                continue
            field, x = make(name, device)
            run = passes(prepare(method, who, field, x), backward=False)
            n = evaluations(field, run)
            bare = passes(partial(calls, field, x, n), backward=False)
            yield {
                "field": name, "method": method, "who": who, "evaluations": n, "waits": waits(run),
                "launches": launches(run), "of the field": launches(bare),
            }  # fmt: skip


def graphs(device: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Ten steps of bs23: eager, in a CUDA graph, compiled, and compiled into CUDA graphs, over eager field calls."""
    for name in (SMALL, LARGE):
        field, x = make(name, device)
        solve = lambda x, field=field: integrate(field, x, 0.0, 1.0, solver="bs23", steps=STEPS, keep="last").x1  # noqa: E731
        bare = lambda x, field=field: calls(field, x, 3 * STEPS)  # noqa: E731
        floor = passes(partial(bare, x), backward=False)
        ways: dict[str, Callable[[], Callable[[], object]]] = {
            "eager": lambda solve=solve, x=x: partial(solve, x),
            "field calls in a CUDA graph": lambda bare=bare, x=x: captured(bare, x),
            "CUDA graph": lambda solve=solve, x=x: captured(solve, x),
            "compiled": lambda solve=solve, x=x: partial(torch.compile(solve, fullgraph=True), x),
            "compiled, reduce-overhead": lambda solve=solve, x=x: partial(
                torch.compile(solve, fullgraph=True, mode="reduce-overhead"), x
            ),
        }
        for who, way in ways.items():
            if "compiled" in who and name != SMALL:  # which takes a minute
                continue
            torch.compiler.reset()
            with torch.no_grad():
                seconds, over = in_turns(passes(way(), backward=False), floor)  # type: ignore[arg-type] - not read
            yield {"field": name, "who": who, "seconds": seconds, "floor": over, "ratio": seconds / over}


@torch.no_grad()
def captured(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """The work as a graph of the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x)
    return graph.replay
