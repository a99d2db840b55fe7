import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odenets.groups import Group, check_groups, groups_by_place, partition, share_blocks, split_blocks

H = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def ways(depth, count):
    """All partitions into so many groups."""
    return [[*pairwise((0, *ends, depth))] for ends in combinations(range(1, depth), count - 1)]


@given(H, st.data())
def test_the_groups_are_those_with_the_least_cost(h, data):
    depth = len(h)
    count = data.draw(st.integers(1, depth))
    pairs = [*combinations(range(depth + 1), 2)]
    errors = dict(
        zip(pairs, data.draw(st.lists(st.floats(0, 1), min_size=len(pairs), max_size=len(pairs))), strict=True)
    )
    found = partition(h, {pair: (error, pair[0]) for pair, error in errors.items()}, count, None, "error")
    check_groups(found, depth)
    least = min(math.fsum(errors[pair] ** 2 for pair in way) for way in ways(depth, count))
    assert math.fsum(errors[group.first, group.last] ** 2 for group in found) == pytest.approx(least)
    even = partition(h, groups_by_place(depth, "last"), count, None, "even")
    least = min(sum(sum(h[a:b]) ** 2 for a, b in way) for way in ways(depth, count))
    assert sum(sum(h[g.first : g.last]) ** 2 for g in even) == pytest.approx(least)
    assert all(group.stays == group.last - 1 for group in even)


@given(H, st.floats(0, 1), st.data())
def test_a_tolerance_takes_the_fewest_groups_that_keep_it(h, tolerance, data):
    depth = len(h)
    pairs = [*combinations(range(depth + 1), 2)]
    errors = dict(
        zip(pairs, data.draw(st.lists(st.floats(0, 1), min_size=len(pairs), max_size=len(pairs))), strict=True)
    )
    choices = {pair: (error, pair[0]) for pair, error in errors.items()}

    def kept(way):
        return all(b - a == 1 or errors[a, b] <= tolerance for a, b in way)

    found = partition(h, choices, None, tolerance, "error")
    assert kept([group[:2] for group in found])
    assert len(found) == next(n for n in range(1, depth + 1) if any(map(kept, ways(depth, n))))
    even = partition(h, choices, None, tolerance, "even")
    assert kept([group[:2] for group in even])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_a_total_is_shared_in_proportion(depths, data):
    total = data.draw(st.integers(len(depths), 3 * sum(depths)))
    counts = share_blocks(total, depths)
    assert sum(counts) == total
    assert min(counts) >= 1
    assert share_blocks(sum(depths), depths) == depths
    assert share_blocks(2 * sum(depths), depths) == [2 * depth for depth in depths]


@given(H, st.integers(0, 12))
def test_the_largest_step_is_cut_first(h, more):
    groups = split_blocks(h, len(h) + more)
    assert [group[:3] for group in groups] == [(m, m + 1, m) for m in range(len(h))]
    assert sum(group.pieces for group in groups) == len(h) + more
    assert [group.pieces for group in split_blocks(h[:1] * 4, 8)] == [2] * 4
    assert [group.pieces for group in split_blocks([1.0, 3.0], 3)] == [1, 2]


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [Group(0, 2, 0)],
        [Group(0, 1, 0), Group(2, 3, 2)],
        [Group(0, 3, 3)],
        [Group(0, 3, 0), Group(3, 3, 3)],
        [Group(1, 3, 1), Group(0, 1, 0)],
    ],
)
def test_groups_hold_each_block_once_and_in_order(groups):
    with pytest.raises(ValueError, match="each of 3 blocks once and in order"):
        check_groups(groups, 3)


def test_pieces_are_no_merges():
    with pytest.raises(ValueError, match="take at_depth"):
        check_groups([Group(0, 1, 0, pieces=2)], 1)


def test_shares_are_refused_where_a_flow_would_be_empty():
    with pytest.raises(ValueError, match=r"at least 2, one for each flow, got 1: odenets.depth.without_flow"):
        share_blocks(1, [3, 3])
    with pytest.raises(ValueError, match=r"one for each of 2 flows, got \[1\]"):
        share_blocks([1], [3, 3])
    with pytest.raises(ValueError, match="blocks must be at least 1"):
        share_blocks([0, 1], [3, 3])
    with pytest.raises(TypeError, match="blocks must be a whole number"):
        share_blocks(1.5, [3, 3])
