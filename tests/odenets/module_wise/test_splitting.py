from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets import models
from odenets.module_wise.splitting import activation_memory, balanced, even, lightest


@pytest.mark.parametrize(
    ("blocks", "modules", "sizes"), [(54, 2, [27, 27]), (54, 4, [14, 14, 13, 13]), (5, 5, [1, 1, 1, 1, 1])]
)
def test_even_modules_are_those_of_the_thesis(blocks, modules, sizes):
    assert [b - a for a, b in pairwise([0, *even(blocks, modules)])] == sizes


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_no_split_has_a_lighter_heaviest_module(weights, data):
    modules = data.draw(st.integers(1, len(weights)))
    found = lightest(weights, modules)
    assert len(found) == modules
    assert found[-1] == len(weights)

    def heaviest(ends):
        return max(sum(weights[a:b]) for a, b in pairwise([0, *ends]))

    everything = combinations(range(1, len(weights)), modules - 1)
    assert heaviest(found) == min(heaviest([*ends, len(weights)]) for ends in everything)


def test_activation_memory_falls_with_the_resolution():
    network = models.resnet110(blocks=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = activation_memory(network, torch.rand(2, 3, 32, 32))
    assert found[1] == pytest.approx(2 * found[3], rel=0.1)  # twice the channels on a quarter of the places
    assert found[3] == pytest.approx(2 * found[5], rel=0.1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_equally_heavy_modules_of_resnet110_lie_near_the_thesis_ones():
    ends = balanced(models.resnet110(), 4, torch.rand(2, 3, 96, 96))
    sizes = [b - a for a, b in pairwise([0, *ends])]
    assert all(abs(ours - theirs) <= 3 for ours, theirs in zip(sizes, [6, 8, 12, 28], strict=True)), sizes


def test_errors():
    for modules in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of blocks, 3, got {modules}"):
            even(3, modules)
        with pytest.raises(ValueError, match=f"between 1 and the number of blocks, 3, got {modules}"):
            balanced(models.resnet110(blocks=1), modules, torch.rand(2, 3, 32, 32))
