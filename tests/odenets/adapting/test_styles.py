"""Networks in styles of many authors: what ``adapt`` finds and records is what their authors would count."""

import copy

import pytest
import torch

from tests.odenets.adapting.styles import STYLES


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.mark.parametrize("training", [False, True])
def test_a_referee_computes_what_the_network_computes(style, training):
    plain = style.network().train(training)
    x = style.batch()
    torch.manual_seed(5)
    output = copy.deepcopy(plain)(*clones(x))
    torch.manual_seed(5)
    expected, steps = copy.deepcopy(plain).expected(*clones(x))
    torch.testing.assert_close(output, expected)
    assert len(steps) > 0 or training
    for _, x0, x1 in steps:
        assert x0.shape == x1.shape
        assert not torch.equal(x0, x1)
    for parameter in plain.parameters():
        parameter.grad = None
    sum(leaf.float().square().sum() for leaf in torch.utils._pytree.tree_leaves(output)).backward()


def clones(inputs):
    return tuple(x.clone() for x in inputs)
