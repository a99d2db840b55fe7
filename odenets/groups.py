"""Groups of neighboring blocks in whose place comes one: which there are, how many, and which cost least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

from odenets.errors import check_count

__all__ = [
    "RULES",
    "STAYS",
    "Choice",
    "Group",
    "Rule",
    "Stays",
    "check_groups",
    "groups_by_place",
    "partition",
    "place_of",
    "share_blocks",
    "split_blocks",
]

Rule = Literal["error", "difference", "even", "output"]
Stays = Literal["first", "middle", "last", "best"]
RULES, STAYS = ("error", "difference", "even", "output"), ("first", "middle", "last", "best")
Choice = tuple[float, int]
"""The error of a merged step, and the block that stays."""


class Group(NamedTuple):
    """Neighboring blocks of a flow in whose place come one block, or the pieces of one.

    Attributes:
        first: the first of the blocks, whose step sizes are summed.
        last: the block behind the last of them.
        stays: the block whose fields stay.
        pieces: blocks with these fields among which the time is divided; 1 but where a flow gets deeper.

    >>> Group(0, 4, stays=0)
    Group(first=0, last=4, stays=0, pieces=1)
    """

    first: int
    last: int
    stays: int
    pieces: int = 1


def check_groups(groups: Sequence[Group], depth: int) -> None:
    """That groups are all blocks of a flow in order, without pieces."""
    bounds = [0, *(group.last for group in groups)]
    right = all(g.first == begin and begin <= g.stays < g.last for g, begin in zip(groups, bounds, strict=False))
    if not right or bounds[-1] != depth:
        raise ValueError(f"groups must hold each of {depth} blocks once and in order, got {list(groups)}")
    if any(group.pieces != 1 for group in groups):
        raise ValueError("groups must merge blocks, which needs no copies, got pieces of a block: take at_depth")


def share_blocks(blocks: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Blocks of each flow; a total is shared in proportion to what they have, by largest remainders, one at least."""
    if isinstance(blocks, Sequence):
        if len(blocks) != len(depths):
            raise ValueError(f"blocks must be a number, or one for each of {len(depths)} flows, got {list(blocks)}")
        for count in blocks:
            check_count("blocks", count, 1)
        return [*blocks]
    check_count("blocks", blocks, 1)
    if blocks < len(depths):
        raise ValueError(
            f"blocks must be at least {len(depths)}, one for each flow, got {blocks}: "
            "odenets.depth.without_flow(network) has none"
        )
    shares = [max(1.0, blocks * depth / sum(depths)) for depth in depths]
    counts = [math.floor(share) for share in shares]
    while (left := blocks - sum(counts)) != 0:
        step = 1 if left > 0 else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda i: step * (shares[i] - counts[i]))] += step
    return counts


def place_of(stays: str, first: int, last: int) -> int:
    """The block that stays by its place in a group; the first where that is none."""
    return {"middle": (first + last - 1) // 2, "last": last - 1}.get(stays, first)


def groups_by_place(depth: int, stays: str) -> dict[tuple[int, int], Choice]:
    """Of every group the block that stays by its place."""
    return {(a, b): (0.0, place_of(stays, a, b)) for a, b in combinations(range(depth + 1), 2)}


def partition(
    h: Sequence[float], errors: Mapping[tuple[int, int], Choice], count: int | None, tolerance: float | None, rule: Rule
) -> list[Group]:
    """The groups with the least cost, so many, or as few as keep the tolerance; dynamic programming over their ends."""
    depth = len(h)

    def cost(a: int, b: int) -> float:
        return (math.fsum(h[a:b]) if rule == "even" else errors[a, b][0]) ** 2

    def least(allowed: Callable[[int, int], bool]) -> list[dict[int, tuple[float, int]]]:
        """For n groups that end at b, the least cost and where the last begins."""
        table: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
        for _ in range(depth):
            table.append({})
            for b in range(1, depth + 1):
                ways = [(table[-2][a][0] + cost(a, b), a) for a in table[-2] if a < b and allowed(a, b)]
                if ways:
                    table[-1][b] = min(ways)
        return table

    def bounds(table: list[dict[int, tuple[float, int]]], n: int) -> list[int]:
        ends = [depth]
        for m in range(n, 0, -1):
            ends.append(table[m][ends[-1]][1])
        return ends[::-1]

    def kept(a: int, b: int) -> bool:
        return b - a == 1 or tolerance is None or errors[a, b][0] <= tolerance

    if count is None and rule == "even":
        table = least(lambda a, b: True)
        each = (bounds(table, n) for n in range(1, depth + 1))
        ends = next(ends for ends in each if all(kept(*pair) for pair in pairwise(ends)))
    else:
        table = least(kept)
        ends = bounds(table, count or next(n for n in range(1, depth + 1) if depth in table[n]))
    return [Group(a, b, errors[a, b][1]) for a, b in pairwise(ends)]


def split_blocks(h: Sequence[float], count: int) -> list[Group]:
    """Every block, some in pieces, so many as there are to be: the largest step is cut first."""
    pieces = [1] * len(h)
    while sum(pieces) < count:
        pieces[max(range(len(h)), key=lambda m: h[m] / pieces[m])] += 1
    return [Group(m, m + 1, m, n) for m, n in enumerate(pieces)]
