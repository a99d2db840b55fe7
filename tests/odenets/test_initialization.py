import pytest
import torch
from torch import nn

from odenets import Flow, Network, models
from odenets.initialization import INITIALISERS, initialize


def network(**options):
    return models.resnet9(features=16, size=8, depth=2, **options)


def layers(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_orthogonal_matrices_have_the_gain():
    for layer in layers(initialize(network(), "orthogonal", 0.05)):
        w = layer.weight.detach().flatten(1)
        w = w if len(w) <= w.shape[1] else w.T
        torch.testing.assert_close(w @ w.T, 0.05**2 * torch.eye(len(w)), atol=1e-6, rtol=1e-4)


def test_normal_weights_have_the_deviation_and_biases_if_asked():
    for biases in (False, True):
        found = layers(initialize(network(), "normal", 5.0, biases=biases))
        assert len(found) == 8
        for layer in found:
            assert layer.weight.std().item() == pytest.approx(5.0, rel=0.2)
        drawn = torch.cat([layer.bias for layer in found if layer.bias is not None])
        assert drawn.std().item() == pytest.approx(5.0 * biases, rel=0.3)


def test_kaiming_keeps_the_size_of_gradients_and_states():
    net = initialize(nn.Sequential(nn.Conv2d(8, 32, 3), nn.Linear(400, 300)), "kaiming", 0.5)
    convolution, linear = layers(net)
    assert convolution.weight.std().item() == pytest.approx(0.5 * (2 / (32 * 9)) ** 0.5, rel=0.05)
    assert linear.weight.std().item() == pytest.approx(0.5 * (2 / 400) ** 0.5, rel=0.05)


def test_all_kinds_of_convolutions_and_norms_without_biases():
    net = initialize(
        nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose2d(4, 8, 2), nn.LayerNorm(8, bias=False)), "normal", 7.0
    )
    for layer in net[:2]:
        assert layer.weight.std().item() == pytest.approx(7, rel=0.25)
        assert not layer.bias.any()


@pytest.mark.parametrize("name", INITIALISERS)
def test_norms_are_reset_and_the_seed_decides(name):
    nets = []
    for _ in range(2):
        net = network()
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d) or "StageBatchNorm" in type(norm).__name__:
                nn.init.constant_(norm.weight, 3.0)
        torch.manual_seed(5)
        assert initialize(net, name) is net
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
    assert all((p == 1).all() for n, p in nets[0].named_parameters() if "norm" in n and n.endswith("weight"))
    with torch.no_grad():
        assert nets[0](torch.rand(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: initialize(network(), "xavier"), "orthogonal, normal, kaiming, got 'xavier'"),
        (lambda: initialize(network(), "normal", 0.0), "gain must be positive"),
        (lambda: initialize(network(), "normal", float("nan")), "gain must be positive"),
        (lambda: initialize(network(), "kaiming", biases=True), "biases are drawn by 'normal' only"),
        (lambda: initialize(nn.MultiheadAttention(4, 2), "normal"), "must not hold nn.MultiheadAttention"),
        (lambda: initialize(Network(nn.Identity(), Flow(), nn.Identity()), "normal"), "flow without a field"),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()
