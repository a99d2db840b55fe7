"""Layers that lose nothing, and networks of them: the input from the last state."""

import pytest
import torch
from torch import nn

import odenets
from odenets.schemes import InjectivePadding, SpaceToDepth


def test_squares_become_channels():
    x = torch.randn(2, 3, 4, 6)
    y = SpaceToDepth()(x)
    for i in range(2):
        for j in range(2):
            assert torch.equal(y[:, 2 * i + j :: 4], x[:, :, i::2, j::2])
    assert torch.equal(SpaceToDepth().inverse(y), x)


def test_halves_stay_halves():
    x = torch.randn(2, 4, 6, 6)
    halves = [SpaceToDepth(3)(half) for half in x.chunk(2, 1)]
    assert torch.equal(torch.cat(halves, 1), SpaceToDepth(3)(x))


def test_zeros_are_appended_and_dropped():
    x, layer = torch.randn(2, 3, 4), InjectivePadding(3, 5)
    assert torch.equal(layer(x)[:, :3], x)
    assert not layer(x)[:, 3:].any()
    assert torch.equal(layer.inverse(layer(x)), x)


def network(scheme="revnet", encoder=None):
    encoder = nn.Sequential(InjectivePadding(3, 4), SpaceToDepth()) if encoder is None else encoder
    flows = [odenets.Flow(odenets.ConvField(c), solver=scheme, depth=5, h=0.3) for c in (8, 32)]
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    return odenets.Network(encoder, flows, head, transitions=[SpaceToDepth()])


def test_a_whole_network_is_undone_but_for_its_head():
    whole, x = network(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        *_, last = whole.steps(x)
        torch.testing.assert_close(whole.inverse(last.x1), x, rtol=1e-5, atol=1e-5)


def test_a_network_undoes_its_steps_in_training_and_its_fields_are_conditioned():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t, x, c):
            return torch.tanh(self.layer(x) + c)

    flow = odenets.Flow(Conditioned, solver="revnet", depth=4)
    whole, x = odenets.Network(nn.Identity(), flow, nn.Linear(4, 2)), torch.randn(5, 4)
    whole(x, 0.5).sum().backward()
    assert all(p.grad is not None for p in whole.parameters())
    torch.testing.assert_close(whole.inverse(flow(x, 0.5), 0.5), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: SpaceToDepth(0), ValueError, "factor must be at least 1, got 0"),
        (lambda: SpaceToDepth()(torch.ones(1, 2, 3, 4)), ValueError, r"sides that 2 divides, got \(1, 2, 3, 4\)"),
        (lambda: SpaceToDepth().inverse(torch.ones(1, 2, 3, 4)), ValueError, r"C a multiple of 4, got \(1, 2, 3, 4\)"),
        (lambda: InjectivePadding(4, 3), ValueError, "channels must be at least 4, got 3"),
        (lambda: InjectivePadding(2, 3)(torch.ones(1, 3)), ValueError, r"x must have 2 channels.*got \(1, 3\)"),
        (lambda: InjectivePadding(2, 3).inverse(torch.ones(1, 2)), ValueError, "x must have 3 channels"),
        (
            lambda: network(encoder=nn.Conv2d(3, 16, 1)).inverse(torch.randn(2, 64, 4, 4)),
            TypeError,
            "inverse: Conv2d has none; layers that have one are flows of reversible schemes",
        ),
    ],
)
def test_what_loses_something_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()
