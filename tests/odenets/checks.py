"""What many tests check of networks."""

import copy
from contextlib import contextmanager

import torch


def assert_same(one, other, rtol=0.0, atol=0.0):
    """Weights and buffers."""
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=rtol, atol=atol)


def assert_same_gradients(one, other):
    torch.testing.assert_close([p.grad for p in one.parameters()], [p.grad for p in other.parameters()])


@contextmanager
def unchanged(network):
    """Modes, weights, buffers and the random state, also after an error."""
    modes, state = [module.training for module in network.modules()], copy.deepcopy(dict(network.state_dict()))
    random = torch.get_rng_state()
    try:
        yield
    finally:
        assert [module.training for module in network.modules()] == modes
        torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random)
