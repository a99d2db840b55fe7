from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from odenets import Flow, MLPField, adapt, measures, models
from odenets.module_wise import auglocal, balanced, blocks_of, cut, even
from odenets.module_wise.partition import activation_memory, lightest
from odenets.recording import Recorder
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Velocity

tv = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


SWIN, VIT = ([4, 4], 16, [2, 2], [2, 4], [4, 4]), (32, 16, 3, 2, 16, 32)
NETWORKS = {
    "resnet110": lambda: models.resnet110(blocks=3, channels=(4, 8, 16)),
    "resnet": lambda: adapt(tv.ResNet(tv.resnet.BasicBlock, [1, 2, 1, 1], num_classes=5), IMAGES),
    "vgg": lambda: adapt(tv.vgg11_bn(num_classes=5, init_weights=False), IMAGES, displacement=True),
    "swin": lambda: adapt(tv.SwinTransformer(*SWIN, num_classes=5), IMAGES),
    "vit": lambda: adapt(tv.VisionTransformer(*VIT, num_classes=5), IMAGES),
    "timm": lambda: adapt(timm.create_model("resnet10t", num_classes=5), IMAGES),
    "timm vit": lambda: adapt(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5), IMAGES),
}


@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_of_a_network_are_the_network(name, at):
    network = NETWORKS[name]().eval()
    expected, records = network.record(IMAGES, action=measures.action)
    depth = blocks_of(network)
    for ends in ([depth], list(range(1, depth + 1)), [1, depth], [depth - 1, depth]):
        parts, head = cut(network, ends, at)
        x, rows = IMAGES, []
        for part in parts:
            part.eval()
            assert isinstance(part, Recorder)
            assert tuple(step.h for step in part.steps(x)) == part.h
            assert len(part.h) == part.depth == part.evaluations  # of Euler steps
            x, row = part.record(x, action=measures.action)
            rows.append(row["action"])
        torch.testing.assert_close(head.eval()(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat(rows), records["action"], rtol=0, atol=0)
        inside = {id(p) for module in [*parts, head] for p in module.parameters()}
        assert inside == {id(p) for p in network.parameters()}


def test_a_transition_belongs_to_either_side():
    shapes = {}
    for at in ("end", "start"):
        (part, *_), _ = cut(NETWORKS["resnet110"](), [3, 9], at)
        shapes[at] = part(IMAGES).shape[1]
    assert shapes == {"end": 4, "start": 8}


def basic_block():
    return tv.resnet.BasicBlock(4, 4)


def test_a_part_of_a_flow_keeps_its_times():
    flow = Flow(lambda: Velocity(lambda m, t, x: torch.full_like(x, t)), solver="euler", h=[1.0, 2.0, 3.0], depth=3)
    x = torch.zeros(2, 1)
    (one, two, three), _ = cut(flow, [1, 2, 3])
    assert [step.t for step in flow.part(1, 3).steps(x)] == [1.0, 3.0]
    torch.testing.assert_close(three(two(one(x))), flow(x), rtol=0, atol=0)


def test_training_mode_decides_what_a_traced_part_computes():
    def dropping(m, x):
        return m.second(nn.functional.dropout(m.first(x), 0.5, training=m.training)).mean((2, 3))

    network = adapt(Calling(dropping, first=basic_block(), second=basic_block()), torch.rand(2, 4, 8, 8))
    (one, two), _ = cut(network, [1, 2])
    x = torch.rand(2, 4, 8, 8)
    two.train()
    assert not torch.equal(two(one(x)), two(one(x)))
    two.eval(), one.eval(), network.eval()
    torch.testing.assert_close(two(one(x)).mean((2, 3)), network(x))


def test_residues_of_the_branch_end_in_a_batch_norm_which_is_said():
    model = tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with pytest.warns(UserWarning, match=r"4 blocks \(layer1.0, ...\) end in a batch norm"):
        network = adapt(model, blocks=tv.resnet.BasicBlock, residue="branch")
    _, records = network.record(IMAGES, r=measures.residue)
    for m, layer in enumerate([model.layer1, model.layer2, model.layer3]):
        norm = layer[0].bn2  # type: ignore[union-attr]
        with torch.no_grad():
            expected = (norm.weight.square() + norm.bias.square()).mean()
        torch.testing.assert_close(records["r"][m].mean(), expected, rtol=1e-2, atol=0)  # but for eps
    with pytest.raises(ValueError, match="residue must be 'displacement' or 'branch', got 'shortcut'"):
        adapt(model, IMAGES, residue="shortcut")  # type: ignore[arg-type]


def test_errors():
    network = NETWORKS["resnet110"]()
    for ends in ([], [9, 3], [3, 3, 9], [0, 9], [3, 8], [3, 10]):
        with pytest.raises(ValueError, match="ends must rise from at least 1 to the number of blocks, 9, got"):
            cut(network, ends)
    with pytest.raises(ValueError, match="at must be"):
        cut(network, [9], "middle")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network must be a Flow"):
        cut(nn.Linear(2, 2), [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share fields"):
        cut(Flow(lambda: MLPField(2), depth=4, shared=True), [2, 4])
    with pytest.raises(ValueError, match="reads out 'ensemble'"):
        cut(models.resnet9(readout="ensemble", solver="bs23"), [3, 9])


def test_only_one_tensor_may_cross_a_cut():
    skipping = Calling(lambda m, x: m.second(m.first(x)) + x, first=basic_block(), second=basic_block())
    with pytest.raises(ValueError, match="cannot be cut after block 1: x, first would cross"):
        cut(adapt(skipping, torch.rand(2, 4, 8, 8)), [1, 2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet110", "resnet", "swin"])
@pytest.mark.parametrize("split", [cut, balanced, auglocal])
def test_a_cut_leaves_each_modules_own_mode(name, training, split):
    network = NETWORKS[name]().train(training)
    frozen = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.LayerNorm)]
    for module in frozen:
        module.train(not training)
    with unchanged(network):
        if split is balanced:
            balanced(network, 2, IMAGES)
        else:
            split(network, [1, blocks_of(network)], *([IMAGES] if split is auglocal else []))


@pytest.mark.parametrize(("blocks", "K", "sizes"), [(54, 2, [27, 27]), (54, 4, [14, 14, 13, 13]), (5, 5, [1] * 5)])
def test_even_modules_are_those_of_the_thesis(blocks, K, sizes):
    assert [b - a for a, b in pairwise([0, *even(blocks, K)])] == sizes


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_no_split_has_a_lighter_heaviest_module(weights, data):
    modules = data.draw(st.integers(1, len(weights)))
    ends = lightest(weights, modules)
    assert len(ends) == modules
    assert ends[-1] == len(weights)

    def heaviest(ends):
        return max(sum(weights[a:b]) for a, b in pairwise([0, *ends]))

    everything = combinations(range(1, len(weights)), modules - 1)
    assert heaviest(ends) == min(heaviest([*cuts, len(weights)]) for cuts in everything)


def test_activation_memory_falls_with_the_resolution():
    network = models.resnet110(blocks=2)
    with unchanged(network):
        sizes = activation_memory(network, IMAGES)
    assert sizes[1] == pytest.approx(2 * sizes[3], rel=0.1)  # twice the channels on a quarter of the places
    assert sizes[3] == pytest.approx(2 * sizes[5], rel=0.1)


def test_equally_heavy_modules_of_resnet110_lie_near_the_thesis_ones():
    ends = balanced(models.resnet110(), 4, torch.rand(2, 3, 96, 96))
    sizes = [b - a for a, b in pairwise([0, *ends])]
    assert all(abs(ours - theirs) <= 3 for ours, theirs in zip(sizes, [6, 8, 12, 28], strict=True)), sizes


def test_there_are_at_most_as_many_modules_as_blocks():
    for modules in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of blocks, 3, got {modules}"):
            even(3, modules)
        with pytest.raises(ValueError, match=f"between 1 and the number of blocks, 3, got {modules}"):
            balanced(models.resnet110(blocks=1), modules, torch.rand(2, 3, 32, 32))
