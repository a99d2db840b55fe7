import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import measures
from odenets.adapting import adapt
from tests.odenets.adapting.models import FAMILIES, SMALL, TINY, X, small_resnet, tv, zero_branches
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Unit

TIMM = {
    "resnet18": 8, "resnext50_32x4d": 16, "resnetv2_50": 16, "regnetx_002": 13, "regnety_002": 13,
    "mobilenetv2_035": 10, "mobilenetv3_small_100": 6, "efficientnet_lite0": 9, "tf_efficientnetv2_b0": 15,
    "convnext_atto": 12, "test_vit": 12, "swin_tiny_patch4_window7_224": 24, "swinv2_tiny_window8_256": 24,
}  # fmt: skip
FITTING = {"test_vit": 160, "swin_tiny_patch4_window7_224": 64, "swinv2_tiny_window8_256": 64}
"""Pixels of those that take no other number than they are made for."""


@pytest.mark.parametrize(
    ("name", "depth"),
    [pytest.param(*one, marks=[pytest.mark.slow] * one[0].startswith("swin")) for one in TIMM.items()],
)
def test_timm_models(name, depth):
    """The number of blocks, and that those whose branch is zero do not move their state."""
    timm = pytest.importorskip("timm")
    size = FITTING.get(name, 64)
    options = {"img_size": size, "window_size": 2} if name.startswith("swin") else {}
    model = timm.create_model(name, num_classes=3, **options).eval()
    x = F.interpolate(X[:1], size)
    adapted = adapt(model, x)
    assert adapted.depth == depth
    with torch.no_grad():
        output, records = adapted.record(x, action=measures.action)
        assert torch.equal(output, model(x))
        assert records["action"].shape == (depth, 1)
        zero_branches(adapted)
        steps = adapted.steps(x)
    projections = {block.name for block in adapted.blocks if block.projection is not None}
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
    x = torch.randn(4, *SMALL.shape[1:])
    adapted = adapt(model, x, residue="branch")
    with torch.no_grad():
        for step in adapted.train().steps(x):
            torch.testing.assert_close(step.x1, (step.x0 + step.residue).relu())


def test_blocks_of_parts_of_any_name_are_found():
    plain = [Calling(lambda m, x: m.conv1(x).tanh() + x, conv1=nn.Conv2d(n, n, 1)) for n in (3, 4)]
    wider = Calling(lambda m, x: m.way(x).tanh() + m.wide(x), way=nn.Conv2d(3, 4, 1), wide=nn.Conv2d(3, 4, 1))
    adapted = adapt(nn.Sequential(plain[0], wider, plain[1]), X)
    assert adapted.names == ("0", "1", "2")
    assert [block.projection for block in adapted.blocks] == [None, "1.wide", None]


@pytest.mark.parametrize("name", ["densenet121", "squeezenet1_0", "shufflenet_v2_x0_5"])
def test_networks_that_only_concatenate_are_refused(name):
    with pytest.raises(ValueError, match=r"it only concatenates, \d+ times.* name the blocks by hand"):
        adapt(getattr(tv, name)(), X)


@pytest.mark.parametrize("method", ["__call__", "record", "steps", "output_and_steps"])
def test_blocks_are_found_at_the_first_batch(method):
    adapted = adapt(small_resnet())
    for name in ("depth", "names", "h", "blocks", "evaluations"):
        with pytest.raises(ValueError, match=r"found at the first batch, and there was none: give one, adapt\(model"):
            getattr(adapted, name)
    getattr(adapted, method)(SMALL)
    assert adapted.names == ("layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert [block.name for block in adapted.blocks] == [*adapted.names]
    assert adapted.h == (1.0,) * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_finding_takes_three_passes_and_leaves_no_trace(family):
    make, x, _ = FAMILIES[family]
    model, passes = make(), []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    with unchanged(model):
        adapt(model, x)
    assert len(passes) <= 3
    hook.remove()


def test_numbers_are_drawn_as_without_finding():
    model = nn.Sequential(Unit(3, 3), nn.Dropout())
    torch.manual_seed(3)
    expected = model(TINY)
    torch.manual_seed(3)
    assert torch.equal(adapt(model, TINY)(TINY), expected)


def doubled_in_eval(m, x):
    return m.block(F.dropout(x))


def by_the_mean(m, x):
    return m.block(x) if x.mean() > 0 else m.other(m.block(x))


@pytest.mark.filterwarnings("ignore:states of a sample depend")
@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
            torch.zeros(2, 3, 2, 2),
            r"no residual additions.*by hand",
        ),
        (
            nn.Sequential(Unit(3, 3)),
            torch.zeros(2, 4, 8, 8),
            r"example must be inputs .* got \(2, 4, 8, 8",
        ),
        (nn.Sequential(Unit(3, 3)), torch.zeros(2, 3, 8, 8).long(), "example must be inputs that Sequential takes"),
        (nn.Sequential(Unit(3, 3)), TINY[:0], "at least one sample"),
        (Calling(doubled_in_eval, block=Unit(3, 3)), TINY, "two passes of Calling in eval mode differ.* random"),
        (
            Calling(by_the_mean, block=Unit(3, 3), other=Unit(3, 3)),
            torch.tensor([1.0, -2.0])[:, None, None, None].expand(2, 3, 8, 8),
            "takes other steps for a part of the batch, in other .numbers are read from the data at test_finding",
        ),
    ],
)
def test_what_cannot_be_found_is_named(model, example, message):
    with pytest.raises(ValueError, match=message):
        adapt(model, example)


@pytest.mark.parametrize(
    "add",
    [
        lambda x, r: x.index_add(0, torch.arange(len(x)), r),
        lambda x, r: x.scatter_add(0, torch.arange(len(x))[:, None].expand_as(r), r),
        lambda x, r: torch.addcdiv(x, r, torch.ones_like(r)),
    ],
    ids=["index_add", "scatter_add", "addcdiv"],
)
def test_sums_by_other_operators_are_steps(add):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return add(x, torch.tanh(self.layer(x)))

    network, x = adapt(nn.Sequential(Block(), Block(), nn.Linear(4, 2)), torch.randn(2, 4)), torch.randn(3, 4)
    assert network.names == ("0", "1")
    step = network.steps(x)[0]
    torch.testing.assert_close(step.x1, x + torch.tanh(network.model[0].layer(x)))
