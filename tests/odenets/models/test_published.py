"""Networks of the literature: as many parameters, and torchvision's outputs with torchvision's weights."""

import math

import pytest
import torch
from torch import nn

from odenets import Block, Flow, NeuralODE, load_weights, measures, models, save_weights
from odenets.least_action import LeastAction
from tests.odenets.fields.published import randomize, take_weights

PARAMETERS = {
    "ResNet-50 (torchvision)": (models.resnet50, 25_557_032),
    "ResNet-101 (torchvision)": (lambda: models.resnet50(blocks=(3, 4, 23, 3)), 44_549_160),
    "ResNet-152 (torchvision)": (lambda: models.resnet50(blocks=(3, 8, 36, 3)), 60_192_808),
    "ResNeXt-50 32x4d (torchvision)": (lambda: models.resnet50(groups=32, width=4), 25_028_904),
    "Wide ResNet-50-2 (torchvision)": (lambda: models.resnet50(width=128), 68_883_240),
    "WRN-28-10 (Zagoruyko and Komodakis)": (lambda: models.wide_resnet(projections="block"), 36_479_194),
    "MobileNetV2 (pytorch-cifar)": (models.mobilenet_v2, 2_296_922),
    "MobileNetV2 (torchvision)": (lambda: models.mobilenet_v2(classes=1000, form="imagenet"), 3_504_872),
    "ViT-Ti/16 (timm)": (models.vit, 5_717_416),
    "ViT-S/16 (timm)": (lambda: models.vit(features=384, heads=6), 22_050_664),
    "ViT-B/16 (torchvision)": (lambda: models.vit(features=768, heads=12), 86_567_656),
    "ConvNeXt-T (torchvision)": (models.convnext, 28_589_128),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    make, published = PARAMETERS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == published


def in_order(network):
    """The parts of a network as its inputs pass them; a plain network registers transitions behind all flows."""
    return nn.ModuleList([network.encoder, *network.layers, network.head])


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {"layers": (2, 3, 2, 2)}),
        ({"groups": 2, "width": 4}, {"layers": (2, 3, 2, 2), "groups": 2, "width_per_group": 4}),
    ],
)
def test_resnet_is_that_of_torchvision(options, theirs):
    resnet = pytest.importorskip("torchvision").models.resnet
    published = randomize(resnet.ResNet(resnet.Bottleneck, num_classes=7, **theirs)).double().eval()
    network = models.resnet50(classes=7, blocks=(2, 3, 2, 2), **options).double().eval()
    take_weights(in_order(network), published)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(x))
    assert network.depth == 5


@pytest.mark.slow
def test_resnet50_is_that_of_torchvision():
    published = pytest.importorskip("torchvision").models.resnet50().double().eval()
    network = models.resnet50().double().eval()
    take_weights(in_order(network), published)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(x))
    assert [flow.depth for flow in network.flows] == [2, 3, 5, 2]
    assert {h for flow in network.flows for h in flow.h} == {1.0}


@pytest.mark.parametrize("training", [True, False])
def test_mobilenet_is_that_of_torchvision(training):
    mobilenet = pytest.importorskip("torchvision").models.mobilenetv2
    published = randomize(mobilenet.MobileNetV2(num_classes=7, width_mult=0.25, dropout=0.0)).double().train(training)
    network = models.mobilenet_v2(classes=7, width=0.25, form="imagenet").double().train(training)
    take_weights(in_order(network), published)
    x = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(x))
    assert [flow.depth for flow in network.flows] == [1, 2, 3, 2, 2]


def test_vit_is_that_of_torchvision():
    transformer = pytest.importorskip("torchvision").models.vision_transformer
    published = transformer.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=12, mlp_dim=48, num_classes=7
    )
    randomize(published).double().eval()
    network = models.vit(classes=7, size=32, patch=8, features=12, blocks=3).double().eval()
    tokens = network.encoder[1]
    theirs = nn.ModuleList([published.conv_proj, *published.encoder.layers, published.encoder.ln, published.heads])
    take_weights(nn.ModuleList([tokens.project, *network.layers, network.head]), theirs)
    with torch.no_grad():
        tokens.token.copy_(published.class_token)
        tokens.positions.copy_(published.encoder.pos_embedding)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(x))
    assert network.depth == 6


