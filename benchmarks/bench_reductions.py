"""Per-sample reductions and the finish of a step beside their peers, as parts of the bandwidth of a plain pass.

    pytest benchmarks/bench_reductions.py --benchmark-only --benchmark-json=FILE.json
    python -m benchmarks.table FILE.json

The floor of a reduction on a CPU is a plain sum of its operands, which reads them once; of all else a copy of as many
bytes as the operation has to read and to write at least. It is timed in turn with every peer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from odenets import measures, models
from solvers import finish_step, get_tableau
from solvers.reductions import mean_square, mean_square_and_cosine, weighted_action

Measure = Callable[..., None]
foreach_norm: Any = getattr(torch, "_foreach_norm")  # noqa: B009 - torch has no public name for it

SIZES = {"3 MB": (32, 100, 16, 16), "13 MB": (128, 100, 16, 16), "51 MB": (500, 100, 16, 16)}
ON_GPU = {**SIZES, "1 GB": (2560, 100, 32, 32)}  # well past the last-level cache
BS23 = get_tableau("bs23")
WEIGHTS = BS23.b[:3]


def rows(r: Tensor) -> Tensor:
    """A sample's numbers in a row."""
    return r.flatten(1)


def cosine(r: Tensor) -> Tensor:
    """The plain cosine with ones."""
    return rows(r).sum(1) / (rows(r).norm(dim=1) * rows(r).shape[1] ** 0.5)


def plain_finish(x0: Tensor, *p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step's state, the root mean square of its error, and its action, written as one would."""
    h, (b1, b2, b3, _), e = 0.1, BS23.b, BS23.error_weights
    assert e is not None
    x1 = x0 + h * (b1 * p[0] + b2 * p[1] + b3 * p[2])
    error = h * (e[0] * p[0] + e[1] * p[1] + e[2] * p[2] + e[3] * p[3])
    action = h * sum(b * (q**2).flatten(1).mean(1) for b, q in zip(BS23.b, p[:3], strict=False))
    return x1, (error**2).flatten(1).mean(1).sqrt(), action  # type: ignore[return-value] - it is asked for


def our_finish(x0: Tensor, *p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by this package."""
    x1, values = finish_step(x0, p, BS23, 0.1, error=True, action=True)
    assert x1 is not None
    return x1, values["error"], values["action"]


PEERS: dict[str, dict[str, Callable[[Tensor], Any]]] = {
    "mean square": {
        "this package": mean_square,
        "plain": lambda r: (r**2).flatten(1).mean(1),
        "vector_norm": lambda r: torch.linalg.vector_norm(rows(r), dim=1) ** 2 / rows(r).shape[1],
        "foreach": lambda r: torch.stack(foreach_norm(list(rows(r)))) ** 2 / rows(r).shape[1],
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
for _name, _peers in PEERS.items():
    _peers["torch.compile"] = _peers["plain"]
FINISHES = {"this package": our_finish, "plain": plain_finish, "torch.compile": plain_finish}


@pytest.fixture(params=["1 threads", "2 threads"])
def threads(request: pytest.FixtureRequest, device: str) -> Any:
    """Threads of a CPU, one or two."""
    count = int(request.param.split()[0])
    if device == "cuda" and count > 1:
        pytest.skip("threads are those of a CPU")
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(1)


def compiled(run: Callable[..., Any], who: str) -> Callable[..., Any]:
    """The peer, compiled if that is what it is."""
    if who != "torch.compile":
        return run
    torch.compiler.reset()
    return torch.compile(run, dynamic=False)


def size_for(size: str, device: str) -> tuple[int, ...]:
    """The shape of a size, or a skip."""
    if size not in SIZES and device == "cpu":
        pytest.skip("for GPUs, whose caches are larger")
    return ON_GPU[size]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("operation", "who"), [(name, who) for name, peers in PEERS.items() for who in peers])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("size", ON_GPU)
def bench_reduction(
    measure: Measure, benchmark: Any, device: str, threads: int, size: str, backward: bool, operation: str, who: str
) -> None:
    """One reduction in turn with its floor."""
    passes = "forward + backward" if backward else "forward"
    benchmark.group = f"{operation}, {size}, {passes}, {threads} threads, {device}"
    r = torch.randn(size_for(size, device), device=device, requires_grad=backward)
    reduce, reads = compiled(PEERS[operation][who], who), READS[operation]
    summed = device == "cpu" and not backward
    to = torch.empty_like(r)

    def run() -> None:
        if backward:
            torch.autograd.grad(reduce(r).sum(), r)
        else:
            reduce(r)

    def floor() -> None:
        with torch.no_grad():
            for _ in range(reads):
                if summed:
                    r.sum()
                else:
                    to.copy_(r)
            if backward:
                to.copy_(r)

    moved = r.nbytes * (2 * reads + 1 if backward else reads)
    floored = r.nbytes * (reads if summed else 2 * (reads + backward))
    info = {"size": size, "operation": operation, "who": who, "backward": backward, "threads": threads}
    measure(run, floor, reduction=True, bytes=moved, floor_bytes=floored, **info)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("who", FINISHES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("size", ON_GPU)
def bench_finish(
    measure: Measure, benchmark: Any, device: str, threads: int, size: str, backward: bool, who: str
) -> None:
    """State, error and action of a BS23 step: reads five tensors, writes one; backward reads five and writes five."""
    passes = "forward + backward" if backward else "forward"
    benchmark.group = f"finish of a step, {size}, {passes}, {threads} threads, {device}"
    operands = [torch.randn(size_for(size, device), device=device, requires_grad=backward) for _ in range(5)]
    finish, copies = compiled(FINISHES[who], who), 8 if backward else 3
    to = torch.empty_like(operands[0])
    outer = [torch.randn_like(to), *torch.rand(2, len(to), device=device)]

    def run() -> None:
        values = finish(*operands)
        if backward:
            torch.autograd.grad(values, operands, outer)

    def floor() -> None:
        with torch.no_grad():
            for i in range(copies):
                to.copy_(operands[i % 5])

    moved = 2 * copies * to.nbytes
    info = {"size": size, "operation": "finish of a step", "who": who, "backward": backward, "threads": threads}
    measure(run, floor, reduction=True, bytes=moved, floor_bytes=moved, **info)


@pytest.mark.parametrize("what", ["training step with the action", "features of a detector"])
def bench_in_a_network(measure: Measure, benchmark: Any, device: str, what: str) -> None:
    """ResNet-9 on images of 32 x 32, with a measure in turn with the same without."""
    benchmark.group = f"ResNet-9, {what}, {device}"
    net = models.resnet9(3, features=100, size=32).to(device)
    x, y = torch.rand(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    net(x)

    def train(named: dict[str, measures.Measure]) -> None:
        out, records = net.record(x, **named)
        loss = torch.nn.functional.cross_entropy(out, y)
        (loss + sum(record.sum(0).mean() for record in records.values())).backward()
        net.zero_grad(set_to_none=True)

    def look(named: dict[str, measures.Measure]) -> None:
        with torch.no_grad():
            net.record(x, **named)

    if what.startswith("training"):
        once, named = train, {"action": measures.action}
    else:
        net.eval()
        once, named = look, {"residue": measures.residue, "cosine": measures.cosine}
    info = {"operation": what, "size": "batch 32", "backward": once is train, "threads": 1, "who": "this package"}
    measure(partial(once, named), partial(once, {}), measured_network=True, **info)
