import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from odenets import Flow, Network, models
from odenets.initialization import INITIALIZERS, initialize
from tests.odenets.checks import assert_same


def network(**options):
    return models.resnet9(features=16, size=8, depth=2, **options)


LAYOUTS = {
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded view": lambda w: torch.stack([w, w], -1)[..., 0],
}


def layers(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_orthogonal_matrices_have_the_gain():
    for layer in layers(initialize(network(), "orthogonal", 0.05)):
        w = layer.weight.detach().flatten(1)
        w = w if len(w) <= w.shape[1] else w.T
        torch.testing.assert_close(w @ w.T, 0.05**2 * torch.eye(len(w)), atol=1e-6, rtol=1e-4)


def test_normal_weights_have_the_deviation_and_biases_if_asked():
    for biases in (False, True):
        drawn_layers = layers(initialize(network(), "normal", 5.0, biases=biases))
        assert len(drawn_layers) == 8
        for layer in drawn_layers:
            assert layer.weight.std().item() == pytest.approx(5.0, rel=0.2)
        drawn = torch.cat([layer.bias for layer in drawn_layers if layer.bias is not None])
        assert drawn.std().item() == pytest.approx(5.0 * biases, rel=0.3)


def test_kaiming_keeps_the_size_of_gradients_and_states():
    net = initialize(nn.Sequential(nn.Conv2d(8, 32, 3), nn.Linear(400, 300)), "kaiming", 0.5)
    convolution, linear = layers(net)
    assert convolution.weight.std().item() == pytest.approx(0.5 * (2 / (32 * 9)) ** 0.5, rel=0.05)
    assert linear.weight.std().item() == pytest.approx(0.5 * (2 / 400) ** 0.5, rel=0.05)


def test_all_kinds_of_convolutions_and_norms_without_biases():
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose2d(4, 8, 2), nn.LayerNorm(8, bias=False))
    initialize(net, "normal", 7.0)
    for layer in net[:2]:
        assert layer.weight.std().item() == pytest.approx(7, rel=0.25)
        assert not layer.bias.any()


@pytest.mark.parametrize("name", INITIALIZERS)
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
    assert_same(*nets)
    assert all((p == 1).all() for n, p in nets[0].named_parameters() if "norm" in n and n.endswith("weight"))
    with torch.no_grad():
        assert nets[0](torch.rand(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("layout", ["channels last", *LAYOUTS])
def test_the_memory_format_decides_nothing(name, layout):
    nets = [nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(5, 3)) for _ in "ab"]
    if layout == "channels last":
        nets[1].to(memory_format=torch.channels_last)
    for layer in layers(nets[1]) if layout != "channels last" else ():
        layer.weight = nn.Parameter(LAYOUTS[layout](layer.weight.detach()))
    strides = [p.stride() for p in nets[1].parameters()]
    for net in nets:
        torch.manual_seed(3)
        initialize(net, name, 0.1)
    torch.testing.assert_close(*([*net.parameters()] for net in nets), rtol=0, atol=0)
    assert [p.stride() for p in nets[1].parameters()] == strides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_every_precision_is_drawn(name, dtype):
    torch.manual_seed(0)
    wide = initialize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 3)).double(), name, 0.1)
    torch.manual_seed(0)
    net = initialize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 3)).to(dtype), name, 0.1)
    assert {p.dtype for p in net.parameters()} == {dtype}
    if name == "orthogonal":
        w = net[0].weight.detach().double().flatten(1)
        torch.testing.assert_close(w @ w.T, 0.01 * torch.eye(6).double(), atol=1e-4, rtol=1e-2)
    if dtype == torch.float64:
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), wide.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layer", "outputs"),
    [
        (nn.Conv2d(64, 64, 3, groups=8), 8 * 9),
        (nn.ConvTranspose2d(96, 32, 3), 32 * 9),
        (nn.Conv1d(64, 128, 5), 128 * 5),
    ],
)
def test_kaiming_counts_the_outputs_that_an_input_reaches(layer, outputs):
    torch.manual_seed(0)
    initialize(layer, "kaiming")
    assert layer.weight.std().item() == pytest.approx((2 / outputs) ** 0.5, rel=0.05)


def test_statistics_of_the_former_weights_go():
    net = network(solver="bs23")
    net.train()(torch.rand(4, 1, 8, 8))
    initialize(net, "orthogonal", 0.1)
    norms = [m for m in net.modules() if hasattr(m, "running_mean")]
    assert norms
    assert not any(norm.running_mean.any() for norm in norms)
    assert net.eval().ensemble(torch.rand(4, 1, 8, 8)).isfinite().all()


def test_all_norms_are_reset_and_frozen_layers_stay_frozen():
    net = nn.Sequential(nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True), nn.Linear(4, 4)).requires_grad_(False)
    for p in net.parameters():
        p.fill_(3.0)
    initialize(net, "orthogonal")
    assert (net[0].weight == 1).all()
    assert (net[1].weight == 1).all()
    torch.testing.assert_close(net[2].weight @ net[2].weight.T, torch.eye(4))
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: initialize(network(), "xavier"), "orthogonal, normal, kaiming, got 'xavier'"),
        (lambda: initialize(network(), "normal", 0.0), "gain must be positive"),
        (lambda: initialize(network(), "normal", float("nan")), "gain must be positive"),
        (lambda: initialize(network(), "kaiming", biases=True), "biases are drawn by 'normal' only"),
        (lambda: initialize(nn.MultiheadAttention(4, 2), "normal"), "must not hold nn.MultiheadAttention"),
        (lambda: initialize(Network(nn.Identity(), Flow(), nn.Identity()), "normal"), "flow without a field"),
        (lambda: initialize(nn.Sequential(nn.LazyLinear(2)), "normal"), "another lazy layer: call network"),
        (lambda: initialize(nn.Linear(2, 2, device="meta"), "orthogonal"), "meta device.*to_empty"),
        (
            lambda: initialize(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "normal"),
            "layer '0' computes its weight from other parameters",
        ),
        (
            lambda: initialize(prune.random_unstructured(nn.Linear(2, 2), "weight", 1), "normal"),
            "layer 'Linear' computes its weight",
        ),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()
