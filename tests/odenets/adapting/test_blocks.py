import copy

import pytest
import torch
from torch import nn

from odenets import measures
from odenets.adapting import RULES, Rule, adapt
from odenets.adapting.blocks import find_blocks
from tests.odenets.adapting.models import X, small_resnet, small_vit, tv, zero_branches
from tests.odenets.networks import Calling, Unit

TIMM = {
    "resnet18": 8, "resnext50_32x4d": 16, "resnetv2_50": 16, "regnetx_002": 13, "regnety_002": 13,
    "mobilenetv2_035": 10, "mobilenetv3_small_100": 6, "efficientnet_lite0": 9, "tf_efficientnetv2_b0": 15,
    "convnext_atto": 12, "test_vit": 12, "swin_tiny_patch4_window7_224": 24, "swinv2_tiny_window8_256": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("resnext50_32x4d", 16), ("wide_resnet50_2", 16),
        ("resnet101", 33), ("mobilenet_v2", 10), ("mobilenet_v3_small", 6), ("mobilenet_v3_large", 10),
        ("mnasnet1_0", 10), ("efficientnet_b0", 9), ("efficientnet_v2_s", 35), ("convnext_tiny", 18), ("vit_b_16", 24),
        ("swin_t", 24), ("swin_v2_t", 24), ("vgg11", 5), ("vgg16_bn", 10), ("vgg19", 13), ("alexnet", 2),
    ],
)  # fmt: skip
def test_number_of_blocks(name, depth):
    with torch.device("meta"):
        adapted = adapt(getattr(tv, name)())
    assert adapted.depth == adapted.evaluations == len(adapted.names) == depth
    assert adapted.h == (1.0,) * depth


@pytest.mark.parametrize("name", ["densenet121", "squeezenet1_0", "shufflenet_v2_x0_5", "maxvit_t"])
def test_networks_that_are_neither_residual_nor_plain_are_refused(name):
    with torch.device("meta"):
        model = getattr(tv, name)(**({"input_size": (224, 224)} if name == "maxvit_t" else {}))
    with pytest.raises(ValueError, match=r"no residual blocks found in .* Looked for .*downsample.* by hand"):
        adapt(model)


def test_modules_of_a_block_s_class_that_fit_no_rule_are_told():
    plain = [Calling(lambda m, x: m.conv1(x) + x, conv1=nn.Conv2d(n, n, 1)) for n in (3, 4)]
    wider = Calling(lambda m, x: m.conv1(x) + m.shortcut(x), conv1=nn.Conv2d(3, 4, 1), shortcut=nn.Conv2d(3, 4, 1))
    model = nn.Sequential(plain[0], wider, plain[1])
    with pytest.warns(UserWarning, match=r"2 modules such as '0' are not .* class Calling .* lack one of conv1, sh"):
        assert adapt(model).names == ("1",)
    assert adapt(model, blocks={"0": None, "1": "1.shortcut", "2": None}).names == ("0", "1", "2")


def states_of(model, first, last):
    """The input of one module and the output of another for X."""
    states = []

    def look(module, args, output=None):
        states.append((args[0] if output is None else output).clone())

    first, last = model.get_submodule(first), model.get_submodule(last)
    with first.register_forward_pre_hook(look), last.register_forward_hook(look):
        model(X)
    return states


def test_plain_networks_step_by_the_layers_that_keep_the_shape():
    model = nn.Sequential()
    model.features = tv.vgg.make_layers([4, 4, "M", 8, 8, 8, "M"], batch_norm=True)
    model.flatten = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.classifier = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 5))
    adapted = adapt(model.eval())
    assert adapted.names == (
        "features.3:features.5", "features.10:features.12", "features.13:features.15", "classifier.2:classifier.3",
    )  # fmt: skip
    with torch.no_grad():
        _, records = adapted.record(X, action=measures.action)
        for name, values in zip(adapted.names, records["action"], strict=True):
            x0, x1 = states_of(model, *name.split(":"))
            torch.testing.assert_close(values, (x1 - x0).square().flatten(1).mean(1))
    assert records.starts == (0, 1, 3)


def test_plain_layers_are_told_from_those_that_change_the_shape():
    same = nn.Conv2d(4, 4, 5, padding="same", dilation=2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), same, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Sequential(
            nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False), nn.GroupNorm(2, 4), nn.SiLU()), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3), nn.Linear(3, 3),
    )  # fmt: skip
    assert adapt(model).names == ("1", "4.0:4.2", "6", "10")
    model(X)
    assert adapt(model).record(X, action=measures.action)[1]["action"].shape == (4, 2)


def test_layers_may_share_an_activation():
    """One module that stands at several places (vision#3802)."""
    activation = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 2))
    own = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4])
    x = torch.randn(3, 4)
    (output, records), (expected, others) = (adapt(one).record(x, action=measures.action) for one in (model, own))
    assert records.blocks == others.blocks == ("0:1", "2:3")
    torch.testing.assert_close((output, records["action"]), (expected, others["action"]), rtol=0, atol=0)


def test_a_block_that_is_compiled_keeps_its_name():
    """What it wraps, ``layer1.0._orig_mod``, is no block beside it."""
    model = small_resnet().eval()
    expected = adapt(copy.deepcopy(model)).names
    model.layer1[0] = torch.compile(model.layer1[0], backend="eager")
    assert adapt(model).names == expected


