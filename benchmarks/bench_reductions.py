"""Per-sample reductions beside their peers: bandwidth over that of a plain sum and of a copy of the same tensor.

    pytest benchmarks/bench_reductions.py --benchmark-only --benchmark-json=FILE.json
    python -m benchmarks.table FILE.json

The floor of a forward pass reads the operand once; a forward and backward pass reads it twice and writes its gradient.
A plain sum is that reading, measured, and is timed in turn with every peer.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from odenets import measures
from solvers import get_tableau, rk_step
from solvers.reductions import mean_square, mean_square_and_cosine, weighted_action

Measure = Callable[..., None]

SIZES = {"3 MB": (32, 100, 16, 16), "13 MB": (128, 100, 16, 16), "51 MB": (500, 100, 16, 16)}
WEIGHTS = get_tableau("bs23").b[:3]


def rows(r: Tensor) -> Tensor:
    """A sample's numbers in a row."""
    return r.flatten(1)


def cosine(r: Tensor) -> Tensor:
    """The plain cosine with ones."""
    return rows(r).sum(1) / (rows(r).norm(dim=1) * rows(r).shape[1] ** 0.5)


PEERS: dict[str, dict[str, Callable[[Tensor], Any]]] = {
    "mean square": {
        "this package": mean_square,
        "plain": lambda r: (r**2).flatten(1).mean(1),
        "vector_norm": lambda r: torch.linalg.vector_norm(rows(r), dim=1) ** 2 / rows(r).shape[1],
        "einsum": lambda r: torch.einsum("bi,bi->b", rows(r), rows(r)) / rows(r).shape[1],
    },
    "mean square and cosine": {
        "this package": lambda r: sum(mean_square_and_cosine(r)),
        "plain": lambda r: (r**2).flatten(1).mean(1) + cosine(r),
        "vector_norm": lambda r: torch.linalg.vector_norm(rows(r), dim=1) ** 2 / rows(r).shape[1] + cosine(r),
    },
    "action of three stages": {
        "this package": lambda r: weighted_action([r, r, r], WEIGHTS, 0.1),
        "plain": lambda r: sum(0.1 * w * (p**2).flatten(1).mean(1) for w, p in zip(WEIGHTS, (r, r, r), strict=True)),
        "vector_norm": lambda r: sum(
            0.1 * w * torch.linalg.vector_norm(rows(p), dim=1) ** 2 / rows(p).shape[1]
            for w, p in zip(WEIGHTS, (r, r, r), strict=True)
        ),
    },
}
READS = {"mean square": 1, "mean square and cosine": 1, "action of three stages": 3}


@pytest.mark.parametrize(("operation", "who"), [(name, who) for name, peers in PEERS.items() for who in peers])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def bench_reduction(
    measure: Measure, benchmark: Any, device: str, size: str, threads: int, backward: bool, operation: str, who: str
) -> None:
    """One reduction in turn with plain sums of as many operands."""
    passes = "forward + backward" if backward else "forward"
    benchmark.group = f"{operation}, {size}, {passes}, {threads} threads, {device}"
    r = torch.randn(SIZES[size], device=device, requires_grad=backward)
    reduce = PEERS[operation][who]

    def run() -> None:
        if backward:
            torch.autograd.grad(reduce(r).sum(), r)
        else:
            reduce(r)

    def floor() -> None:
        for _ in range(READS[operation]):
            r.detach().sum()

    info = {"size": size, "operation": operation, "who": who, "backward": backward, "bytes": r.numel() * 4}
    torch.set_num_threads(threads)
    try:
        measure(run, floor, threads=threads, reduction=True, **info)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("who", ["with the action"])
def bench_action_of_a_step(measure: Measure, benchmark: Any, device: str, who: str) -> None:
    """A training step of a residual block with its action, in turn with the same without."""
    benchmark.group = f"training step of a block, {device}"
    layers = torch.nn.Conv2d(100, 100, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(100, 100, 3, padding=1)
    block, x = torch.nn.Sequential(*layers).to(device), torch.randn(SIZES["3 MB"], device=device)

    def train(acts: bool) -> None:
        step = rk_step(lambda t, x: block(x), 0.0, x, 1.0, get_tableau("euler"))
        loss = step.x1.sum()
        (loss + measures.action(step).mean() if acts else loss).backward()

    info = {"operation": "training step, over the same without", "size": "3 MB", "backward": True, "threads": 1}
    measure(lambda: train(True), lambda: train(False), reduction=True, who=who, **info)
