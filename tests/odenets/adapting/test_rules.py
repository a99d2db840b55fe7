import copy

import pytest
import torch
from torch import nn

from odenets import measures
from odenets.adapting import RULES, Rule, adapt, find_blocks
from tests.odenets.adapting.models import FAMILIES, SMALL, X, small_resnet, small_vit, states_of, tv
from tests.odenets.networks import Unit


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("resnext50_32x4d", 16), ("wide_resnet50_2", 16),
        ("resnet101", 33), ("mobilenet_v2", 10), ("mobilenet_v3_small", 6), ("mobilenet_v3_large", 10),
        ("mnasnet1_0", 10), ("efficientnet_b0", 9), ("efficientnet_v2_s", 35), ("convnext_tiny", 18), ("vit_b_16", 24),
        ("swin_t", 24), ("swin_v2_t", 24),
    ],
)  # fmt: skip
def test_number_of_blocks_that_the_rules_know(name, depth):
    """Without a batch, so that the weights need not be there."""
    with torch.device("meta"):
        adapted = adapt(getattr(tv, name)(), blocks=RULES)
    assert adapted.depth == adapted.evaluations == len(adapted.names) == depth
    assert adapted.h == (1.0,) * depth


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
    assert [block.projection for block in adapted.blocks] == ["layer2.0.downsample", "layer3.0.downsample"]
    whole = adapt(small_vit(), blocks={"encoder.layers.encoder_layer_1": None})
    assert whole.depth == 1
    halves = adapt(small_vit(), blocks=["encoder.layers.encoder_layer_1"])
    assert halves.names == ("encoder.layers.encoder_layer_1 attention", "encoder.layers.encoder_layer_1 mlp")
    assert {block.block for block in halves.blocks} == {"encoder.layers.encoder_layer_1"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_by_name_say_what_is_found(family):
    """For torchvision's blocks, whose parts have the names of the rules."""
    make, x, _ = FAMILIES[family]
    model = make().eval()
    found, ruled = adapt(model, x), adapt(model, blocks=RULES)
    with torch.no_grad():
        records, expected = (each.record(x, action=measures.action)[1] for each in (found, ruled))
    assert records.layout == expected.layout
    assert torch.equal(records["action"], expected["action"])
    assert [(b.block, b.kind, b.projection) for b in found.blocks] == [
        (b.block, b.kind, b.projection) for b in ruled.blocks
    ]


def test_a_block_that_is_compiled_keeps_its_name():
    """What it wraps, ``layer1.0._orig_mod``, is no block beside it."""
    model = small_resnet().eval()
    expected = adapt(copy.deepcopy(model), blocks=RULES).names
    model.layer1[0] = torch.compile(model.layer1[0], backend="eager")
    assert adapt(model, blocks=RULES).names == expected


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


def test_a_named_block_beside_others_is_recorded_with_an_example():
    adapted = adapt(small_resnet(), SMALL, blocks=["layer1.0", "layer3.0"])
    assert adapted.names == ("layer1.0", "layer3.0")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adapt(len), TypeError, "model must be a torch module, got builtin"),
        (
            lambda: adapt(small_resnet(), ["layer1.0"]),
            TypeError,
            r"example must be .* got list: .*adapt\(model, blocks=",
        ),
        (lambda: adapt(small_resnet(), "layer1.0"), TypeError, r"example must be .* got str: .*adapt\(model, blocks="),
        (lambda: adapt(small_resnet(), small_resnet), TypeError, "example must be .* got function"),
        (
            lambda: adapt(small_resnet(), blocks=["layer1.7"]),
            ValueError,
            "no module 'layer1.7'; near to it are 'layer1",
        ),
        (
            lambda: adapt(small_resnet(), blocks={"layer2.0": "layer2.0.proj"}),
            ValueError,
            "no module 'layer2.0.proj'; near",
        ),
        (lambda: adapt(small_resnet(), blocks=[]), ValueError, "at least one name or rule"),
        (lambda: adapt(small_resnet(), blocks=[""]), ValueError, "names of modules within the model, got ''"),
        (lambda: adapt(small_resnet(), blocks=[3]), TypeError, "names of modules or rules, got int"),
        (lambda: adapt(small_resnet(), blocks=["layer1", "layer1.0"]), ValueError, "'layer1.0' lies in 'layer1'"),
        (
            lambda: adapt(small_resnet(), blocks=[Rule("mine", ("way",))]),
            ValueError,
            r"no module of ResNet, which has conv1.* fits one of the rules: mine \(way\).* by hand",
        ),
        (lambda: adapt(nn.Identity(), blocks=RULES), ValueError, "no module of Identity, which has no parts"),
        (lambda: Rule("mine"), ValueError, "rule 'mine' needs parts or a flag"),
    ],
)
def test_bad_blocks_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