def test_convnext_is_that_of_torchvision():
    convnext = pytest.importorskip("torchvision").models.convnext
    channels, blocks = (8, 12, 16), (1, 2, 1)
    settings = [convnext.CNBlockConfig(c, out, n) for c, out, n in zip(channels, (12, 16, None), blocks, strict=True)]
    published = randomize(convnext.ConvNeXt(settings, num_classes=7)).double().eval()
    network = models.convnext(classes=7, blocks=blocks, channels=channels).double().eval()
    take_weights(in_order(network), published)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(x))


def test_a_wide_block_that_changes_the_channels_is_that_of_the_paper():
    """norm-ReLU before both ways, conv3x3-norm-ReLU-conv3x3 beside a 1x1 convolution."""
    network = models.wide_resnet(blocks=2, widen=1, projections="block").double().eval()
    assert [flow.depth for flow in network.flows] == [1, 1, 1]
    lead = randomize(network.transitions[0])
    norm, (conv1, norm2, _, conv2) = lead.activate[0], lead.branch
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    y = norm(x).relu()
    branch = nn.functional.conv2d(y, conv1.weight, stride=2, padding=1)
    branch = nn.functional.conv2d(norm2(branch).relu(), conv2.weight, padding=1)
    torch.testing.assert_close(lead(x), branch + nn.functional.conv2d(y, lead.shortcut.weight, stride=2))


SMALL = {
    "resnet50": lambda **o: models.resnet50(classes=3, blocks=(2, 2), width=4, **o),
    "wide_resnet": lambda **o: models.wide_resnet(classes=3, blocks=2, widen=1, projections="block", **o),
    "mobilenet_v2": lambda **o: models.mobilenet_v2(classes=3, width=0.25, **o),
    "vit": lambda **o: models.vit(classes=3, size=32, patch=8, features=12, blocks=2, **o),
    "convnext": lambda **o: models.convnext(classes=3, blocks=(1, 2), channels=(8, 16), **o),
}
each_model = pytest.mark.parametrize("name", SMALL)


@each_model
@pytest.mark.parametrize("options", [{}, {"solver": "heun", "norm": "group"}, {"stage_fields": "untied"}])
def test_every_weight_learns_by_least_action(name, options):
    network = SMALL[name](**options)
    x = torch.rand(4, 3, 32, 32)
    logits, records = network.record(x, action=measures.action)
    assert (logits.shape, records["action"].shape) == ((4, 3), (network.depth, 4))
    LeastAction(lambda0=0.1)(network, x, torch.tensor([0, 1, 2, 0])).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@each_model
def test_weights_come_back_from_a_file(name, tmp_path):
    network, other = SMALL[name](), SMALL[name]()
    x = torch.rand(2, 3, 32, 32)
    network(x)
    save_weights(network, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(network.eval()(x), other.eval()(x))


@each_model
def test_autocast_to_bfloat16_is_near(name):
    network, x = SMALL[name]().eval(), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = network(x)
    torch.testing.assert_close(narrow.float(), network(x), rtol=0.1, atol=0.1)


@each_model
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled_is_what_eager_is(name, training):
    network, x = SMALL[name]().train(training), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-3, atol=1e-4)


@each_model
def test_the_step_size_is_one_whatever_the_method(name):
    with torch.device("meta"):
        assert set(SMALL[name](solver="rk4").h) == {1.0}
        assert set(SMALL[name](solver="bs23", h=0.25).h) == {0.25}


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
def test_blocks_of_a_transformer_are_attention_and_perceptron_in_turn(stage_fields):
    network = SMALL["vit"](solver="bs23", stage_fields=stage_fields)
    kinds = [{type(field).__name__ for field in block.fields} for block in network.flows[0].blocks]
    assert kinds == [{"AttentionField"}, {"FeedForwardField"}] * 2


