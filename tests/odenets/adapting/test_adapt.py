import copy
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from odenets import Flow, Network, measures
from odenets.adapting import RULES, AdaptedModel, Rule, adapt
from odenets.adapting.tracing import cut_adapted
from odenets.analysis.memory import measure_memory
from odenets.training import data

tv = pytest.importorskip("torchvision.models")

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = X[:, :, :32, :32].contiguous()


def small_resnet(block=tv.resnet.BasicBlock, layers=(1, 1, 1, 1), **options):
    return tv.ResNet(block, list(layers), num_classes=5, **options)


def small_regnet():
    parameters = tv.regnet.BlockParams.from_init_params(depth=5, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return tv.RegNet(parameters, num_classes=5)


def small_convnext():
    setting = [tv.convnext.CNBlockConfig(16, 32, 2), tv.convnext.CNBlockConfig(32, None, 2)]
    return tv.ConvNeXt(setting, num_classes=5, layer_scale=0.5)


def small_vit():
    return tv.VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def small_swin(**options):
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **options)


def small_swin_v2():
    v2 = tv.swin_transformer
    return small_swin(block=v2.SwinTransformerBlockV2, downsample_layer=v2.PatchMergingV2)


FAMILIES = {
    "resnet": (small_resnet, SMALL, (0, 1, 2, 3)),
    "bottleneck": (lambda: small_resnet(tv.resnet.Bottleneck, (2, 1, 1, 1)), SMALL, (0, 2, 3, 4)),
    "resnext": (lambda: small_resnet(tv.resnet.Bottleneck, groups=4, width_per_group=16), SMALL, (0, 1, 2, 3)),
    "wide resnet": (lambda: small_resnet(tv.resnet.Bottleneck, width_per_group=128), SMALL, (0, 1, 2, 3)),
    "regnet": (small_regnet, X, (0, 1, 4)),
    "mobilenet v2": (lambda: tv.mobilenet_v2(num_classes=5, width_mult=0.5), X, (0, 1, 3, 6, 8)),
    "mobilenet v3": (lambda: tv.mobilenet_v3_small(num_classes=5), X, (0, 1, 3, 4)),
    "mnasnet": (lambda: tv.mnasnet0_5(num_classes=5), X, (0, 2, 4, 6, 7)),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=5), X, (0, 1, 2, 4, 6)),
    "convnext": (small_convnext, X, (0, 2)),
    "vit": (small_vit, SMALL, (0,)),
    "swin": (small_swin, X, (0, 4)),
    "swin v2": (small_swin_v2, X, (0, 4)),
}
TRANSFORMERS = ["vit", "swin", "swin v2"]

TIMM = {
    "resnet18": 8, "resnext50_32x4d": 16, "resnetv2_50": 16, "regnetx_002": 13, "regnety_002": 13,
    "mobilenetv2_035": 10, "mobilenetv3_small_100": 6, "efficientnet_lite0": 9, "tf_efficientnetv2_b0": 15,
    "convnext_atto": 12, "test_vit": 12, "swin_tiny_patch4_window7_224": 24, "swinv2_tiny_window8_256": 24,
}  # fmt: skip


def zero_branches(adapted, *parts):
    """Let every branch, or these parts of it, return 0; shortcuts stay."""
    modules = dict(adapted.model.named_modules())
    kept = {p for place in adapted.blocks if place.shortcut for p in modules[place.shortcut].parameters()}
    for place in adapted.blocks:
        for block in [modules[f"{place.first}.{part}"] for part in parts] or [modules[place.first]]:
            for p in block.parameters():
                if p not in kept:
                    nn.init.zeros_(p)


