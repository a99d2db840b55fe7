"""Rounds of solves and their floors, in turns: what else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import partial
from typing import Any

import torch

from odenets.command.speed.fields import calls, make
from odenets.command.speed.solves import ROWS, evaluations, missing_peers, passes, prepare

__all__ = ["Case", "cases", "measure"]

SHORTEST = 0.02
"""Seconds of a case in a round, at least: solve and floor are taken again and again, in turns."""
FEWEST = 3
"""Rounds."""


@dataclass
class Case:
    """A solve, and its floor: as many bare calls of its field.

    Attributes:
        field: its name.
        method: of the solver.
        who: solves.
        device: where.
        backward: whether gradients are taken too.
        evaluations: field calls of the solve.
        solve, floor: the work.
        rounds: of each the seconds of a solve and of its floor.
    """

    field: str
    method: str
    who: str
    device: torch.device
    backward: bool
    evaluations: int
    solve: Callable[[], object]
    floor: Callable[[], object]
    rounds: list[tuple[float, float]] = attribute(default_factory=list)

    def take(self, clock: Callable[[], float]) -> None:
        """One round, by a clock in seconds."""
        spent, repeats = [0.0, 0.0], 0
        while sum(spent) < SHORTEST:
            for i, work in enumerate((self.solve, self.floor)):
                begin = clock()
                work()
                _synchronize(self.device)
                spent[i] += clock() - begin
            repeats += 1
        self.rounds.append((spent[0] / repeats, spent[1] / repeats))

    @property
    def row(self) -> dict[str, Any]:
        """Medians over the rounds, in seconds, and the quartiles of their ratio."""
        ratios = [solve / floor for solve, floor in self.rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        seconds, floor = (statistics.median(times) for times in zip(*self.rounds, strict=True))
        return {
            "field": self.field, "method": self.method, "who": self.who, "device": str(self.device),
            "backward": self.backward, "evaluations": self.evaluations, "rounds": len(ratios), "seconds": seconds,
            "floor": floor, "ratio": middle, "quartiles": [low, high],
        }  # fmt: skip


def cases(names: Iterable[str], methods: Iterable[str], device: torch.device, backward: bool) -> list[Case]:
    """Every solver of these methods that is installed, on each of these fields."""
    absent, result = missing_peers(), []
    solvers = [(method, who) for method in methods for who in ROWS[method] if who not in absent]
    for name in names:
        for method, who in solvers:
            velocity, x = make(name, device)
            x.requires_grad_(backward)
            solve = prepare(method, who, velocity, x)
            n = evaluations(velocity, solve)
            floor = passes(partial(calls, velocity, x, n), backward)
            result.append(Case(name, method, who, device, backward, n, passes(solve, backward), floor))
    return result


def measure(
    measured: Iterable[Case],
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[int, float], None] = lambda *_: None,
) -> None:
    """Take rounds of all cases for some time; a first one, to warm up, does not count.

    Args:
        measured: the cases.
        seconds: how long, if three rounds do not take longer.
        clock: by which the cases are timed; ``time.process_time`` leaves out what else a busy machine does.
        tell: called after each round with its number and the seconds that are left.
    """
    measured, end, longest = list(measured), time.perf_counter() + seconds, 0.0
    for case in measured:
        case.take(clock)
        case.rounds.clear()
    count = 0
    while count < FEWEST or time.perf_counter() + longest < end:
        begin = time.perf_counter()
        for case in measured:
            case.take(clock)
        count, longest = count + 1, max(longest, time.perf_counter() - begin)
        tell(count, max(0.0, end - time.perf_counter()))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