def units():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Unit(4, 4), Unit(4, 6), Unit(6, 6), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (["1", "3"], ("1", "3")),
        (["3", "1"], ("1", "3")),
        ("1", ("1",)),
        ({"1": None, "2": "2.widen"}, ("1", "2")),
        (["1:3"], None),
        (["1.way"], ("1.way",)),
        ([Rule("mine", parts=("way", "widen"), shortcut="widen")], ("1", "2", "3")),
        ([*RULES, Rule("mine", parts=("way",), shortcut="widen"), "2.way"], None),
        ([*RULES, Rule("mine", parts=("way",), shortcut="widen"), "1"], ("1", "2", "3")),
    ],
)
def test_blocks_by_name_and_by_rule(blocks, names):
    model = units()
    model(X)
    if names is None:
        with pytest.raises(ValueError, match=r"changes the shape|'2.way' lies in '2'"):
            adapt(model, blocks=blocks).record(X, action=measures.action)
        return
    adapted = adapt(model, blocks=blocks)
    assert adapted.names == names
    steps = adapted.steps(X)
    assert len(steps) == len(names)
    for name, step in zip(names, steps, strict=True):
        unit = model.get_submodule(name)
        x, _ = states_of(model, name, name)
        torch.testing.assert_close(step.residue, unit.way(x) if isinstance(unit, Unit) else unit(x) - step.x0)


def test_a_named_block_that_fits_a_rule_is_what_the_rule_says():
    adapted = adapt(small_resnet(), blocks=["layer2.0", "layer3.0"])
    assert [block.shortcut for block in adapted.blocks] == ["layer2.0.downsample", "layer3.0.downsample"]
    whole = adapt(small_vit(), blocks={"encoder.layers.encoder_layer_1": None})
    assert whole.depth == 1
    assert adapt(small_vit(), blocks=["encoder.layers.encoder_layer_1"]).depth == 2


@pytest.mark.parametrize(("name", "depth"), TIMM.items())
def test_timm_models(name, depth):
    """The number of blocks, and that those whose branch is zero do not move their state."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, *(model.default_cfg["input_size"] if model.default_cfg.get("fixed_input_size") else X.shape[1:]))
    adapted = adapt(model)
    assert adapted.depth == depth
    with torch.no_grad():
        output, records = adapted.record(x, action=measures.action)
        assert torch.equal(output, model(x))
        assert records["action"].shape == (depth, 1)
        zero_branches(adapted)
        steps = adapted.steps(x)
    projections = {block.name for block in adapted.blocks if block.shortcut}
    for block, step in zip(adapted.names, steps, strict=True):
        moved = step.x1 != step.x0
        assert not moved.any() or (block in projections and torch.equal(step.x1, step.x0.relu()))


@pytest.mark.filterwarnings("ignore:the branches of .* end in a batch norm")
@pytest.mark.parametrize("name", ["resnet26", "seresnet18", "regnety_002"])
def test_branches_of_timm_models_end_where_they_are_added(name):
    """With squeeze-excitation and stochastic depth behind the last batch norm."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # the last of a block begins at 0
    adapted = adapt(model, residue="branch")
    x = torch.randn(4, *X.shape[1:])
    with torch.no_grad():
        for step in adapted.train().steps(x):
            torch.testing.assert_close(step.x1, (step.x0 + step.residue).relu())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adapt(len), TypeError, "model must be a torch module, got builtin"),
        (lambda: adapt(nn.Identity()), ValueError, "no residual blocks found in Identity, which has no parts"),
        (lambda: adapt(small_resnet(), blocks=["layer1.7"]), ValueError, "no module 'layer1.7'; near to it are 'layer1.0'"),
        (lambda: adapt(small_resnet(), blocks={"layer2.0": "layer2.0.proj"}), ValueError, "no module 'layer2.0.proj'; near"),
        (lambda: adapt(small_resnet(), blocks=[]), ValueError, "at least one name or rule"),
        (lambda: adapt(small_resnet(), blocks=[""]), ValueError, "names of modules within the model, got ''"),
        (lambda: adapt(small_resnet(), blocks=[3]), TypeError, "names of modules or rules, got int"),
        (lambda: adapt(small_resnet(), blocks=["layer1", "layer1.0"]), ValueError, "'layer1.0' lies in 'layer1'"),
        (lambda: adapt(small_resnet(), blocks=[Rule("mine", ("way",))]), ValueError, r"no residual blocks .* mine \(way\)"),
        (lambda: Rule("mine"), ValueError, "rule 'mine' needs parts or a flag"),
    ],
)
def test_bad_blocks_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_class_stands_for_all_modules_of_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.layer(x)

    model = nn.Sequential(nn.Linear(2, 4), Residual(), nn.Sequential(Residual()))
    assert find_blocks(model, Residual) == find_blocks(model, [Residual]) == find_blocks(model, ["1", "2.0"])
    with pytest.raises(ValueError, match="the model holds no Conv2d: its modules are of Linear, Residual, Sequential"):
        find_blocks(model, nn.Conv2d)