# -- which blocks are found -----------------------------------------------------------------------------------------


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
    class Block(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.conv1 = nn.Conv2d(i, o, 1)
            if i != o:
                self.shortcut = nn.Conv2d(i, o, 1)

        def forward(self, x):
            return self.conv1(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x)

    model = nn.Sequential(Block(3, 3), Block(3, 4), Block(4, 4))
    with pytest.warns(UserWarning, match=r"2 modules such as '0' are not .* class Block .* lack one of conv1, sh"):
        assert adapt(model).names == ("1",)
    named = adapt(model, {"0": None, "1": "1.shortcut", "2": None})
    assert named.names == ("0", "1", "2")


# -- what the steps are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_and_the_gradients_stay_those_of_the_model(family):
    make, x, starts = FAMILIES[family]
    plain = make()
    adapted = adapt(copy.deepcopy(plain))
    torch.manual_seed(1)  # of dropout and stochastic depth
    expected = plain(x)
    torch.manual_seed(1)
    output, records = adapted.record(x, action=measures.action)
    assert torch.equal(output, expected)
    assert records["action"].shape == (adapted.depth, 2)
    assert records.starts == starts
    expected.square().sum().backward()
    output.square().sum().backward()
    for p, q in zip(plain.parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_those_of_the_steps(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    with torch.no_grad():
        steps = adapted.steps(x)
        output, records = adapted.record(
            x, action=measures.action, residue=measures.residue, cosine=measures.cosine, norm=measures.displacement
        )
        assert torch.equal(adapted(x), output)
    assert [step.t for step in steps] == list(range(adapted.depth))
    for m, step in enumerate(steps):
        assert step.h == 1
        assert step.tableau.name == "euler"
        torch.testing.assert_close(step.residue, step.x1 - step.x0)
        square = (step.x1 - step.x0).square().flatten(1).mean(1)
        for name in ("action", "residue"):
            torch.testing.assert_close(records[name][m], square)
        torch.testing.assert_close(records["norm"][m], square.sqrt())
        r = step.residue.double().flatten(1)
        cosine = (r.mean(1) / r.square().mean(1).sqrt()).float()
        torch.testing.assert_close(records["cosine"][m], cosine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_whose_branch_is_zero_does_not_move_its_state(family):
    """But for the ReLU after a projection."""
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    zero_branches(adapted)
    with torch.no_grad():
        steps = adapted.steps(x)
    projections = {place.name for place in adapted.blocks if place.shortcut}
    assert any(step.x0.abs().amax() > 0 for step in steps)
    for name, step in zip(adapted.names, steps, strict=True):
        assert torch.equal(step.x1, step.x0.relu() if name in projections else step.x0)


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("half", [0, 1])
def test_the_two_steps_of_a_transformer_block_are_its_attention_and_its_mlp(family, half):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    for name, p in adapted.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)  # so that every branch moves
    vit = family == "vit"
    zero_branches(
        adapted, *[("ln_1", "self_attention") if vit else ("norm1", "attn"), ("ln_2" if vit else "norm2", "mlp")][half]
    )
    with torch.no_grad():
        action = adapted.record(x, action=measures.action)[1]["action"].amax(1)
    assert (action[half::2] == 0).all()
    assert (action[1 - half :: 2] > 0).all()


def test_projections_start_from_their_output():
    adapted = adapt(small_resnet(layers=(1, 2, 1, 1)).eval())
    with torch.no_grad():
        first, second, third, *_ = adapted.steps(X)
        model = adapted.model
        x = model.maxpool(model.relu(model.bn1(model.conv1(X))))
        torch.testing.assert_close(first.x0, x)
        torch.testing.assert_close(second.x0, model.layer2[0].downsample(model.layer1(x)))
        torch.testing.assert_close(second.x1, model.layer2[0](model.layer1(x)))
        torch.testing.assert_close(third.x0, second.x1)


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
        x, states = X, []
        for i, layer in enumerate(model.features):
            if i in (3, 10, 13):
                states.append(x)
            x = layer(x)
            if i in (5, 12, 15):
                states.append(x)
        x = model.classifier[:2](model.flatten(x))
        states += [x, model.classifier[2:4](x)]
    pairs = zip(states[::2], states[1::2], strict=True)
    expected = torch.stack([(end - start).square().flatten(1).mean(1) for start, end in pairs])
    torch.testing.assert_close(records["action"], expected)
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


# -- the same as a native network -----------------------------------------------------------------------------------


class BlockField(nn.Module):
    """``v(t, x) = relu(x + branch(x)) - x`` of a ResNet's block; ``branch`` may have been evaluated before."""

    def __init__(self, block):
        super().__init__()
        self.block, self.found = block, None

    def branch(self, x):
        block = self.block
        return block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))

    def forward(self, t, x):
        found = self.branch(x) if self.found is None else self.found
        self.found = None
        return torch.relu(x + found) - x


class Projection(nn.Module):
    """Between flows: to the projected state, with the branch of the block it starts found on the way."""

    def __init__(self, field):
        super().__init__()
        self.fields = [field]

    def forward(self, x):
        self.fields[0].found = self.fields[0].branch(x)
        return self.fields[0].block.downsample(x)


def native(model):
    """The ResNet as a network of Euler flows with h = 1 that hold its modules."""
    stages = [
        [BlockField(block) for block in stage] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
    ]
    flows = [Flow(iter(fields).__next__, solver="euler", depth=len(fields), h=1.0) for fields in stages]
    return Network(
        nn.Sequential(model.conv1, model.bn1, nn.ReLU(), model.maxpool),
        flows,
        nn.Sequential(model.avgpool, nn.Flatten(), model.fc),
        transitions=[Projection(fields[0]) for fields in stages[1:]],
    )


def test_an_adapted_resnet_is_the_native_network_with_its_weights():
    """Same outputs, same records, and the same gradients of least action."""
    model = small_resnet(layers=(2, 1, 2, 1)).double()
    twin = copy.deepcopy(model)
    x, y = SMALL.double(), torch.tensor([1, 3])
    asked = {name: getattr(measures, name) for name in ("action", "residue", "cosine", "displacement")}
    for network in (adapt(model), native(twin)):
        output, records = network.record(x, **asked)
        (F.cross_entropy(output, y) + records["action"].mean(1).sum()).backward()
        if isinstance(network, AdaptedModel):
            expected = output, records
    torch.testing.assert_close(output, expected[0])
    assert records.starts == expected[1].starts == (0, 2, 3, 5)
    for name in asked:
        torch.testing.assert_close(records[name], expected[1][name])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradients_of_records_reach_the_weights_of_their_branches():
    adapted = adapt(small_vit())
    adapted.record(SMALL, action=measures.action)[1]["action"][3].sum().backward()
    grads = {name for name, p in adapted.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "encoder.layers.encoder_layer_1.mlp.3.weight" in grads
    assert not any("encoder_layer_2" in name for name in grads)


# -- named by hand --------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """A residual block whose parts have names of their own."""

    def __init__(self, channels, wider):
        super().__init__()
        self.widen = nn.Conv2d(channels, wider, 1) if wider != channels else None
        self.way = nn.Conv2d(channels, wider, 3, padding=1)

    def forward(self, x):
        return (x if self.widen is None else self.widen(x)) + self.way(x)


def mine():
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
    model = mine()
    model(X)
    if names is None:
        with pytest.raises(ValueError, match=r"changes the shape|'2.way' lies in '2'"):
            adapt(model, blocks).record(X, action=measures.action)
        return
    adapted = adapt(model, blocks)
    assert adapted.names == names
    steps = adapted.steps(X)
    assert len(steps) == len(names)
    for name, step in zip(names, steps, strict=True):
        unit = model.get_submodule(name)
        torch.testing.assert_close(
            step.residue,
            (unit.way if isinstance(unit, Unit) else unit)(seen(model, name))
            - (0 if isinstance(unit, Unit) else step.x0),
        )


def seen(model, name):
    """The input of a module for X."""
    kept = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: kept.append(args[0])):
        model(X)
    return kept[0]


def test_a_named_block_that_fits_a_rule_is_what_the_rule_says():
    adapted = adapt(small_resnet(), ["layer2.0", "layer3.0"])
    assert [place.shortcut for place in adapted.blocks] == ["layer2.0.downsample", "layer3.0.downsample"]
    whole = adapt(small_vit(), {"encoder.layers.encoder_layer_1": None})
    assert whole.depth == 1
    assert adapt(small_vit(), ["encoder.layers.encoder_layer_1"]).depth == 2


def test_rows_come_in_the_order_in_which_blocks_are_called():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = Unit(3, 3), Unit(3, 3)

        def forward(self, x):
            return self.a(self.b(self.a(x))).mean((2, 3))

    adapted = adapt(Backwards(), ["a", "b"])
    assert adapted.names == ("b", "a")
    records = adapted.record(X, action=measures.action)[1]
    assert records["action"].shape == (3, 2)
    assert adapted.names == ("a", "b", "a")


# -- changes in place -----------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A residual block, and how it adds: to a new tensor, in place, or into a buffer that all blocks share."""

    buffer = torch.empty(2, 3, 8, 8)

    def __init__(self, way):
        super().__init__()
        self.branch, self.way = nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1)), way

    def forward(self, x):
        if self.way == "adds":
            x += self.branch(x)
            return x
        if self.way == "buffer":
            return torch.add(x, self.branch(x), out=self.buffer)
        return x + self.branch(x)


