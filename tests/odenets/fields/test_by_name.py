"""Every field of images by its name: what each must be, and the methods of the package on it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, Network, NeuralODE, fields, initialize, load_weights, measures, save_weights
from odenets.least_action import LeastAction
from odenets.normalization import StageBatchNorm

NAMES = fields.names()
IMAGES = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
each_field = pytest.mark.parametrize("name", NAMES)


def network(name, solver="euler", **options):
    flow = Flow(lambda: fields.make(name, 8, **options), depth=2, h=0.5, solver=solver)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return Network(nn.Conv2d(1, 8, 3, padding=1), flow, head)


@each_field
@pytest.mark.parametrize("channels", [3, 8, 10, 32])
def test_it_keeps_the_shape_and_dtype_of_images(name, channels):
    field = fields.make(name, channels).double()
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    v = field(0.5, x)
    assert (v.shape, v.dtype) == (x.shape, x.dtype)
    assert torch.equal(field(torch.tensor(0.0), x), v)


@each_field
@pytest.mark.parametrize("channels", [1, 2, 5, 31])
def test_it_takes_any_number_of_channels(name, channels):
    assert fields.make(name, channels)(0.0, torch.randn(2, channels, 5, 4)).shape == (2, channels, 5, 4)


@each_field
def test_reset_draws_every_matrix_anew(name):
    field = fields.make(name, 8)
    before = [p.clone() for p in field.parameters()]
    field.reset_parameters()
    same = [p.ndim for p, old in zip(field.parameters(), before, strict=True) if torch.equal(p, old)]
    assert all(ndim == 1 or name == "convnext" for ndim in same)  # norms, and the scale of ConvNeXt
    assert len(same) < len(before)


@each_field
def test_initializers_take_it(name):
    initialize(fields.make(name, 8), "orthogonal")


@each_field
@pytest.mark.parametrize("norm", ["batch", "group", "layer", None])
def test_it_takes_every_norm_with_statistics_of_each_stage(name, norm):
    flow = Flow(fields.make(name, 8, norm=norm), depth=2, solver="heun", h=0.5)
    assert flow(IMAGES).shape == IMAGES.shape
    norms = [module for module in flow.modules() if isinstance(module, StageBatchNorm)]
    assert (len(norms) > 0) == (norm == "batch")
    assert all(module.batches.tolist() == [1, 1] for module in norms)
    assert flow.eval()(IMAGES).isfinite().all()


@each_field
def test_action_is_recorded_and_least_action_has_gradients(name):
    net = network(name)
    logits, records = net.record(IMAGES[:, :1], action=measures.action)
    assert (logits.shape, records["action"].shape) == ((3, 3), (2, 3))
    steps = net.eval().steps(IMAGES[:, :1])
    expected = torch.stack([0.5 * step.stages[0].square().mean((1, 2, 3)) for step in steps])
    torch.testing.assert_close(net.record(IMAGES[:, :1], action=measures.action)[1]["action"], expected)
    LeastAction(lambda0=0.1)(net.train(), IMAGES[:, :1], torch.tensor([0, 1, 2])).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@each_field
def test_weights_come_back_from_a_file(name, tmp_path):
    net, other = network(name), network(name)
    net(IMAGES[:, :1])
    save_weights(net, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(net.eval()(IMAGES[:, :1]), other.eval()(IMAGES[:, :1]))


@each_field
def test_autocast_to_bfloat16_is_near(name):
    net = network(name).eval()
    expected = net(IMAGES[:, :1])
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(IMAGES[:, :1])
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


@each_field
def test_a_neural_ode_integrates_it(name):
    ode = NeuralODE(fields.make(name, 8).eval(), solver="rk4", steps=2).eval()
    assert ode(IMAGES).shape == IMAGES.shape


@each_field
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled_is_what_eager_is(name, training):
    net = network(name).train(training)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES[:, :1]), net(IMAGES[:, :1]), rtol=1e-4, atol=1e-5)


def test_an_unknown_name_is_an_error_with_all_names():
    with pytest.raises(ValueError, match=r"name must be one of antisymmetric, .*, resnext, got 'resnet'"):
        fields.make("resnet", 8)
    with pytest.raises(TypeError, match=r"channels must be a whole number, got 8\.0"):
        fields.make("conv", 8.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        fields.make("conv", 8, width=3)
