import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import models
from solvers import get_tableau


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 9), ("midpoint", 18), ("rk4", 36), ("bs23", 27)])
def test_resnet9_for_any_solver(solver, evaluations):
    net = models.resnet9(solver=solver)
    x = torch.rand(3, 1, 28, 28)
    assert net(x).shape == (3, 10)
    assert net.evaluations == evaluations
    # encoder 3x3 and 5x5 with batch norm, nine blocks of two 3x3 with batch norm, two linear layers with batch norm
    encoder = 9 * 16 + 2 * 16 + 25 * 16 * 32 + 2 * 32
    blocks = 9 * 2 * (9 * 32 * 32 + 2 * 32)
    head = 32 * 14 * 14 * 100 + 100 + 2 * 100 + 100 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == encoder + blocks + head


def test_resnet9_is_a_residual_network_of_unit_steps():
    net = models.resnet9().eval()
    assert net.flows[0].h == (1.0,) * 9
    x = torch.rand(2, 1, 28, 28)
    y = net.encoder(x)
    for block in net.flows[0].blocks:
        y = y + block.fields[0](0.0, y)
    torch.testing.assert_close(net(x), net.head(y))


@pytest.mark.parametrize("size", [28, 32, 33])
def test_resnet9_takes_any_size(size):
    net = models.resnet9(3, 7, features=8, depth=2, size=size, solver="bs23", total_time=1.0, norm="group")
    assert net(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_normalize_is_the_formula():
    normalize = models.Normalize([0.5, 0.25], [0.1, 0.2])
    x = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.1, (x[:, 1] - 0.25) / 0.2], 1)
    torch.testing.assert_close(normalize(x), expected)
    with pytest.raises(ValueError, match="std > 0"):
        models.Normalize([0.0], [0.0])


def test_small_ones_train():
    order2 = get_tableau("bs23").forwarding("order2")  # reads every stage
    for net, x in (
        (models.small_network(features=8, depth=2), torch.rand(4, 1, 8, 8)),
        (
            models.points_network(depth=2, solver=order2, readout="ensemble", stages="untied"),
            torch.randn(4, 2),
        ),
    ):
        F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
        unused = [name for name, p in net.named_parameters() if p.grad is None]
        assert unused == []
        assert isinstance(net.head, nn.Module)