class Branchings(nn.Module):
    def __init__(self, way, after=None):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.blocks, self.after = nn.Conv2d(3, 3, 1), nn.ModuleList(Branching(way) for _ in range(3)), after

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            x = x if self.after is None else self.after(x)
        return x


LOOKED = {"action": measures.action, "cosine": measures.cosine, "displacement": measures.displacement}
NAMES = ["blocks.0", "blocks.1", "blocks.2"]
TINY = X[:, :, :8, :8].contiguous()


@pytest.mark.filterwarnings("ignore:the outputs of .* are changed in place")
@pytest.mark.parametrize(
    ("way", "after", "mode"),
    [
        *[("adds", None, mode) for mode in ("gradients", "no_grad", "inference", "compiled")],
        *[("new", F.relu_, mode) for mode in ("gradients", "no_grad", "inference")],
        *[
            (way, after, mode)
            for way, after in [("buffer", None), ("adds", F.relu_)]
            for mode in ("no_grad", "inference")
        ],
    ],
)
def test_records_and_steps_are_those_of_the_model_that_changes_nothing_in_place(way, after, mode):
    adapted = adapt(Branchings(way, after), NAMES)
    plain = adapt(Branchings("new", after and F.relu), NAMES)
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    record = torch.compile(adapted.record, backend="aot_eager") if mode == "compiled" else adapted.record
    for _ in range(2):  # what is learned in one pass serves the next
        with context():
            output, records = record(TINY, **LOOKED)
            expected, values = plain.record(TINY, **LOOKED)
            torch.testing.assert_close(output, expected)
            for name in LOOKED:
                torch.testing.assert_close(records[name], values[name], atol=1e-5, rtol=1e-4)
            if mode != "compiled":
                for step, wanted in zip(adapted.steps(TINY), plain.steps(TINY), strict=True):
                    for state in ("x0", "x1", "residue"):
                        torch.testing.assert_close(getattr(step, state), getattr(wanted, state))