@pytest.mark.parametrize("stage_fields", ["tied", "untied"])
def test_strang_splitting_takes_half_steps_of_one_attention_around_the_perceptron(stage_fields, tmp_path):
    network = SMALL["vit"](splitting="strang", stage_fields=stage_fields, h=0.5).double()
    assert network.h == (0.25, 0.5, 0.25) * 2
    with torch.device("meta"):
        assert SMALL["vit"](splitting="strang", total_time=2.0).h == (0.25, 0.5, 0.25) * 2
        assert sum(p.numel() for p in models.vit(splitting="strang").parameters()) == 5_717_416
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    y = network.encoder(x)
    for m in (0, 3):
        attention, perceptron, again = (block.fields[0] for block in network.flows[0].blocks[m : m + 3])
        assert again is attention
        y = y + 0.25 * attention(0.0, y)
        y = y + 0.5 * perceptron(0.0, y)
        y = y + 0.25 * attention(0.0, y)
    torch.testing.assert_close(network(x), network.head(y))
    other = SMALL["vit"](splitting="strang", stage_fields=stage_fields, h=0.5).double()
    load_weights(other, save_weights(network, tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), network(x))


@pytest.mark.parametrize(("splitting", "order"), [("lie_trotter", 1), ("strang", 2)])
def test_splittings_have_their_orders(splitting, order):
    """Blocks that share their fields are one splitting of the sum of both, taken ever finer."""
    model = SMALL["vit"]().double()
    attention, perceptron = (block.fields[0] for block in model.flows[0].blocks[:2])
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def end(n):
        parts = {"lie_trotter": (attention, perceptron), "strang": (attention, perceptron, attention)}[splitting]
        sizes = {"lie_trotter": (1.0, 1.0), "strang": (0.5, 1.0, 0.5)}[splitting]
        blocks = [Block([field], size / n) for _ in range(n) for field, size in zip(parts, sizes, strict=True)]
        return Flow.of(blocks, solver="rk4")(x)

    exact = NeuralODE(Sum(attention, perceptron), solver="rk4", steps=64).double()(x)
    errors = [(end(n) - exact).abs().max().item() for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


class Sum(nn.Module):
    """The sum of two fields."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, t, x):
        return sum(part(t, x) for part in self.parts)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.resnet50(blocks=(3, 1)), ValueError, "blocks must be at least 2, got 1"),
        (lambda: models.resnet50(blocks=(3, 2.0)), TypeError, r"blocks must be a whole number, got 2\.0"),
        (lambda: models.wide_resnet(projections="1x1"), ValueError, "projections must be 'convolution' or 'block'"),
        (lambda: models.wide_resnet(blocks=1, projections="block"), ValueError, "blocks must be at least 2, got 1"),
        (lambda: models.mobilenet_v2(form="tiny"), ValueError, "form must be 'cifar' or 'imagenet', got 'tiny'"),
        (lambda: models.mobilenet_v2(width=0), ValueError, "width must be positive, got 0"),
        (lambda: models.mobilenet_v2(width_mult=0.5), TypeError, "takes no 'width_mult': that is width"),
        (lambda: models.vit(size=30, patch=4), ValueError, "patch must divide size, got 4 and 30"),
        (lambda: models.vit(heads=5), ValueError, "heads must divide features, got 5 and 192"),
        (lambda: models.vit(shared=True), ValueError, "shared is for one field in all blocks"),
        (lambda: models.vit(splitting="yoshida"), ValueError, "splitting must be one of lie_trotter, strang, got"),
        (lambda: models.vit(splitting="strang", h=[1.0]), TypeError, r"h must be a number, got \[1\.0\]"),
        (lambda: models.vit(num_heads=3), TypeError, "takes no 'num_heads': that is heads"),
        (lambda: SMALL["vit"]()(torch.rand(2, 3, 28, 28)), ValueError, r"x must have shape \(B, 3, 32, 32\), got"),
        (lambda: models.convnext(blocks=(1, 2)), ValueError, "blocks and channels must be as many"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
