"""Reductions and the finish of a step: time of the device, over that of a copy of as many bytes.

"this package" is what its functions do, "operators" its kernels at every size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.bench_reductions import WEIGHTS, cosine, our_finish, plain_finish
from benchmarks.gpu.timing import on_device, per_call
from odenets.analysis.memory import measure_memory
from solvers import finish_step, get_tableau
from solvers.reductions import functional, mean_square, mean_square_and_cosine, weighted_action

__all__ = ["kernels"]

SIZES = {"13 MB": (128, 100, 16, 16), "51 MB": (500, 100, 16, 16), "1 GB": (2560, 100, 32, 32)}
EULER = get_tableau("euler")


def plain_square(r: Tensor) -> Tensor:
    """A mean square as one would write it."""
    return (r**2).flatten(1).mean(1)


def our_euler(x0: Tensor, p: Tensor) -> Sequence[Tensor]:
    """The step of a residual network with its action."""
    x1, values = finish_step(x0, [p], EULER, 1.0, action=True)
    assert x1 is not None
    return x1, values["action"]


@dataclass(frozen=True)
class Operation:
    """An operation, ours and as one would write it.

    Attributes:
        operands: tensors of a size that it takes.
        moved: how many of that size it has to read and to write; forward, and forward and backward.
        written: whether it makes a state.
        compiled: whether the plain one is compiled too.
    """

    operands: int
    moved: tuple[int, int]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    written: bool = False
    compiled: bool = True


OPERATIONS = {
    "mean square": Operation(1, (1, 3), mean_square, plain_square),
    "mean square and cosine": Operation(
        1, (1, 3), mean_square_and_cosine, lambda r: (plain_square(r), cosine(r)), compiled=False
    ),
    "action of three stages": Operation(
        3, (3, 9), lambda *p: weighted_action(p, WEIGHTS, 0.1),
        lambda *p: sum(0.1 * w * plain_square(q) for w, q in zip(WEIGHTS, p, strict=True)), compiled=False,
    ),
    "Euler step, action": Operation(2, (3, 6), our_euler, lambda x, p: (x + p, plain_square(p)), written=True),
    "BS23 step, error, action": Operation(5, (6, 15), our_finish, plain_finish, written=True),
}  # fmt: skip


def work(run: Callable[..., Any], operands: Sequence[Tensor], outer: Sequence[Tensor] | None) -> None:
    """Forward, and with gradients of the values also backward."""
    with torch.set_grad_enabled(outer is not None):
        values = run(*operands)
        if outer is not None:
            torch.autograd.grad(values, operands, outer)


def kernels(
    device: str, quick: bool = False, people: Sequence[str] = ("this package", "operators", "plain")
) -> Iterator[dict[str, Any]]:
    """A row for each operation, size and way to take it ("compiled" is another); first the copies."""
    sizes = {"13 MB": (8, 100, 16, 16)} if quick else SIZES
    bandwidth = {}
    for size, shape in sizes.items():
        x, to = torch.randn(2, *shape, device=device).unbind()
        seconds = on_device(partial(to.copy_, x))
        bandwidth[size] = 2 * x.nbytes / seconds
        yield {"operation": "copy", "size": size, "seconds": seconds, "bytes": 2 * x.nbytes}
    for name, operation in OPERATIONS.items():
        for size, shape in sizes.items():
            operands = [torch.randn(shape, device=device, requires_grad=True) for _ in range(operation.operands)]
            values = operation.ours(*operands)
            outer = [torch.randn_like(v) for v in (values if isinstance(values, tuple) else (values,))]
            del values
            for backward in (False, True):
                moved = operation.moved[backward] * operands[0].nbytes
                for who in people:
                    if who == "compiled" and not (operation.compiled and size == "1 GB"):
                        continue
                    run = operation.ours if who in ("this package", "operators") else operation.plain
                    if who == "compiled":
                        torch.compiler.reset()
                        run = torch.compile(run, dynamic=False)
                    once = partial(work, run, operands, outer if backward else None)
                    with patch.object(functional, "SMALL_ON_GPU", 0 if who == "operators" else functional.SMALL_ON_GPU):
                        once()
                        seconds, each = on_device(once), per_call(once, 20)
                        peak = measure_memory(once, device).peak
                    yield {
                        "operation": name, "size": size, "backward": backward, "who": who, "seconds": seconds,
                        "bytes": moved, "of a copy": moved / bandwidth[size] / seconds, "from call to call": each,
                        "peak": peak,
                    }  # fmt: skip
            del operands, outer