@pytest.mark.parametrize(("way", "after"), [("adds", None), ("new", F.relu_)])
@pytest.mark.filterwarnings("ignore:the outputs of .* are changed in place")
def test_gradients_are_those_of_the_model_that_changes_nothing_in_place(way, after):
    adapted, plain = adapt(Branchings(way, after), NAMES), adapt(Branchings("new", after and F.relu), NAMES)
    adapted.record(TINY, action=measures.action)  # from which it is learned what is changed
    for network in (adapted, plain):
        output, records = network.record(TINY, action=measures.action)
        (output.square().mean() + records["action"].sum()).backward()
    for p, q in zip(adapted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_outputs_changed_in_place_after_their_block_are_told_where_gradients_are_enabled():
    adapted = adapt(Branchings("new", F.relu_), NAMES)
    with pytest.warns(UserWarning, match=r"outputs of 3 blocks \(blocks.0, ...\) are changed in place after them"):
        adapted.record(TINY, action=measures.action)
    adapted.record(TINY, action=measures.action)[1]["action"].sum().backward()


def test_a_block_that_returns_its_input_does_not_move_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(True))
    adapted = adapt(model, ["1", "2"])
    for _ in range(2):
        with torch.no_grad():
            records, start = adapted.record(TINY, action=measures.action)[1], model[0](TINY)
        assert (records["action"][0] == 0).all()
        expected = (start.relu() - start).square().flatten(1).mean(1)
        torch.testing.assert_close(records["action"][1], expected)


