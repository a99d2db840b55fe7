"""Which runs of blocks go: dynamic programming over the runs of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from odenets.depth.compression.candidates import Candidate

__all__ = ["Best", "cheapest", "programmed"]

Best = Mapping[tuple[int, int], tuple[float, tuple[Candidate, ...]]]
"""By the number of blocks that go and the weight, the sum of costs and the candidates."""


def programmed(
    candidates: Sequence[Candidate],
    units: int,
    cost: Callable[[Candidate], float],
    weight: Callable[[Candidate], int],
    most: int | None = None,
) -> Best:
    """The cheapest disjoint runs for every number of blocks that go and every weight.

    The cost of several is taken for the sum of theirs, as errors are that do not amplify each other.

    Args:
        candidates: what may take the places of runs.
        units: number of units.
        cost: of a candidate.
        weight: of a candidate.
        most: the largest weight.

    >>> runs = [Candidate(0, 2, "merge", 0), Candidate(1, 3, "merge", 1)]
    >>> best = programmed(runs, units=3, cost=lambda run: run.start, weight=lambda run: 0)
    >>> best[1, 0][1] == (runs[0],)
    True
    """
    starting: dict[int, list[tuple[Candidate, float, int]]] = {}
    for one in candidates:
        starting.setdefault(one.start, []).append((one, cost(one), weight(one)))
    reached: list[dict[tuple[int, int], tuple[float, tuple[Candidate, ...]]]] = [{} for _ in range(units + 1)]
    reached[0][0, 0] = (0.0, ())
    for at in range(units):
        for key, (total, runs) in reached[at].items():
            _reach(reached[at + 1], key, total, runs)
            for one, costs, weighs in starting.get(at, ()):
                heavier = key[1] + weighs
                if most is None or heavier <= most:
                    _reach(reached[one.stop], (key[0] + one.gone, heavier), total + costs, (*runs, one))
    return reached[units]


def _reach(best: dict[tuple[int, int], tuple[float, tuple[Candidate, ...]]], key: tuple[int, int], total: float,
           runs: tuple[Candidate, ...]) -> None:  # fmt: skip
    if key not in best or total < best[key][0]:
        best[key] = total, runs


def cheapest(best: Best, fits: Callable[[int, int], bool]) -> tuple[Candidate, ...] | None:
    """The cheapest whose number of blocks and weight fit; None where there are none."""
    fitting = [(total, runs) for key, (total, runs) in best.items() if fits(*key)]
    return min(fitting, key=lambda one: one[0])[1] if fitting else None