def test_nothing_is_copied_once_it_is_known_that_nothing_is_changed():
    adapted = adapt(small_resnet().eval())
    with torch.no_grad():
        adapted.record(SMALL, action=measures.action)
        before = measure_memory(lambda: adapted.model(SMALL)).peak
        assert measure_memory(lambda: adapted.record(SMALL, action=measures.action)).peak < before + 2 * 64 * 8 * 8 * 4


# -- which rows there are -------------------------------------------------------------------------------------------


class Repeated(nn.Module):
    """Calls its block as often as it is told, and its other block where it is told to."""

    def __init__(self, times, both=True):
        super().__init__()
        self.block, self.other, self.times, self.both = Unit(3, 3), Unit(3, 3), times, both

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return self.other(x) if self.both else x


def test_every_call_of_a_block_counts():
    adapted = adapt(Repeated(3), ["block", "other"])
    records = adapted.record(TINY, action=measures.action)[1]
    assert records["action"].shape == (4, 2)
    assert adapted.depth == adapted.evaluations == len(adapted.steps(TINY)) == 4
    assert adapted.h == (1.0,) * 4
    assert adapted.names == ("block", "block", "block", "other")
    assert "4 steps" in repr(adapted)


def test_blocks_that_are_left_out_are_told_once():
    adapted = adapt(Repeated(2, both=False), ["block", "other"])
    with pytest.warns(UserWarning, match="1 of 2 blocks are not called, other: the rows of records are the steps"):
        adapted.record(TINY, action=measures.action)
    assert adapted.names == ("block", "block")
    adapted.record(TINY, action=measures.action)


def test_another_number_of_calls_is_told():
    adapted = adapt(Repeated(2), ["block", "other"])
    adapted.record(TINY, action=measures.action)
    adapted.model.times = 1
    with pytest.warns(UserWarning, match="called in another order or number than before"):
        records = adapted.record(TINY, action=measures.action)[1]
    assert len(records["action"]) == adapted.depth == 2


def test_a_pass_within_a_pass_is_its_own():
    adapted = adapt(Repeated(2), ["block", "other"])
    expected = adapted.record(TINY, action=measures.action)[1]["action"]

    def needs_second_forward(step):
        adapted(TINY)
        return adapted.record(TINY, action=measures.action)[1]["action"].sum(0)

    records = adapted.record(TINY, action=measures.action, again=needs_second_forward)[1]
    torch.testing.assert_close(records["action"], expected)
    torch.testing.assert_close(records["again"], expected.sum(0).expand(3, 2))


def test_threads_record_at_once():
    """As the replicas of DataParallel do, which share the hooks."""
    adapted = adapt(small_resnet().eval())
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    expected = [adapted.record(x, action=measures.action)[1]["action"] for x in inputs]
    barrier = threading.Barrier(len(inputs))

    def waits(step):
        barrier.wait(10)  # so that all are within their first block
        return measures.action(step)

    with ThreadPoolExecutor(len(inputs)) as pool:
        records = list(pool.map(lambda x: adapted.record(x, action=waits)[1]["action"], inputs))
    for values, wanted in zip(records, expected, strict=True):
        torch.testing.assert_close(values, wanted)
    assert adapted.hooks.current is None


def test_blocks_may_be_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Unit(3, 3)

        def forward(self, x):
            return self.block(x=x)

    adapted = adapt(Named(), ["block"])
    (step,) = adapted.steps(TINY)
    torch.testing.assert_close(step.x1 - step.x0, adapted.model.block.way(TINY))


def test_checkpointing_that_takes_the_gradients_is_told():
    class Checkpointed(Branchings):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return x

    adapted = adapt(Checkpointed("new"), NAMES)
    with pytest.warns(UserWarning, match=r"'blocks.2' is computed without gradients, .* use_reentrant=True"):
        adapted.record(TINY.requires_grad_(), action=measures.action)


def test_a_branch_that_is_not_called_is_told_from_a_block_that_is_left_out():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.shortcut, self.bn2, self.left = nn.Conv2d(3, 3, 1), None, nn.InstanceNorm2d(3), None

        def forward(self, x):
            if self.left:
                return x if self.left == "whole" else x + self.conv1(x)
            return torch.relu(x + self.bn2(self.conv1(x)))

    adapted = adapt(nn.Sequential(nn.Conv2d(3, 3, 1), Left()), residue="branch")
    assert (adapted.record(TINY, action=measures.action)[1]["action"] > 0).all()
    adapted.model[1].left = "whole"
    assert (adapted.record(TINY, action=measures.action)[1]["action"] == 0).all()
    adapted.model[1].left = "branch"
    with pytest.raises(ValueError, match=r"does not call its branch '1.bn2' in this pass: .*displacement"):
        adapted.record(TINY, action=measures.action)


# -- living with torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_record_compiles_without_a_graph_break(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    output, records = adapted.record(x, action=measures.action, cosine=measures.cosine)
    compiled = torch.compile(adapted.record, fullgraph=True, backend="eager")
    found, values = compiled(x, action=measures.action, cosine=measures.cosine)
    torch.testing.assert_close(found, output)
    assert values.starts == records.starts
    for name in records:
        torch.testing.assert_close(values[name], records[name], atol=1e-5, rtol=1e-4)
    values["action"].sum().backward()
    torch.testing.assert_close(torch.compile(adapted, fullgraph=True, backend="eager")(x), output)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_under_autocast_records_stay_float32(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    asked = {name: getattr(measures, name) for name in ("action", "residue", "cosine", "displacement")}
    expected = adapted.record(x, **asked)[1]
    with torch.autocast("cpu", torch.bfloat16):
        output, records = adapted.record(x, **asked)
        only = adapted.record(x, action=measures.action)[1]
    assert output.dtype == torch.bfloat16
    for name, values in records.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[name], atol=0.02, rtol=0.05)
    torch.testing.assert_close(only["action"], records["action"])
    records["action"].sum().backward()
    assert next(adapted.parameters()).grad.isfinite().all()


def test_copies_record_themselves():
    adapted = adapt(small_resnet().eval())
    twin = copy.deepcopy(adapted)
    for p in twin.parameters():
        nn.init.zeros_(p)
    before = adapted.record(X, action=measures.action)[1]["action"]
    assert (twin.record(X, action=measures.action)[1]["action"] == 0).all()
    assert torch.equal(adapted.record(X, action=measures.action)[1]["action"], before)
    assert (before > 0).all()


def test_the_same_model_adapted_twice():
    model = small_resnet().eval()
    all_blocks, one = adapt(model), adapt(model, ["layer2.0"])
    expected = all_blocks.record(X, action=measures.action)[1]["action"]
    torch.testing.assert_close(one.record(X, action=measures.action)[1]["action"], expected[1:2])


def test_a_pickled_network_and_a_replica_record_the_same():
    """The replica is one as DataParallel makes them, whose weights are plain tensors."""
    adapted = adapt(Branchings("new"), NAMES)
    expected = adapted.record(TINY, action=measures.action)[1]["action"]
    again = pickle.loads(pickle.dumps(adapted))
    torch.testing.assert_close(again.record(TINY, action=measures.action)[1]["action"], expected)
    copies = {module: module._replicate_for_data_parallel() for module in adapted.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            setattr(twin, name, child and copies[child])
        for name, p in module._parameters.items():
            setattr(twin, name, p * 1.0)
    copies[adapted].record(TINY, action=measures.action)[1]["action"].sum().backward()
    grads = [p.grad.clone() for p in adapted.parameters()]
    adapted.zero_grad()
    expected.sum().backward()
    for p, grad in zip(adapted.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_weights_go_back_into_the_plain_model():
    adapted = adapt(small_resnet())
    plain = small_resnet()
    plain.load_state_dict(adapted.model.state_dict())
    assert {f"model.{name}" for name in plain.state_dict()} == set(adapted.state_dict())
    assert torch.equal(plain.eval()(X), adapted.eval()(X))


def test_the_mode_is_that_of_the_model():
    assert not adapt(small_resnet().eval()).training
    assert adapt(small_resnet()).train(False).model.training is False


def test_data_parallel_training_finds_the_same_gradients(tmp_path):
    class Loss(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            output, records = self.network.record(x, action=measures.action)
            return output.square().mean() + records["action"].sum()

    adapted = adapt(small_resnet())
    twin = copy.deepcopy(adapted)
    Loss(twin)(X).backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(Loss(adapted))(X).backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(adapted.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_trains_by_fit():
    training = pytest.importorskip("odenets.training")
    images = torch.randn(12, 3, 32, 32)
    batches = data.Batches(data.TensorData("noise", images, torch.arange(12) % 2, 2, (0.0,) * 3, (1.0,) * 3), 6, seed=0)
    adapted = adapt(tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2))
    found = training.fit(
        adapted, batches, epochs=2, optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.05), validation=batches
    )
    assert found.rows[-1]["depth"] == 4
    assert found.rows[-1]["h"] == "1 1 1 1"
    assert found.rows[-1]["evaluations"] == 2 * 12 * 4


def test_nothing_is_kept_when_nothing_is_measured():
    model = small_resnet()
    adapted = adapt(copy.deepcopy(model))
    adapted(X)
    assert measure_memory(lambda: adapted(X)) == measure_memory(lambda: model(X))
    with torch.no_grad():
        plain, measured = (
            measure_memory(lambda: model(X)),
            measure_memory(lambda: adapted.record(X, action=measures.action)),
        )
        kept = measure_memory(lambda: adapted.steps(X))
    largest = 4 * 64 * 16 * 16 * 2
    assert measured.peak <= plain.peak + 3 * largest
    assert measured.left < kept.left / 100
    assert not adapted.hooks.current


def test_a_pass_that_fails_leaves_nothing_behind():
    adapted = adapt(small_resnet())

    def broken(step):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        adapted.record(X, broken=broken)
    assert adapted.hooks.current is None
    assert adapted.record(X, action=measures.action)[1]["action"].shape == (4, 2)


def test_gradients_by_transforms():
    adapted = adapt(small_resnet().eval())
    weights = {name: p.detach() for name, p in adapted.named_parameters()}

    def cost(weights):
        record = functools.partial(_record, adapted)
        return record(weights)

    found = torch.func.grad(cost)(weights)
    adapted.record(X, action=measures.action)[1]["action"].sum().backward()
    for name, p in adapted.named_parameters():
        torch.testing.assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad)


# -- cut into parts -------------------------------------------------------------------------------------------------


def test_to_be_cut_leaves_each_module_its_mode():
    adapted = adapt(small_resnet())
    adapted.model.bn1.eval()
    adapted.model.layer2.eval()
    modes = {name: module.training for name, module in adapted.model.named_modules()}
    *parts, head = cut_adapted(adapted, [2, 4])
    assert {name: module.training for name, module in adapted.model.named_modules()} == modes
    assert all(part.training for part in (*parts, head))
    assert not parts[0].eval().model.training


def test_a_model_that_repeats_a_block_is_not_cut():
    adapted = adapt(Repeated(2), ["block", "other"])
    with pytest.raises(ValueError, match="does not call its blocks once each"):
        cut_adapted(adapted, [1, 2])


def test_a_model_with_hooks_outside_its_blocks_is_not_cut():
    adapted = adapt(small_resnet())
    outputs = []
    adapted.model.layer2.register_forward_hook(lambda module, args, output: outputs.append(output))
    with pytest.raises(ValueError, match="'layer2' has hooks, which would be lost where it is cut"):
        cut_adapted(adapted, [2, 4])
    assert not outputs


# -- what it says ---------------------------------------------------------------------------------------------------


def test_prints_what_it_found():
    adapted = adapt(small_resnet())
    assert repr(adapted).splitlines()[:2] == ["AdaptedModel(ResNet, 4 steps)", "  0  layer1.0  ResNet"]
    adapted(X)
    assert str(adapted).splitlines()[1:3] == [
        "  0  layer1.0  ResNet  64 x 16 x 16",
        "  1  layer2.0  ResNet  128 x 8 x 8",
    ]
    assert "0  encoder.layers.encoder_layer_0  transformer 1 of 2" in str(adapt(small_vit()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adapt(len), TypeError, "model must be a torch module, got builtin"),
        (lambda: adapt(nn.Identity()), ValueError, "no residual blocks found in Identity, which has no parts"),
        (lambda: adapt(small_resnet(), ["layer1.7"]), ValueError, "no module 'layer1.7'; near to it are 'layer1.0'"),
        (lambda: adapt(small_resnet(), {"layer2.0": "layer2.0.proj"}), ValueError, "no module 'layer2.0.proj'; near"),
        (lambda: adapt(small_resnet(), []), ValueError, "at least one name or rule"),
        (lambda: adapt(small_resnet(), [""]), ValueError, "names of modules within the model, got ''"),
        (lambda: adapt(small_resnet(), [3]), TypeError, "names of modules or rules, got int"),
        (lambda: adapt(small_resnet(), ["layer1", "layer1.0"]), ValueError, "'layer1.0' lies in 'layer1'"),
        (lambda: adapt(small_resnet(), [Rule("mine", ("way",))]), ValueError, r"no residual blocks .* mine \(way\)"),
        (lambda: Rule("mine"), ValueError, "rule 'mine' needs parts or a flag"),
        (lambda: adapt(small_resnet(), {"layer2.0": None})(X), ValueError, "'layer2.0' changes the shape .* shortcut"),
        (lambda: adapt(small_resnet())(torch.full((1, 3, 8, 8), torch.nan)), ValueError, "x must be finite"),
        (lambda: adapt(small_resnet())(X[:0]), ValueError, "at least one sample"),
        (lambda: adapt(small_resnet()).record(X, action=1), TypeError, "measure 'action' must be a function"),
        (lambda: adapt(small_resnet()).record(X, total=lambda step: step.x1.sum()), ValueError, "'total' must return"),
        (lambda: adapt(small_resnet()).record(X, error=measures.error), ValueError, "euler carries no embedded error"),
        (lambda: adapt(small_resnet(), ["layer2.0:layer1.0"])(X), ValueError, "'layer1.0' is called first"),
        (lambda: adapt(overwriting(), ["1"])(X), ValueError, "'1' changes its input in place: .* inplace=False"),
        (lambda: adapt(overwriting(), ["1"]).record(X, a=measures.action), ValueError, "changes its input in place"),
        (lambda: adapt(overwriting(), ["1"]).steps(X), ValueError, "changes its input in place"),
        (
            lambda: adapt(nn.Sequential(nn.Conv2d(3, 3, 1), Projecting()), {"1": "1.shortcut"})(X),
            ValueError,
            "in place",
        ),
        (lambda: without_gradients(adapt(overwriting(), ["1"]), X), ValueError, "changes its input in place"),
        (lambda: adapt(Unused(), ["unused"])(X), ValueError, "none of the blocks was called: unused$"),
        (lambda: adapt(Folded(), ["block"])(X), ValueError, r"states of shape \(1, 2.* for 2 samples"),
        (lambda: adapt(Pair(), ["block"])(X), TypeError, "'block' must take and return a tensor, got tuple"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Overwriting(nn.Module):
    """A block that begins with a ReLU in place, and so adds to another state than it is given."""

    def forward(self, x):
        return torch.sin(torch.relu_(x)) + x


class Projecting(nn.Module):
    """Its projection sees what the first ReLU of its branch has left."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.relu_(x).mean() + self.shortcut(x)


def projecting():
    return nn.Sequential(nn.Conv2d(3, 3, 1), Projecting())


def overwriting():
    return nn.Sequential(nn.Conv2d(3, 3, 1), Overwriting())


@torch.inference_mode()
def without_gradients(adapted, x):
    adapted.record(x, action=measures.action)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return x


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ReLU()

    def forward(self, x):
        return self.block(x[None])[0]


class Both(nn.Module):
    def forward(self, x):
        return x, x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Both()

    def forward(self, x):
        return self.block(x)[0]


def _record(adapted, weights):
    _, records = torch.func.functional_call(Recording(adapted), {f"adapted.{n}": w for n, w in weights.items()}, (X,))
    return records["action"].sum()


class Recording(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.adapted = adapted

    def forward(self, x):
        return self.adapted.record(x, action=measures.action)


# -- timm -----------------------------------------------------------------------------------------------------------


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
    projections = {place.name for place in adapted.blocks if place.shortcut}
    for name_, step in zip(adapted.names, steps, strict=True):
        moved = step.x1 != step.x0
        assert not moved.any() or (name_ in projections and torch.equal(step.x1, step.x0.relu()))


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
