import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, Network, measures
from odenets.adapting import AdaptedModel, adapt
from tests.odenets.adapting.models import FAMILIES, QUANTITIES, SMALL, X, small_resnet, small_vit, zero_branches
from tests.odenets.checks import assert_same_gradients


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
    assert_same_gradients(plain, adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_those_of_the_steps(family):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval())
    with torch.no_grad():
        steps = adapted.steps(x)
        output, records = adapted.record(x, **QUANTITIES)
        assert torch.equal(adapted(x), output)
    assert [step.t for step in steps] == list(range(adapted.depth))
    for m, step in enumerate(steps):
        assert step.h == 1
        assert step.tableau.name == "euler"
        torch.testing.assert_close(step.residue, step.x1 - step.x0)
        square = (step.x1 - step.x0).square().flatten(1).mean(1)
        for name in ("action", "residue"):
            torch.testing.assert_close(records[name][m], square)
        torch.testing.assert_close(records["displacement"][m], square.sqrt())
        r = step.residue.double().flatten(1)
        cosine = (r.mean(1) / r.square().mean(1).sqrt()).float()
        torch.testing.assert_close(records["cosine"][m], cosine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_whose_branch_is_zero_does_not_move_its_state(family):
    """But for the ReLU after a projection."""
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval(), x)
    zero_branches(adapted)
    with torch.no_grad():
        steps = adapted.steps(x)
    projections = {block.name for block in adapted.blocks if block.projection is not None}
    assert any(step.x0.abs().amax() > 0 for step in steps)
    for name, step in zip(adapted.names, steps, strict=True):
        assert torch.equal(step.x1, step.x0.relu() if name in projections else step.x0)


@pytest.mark.parametrize("family", ["vit", "swin", "swin v2"])
@pytest.mark.parametrize("half", [0, 1])
def test_the_two_steps_of_a_transformer_block_are_its_attention_and_its_mlp(family, half):
    make, x, _ = FAMILIES[family]
    adapted = adapt(make().eval(), x)
    for name, p in adapted.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)  # so that every branch moves
    parts = [("ln_1", "self_attention"), ("ln_2", "mlp")] if family == "vit" else [("norm1", "attn"), ("norm2", "mlp")]
    zero_branches(adapted, *parts[half])
    with torch.no_grad():
        action = adapted.record(x, action=measures.action)[1]["action"].amax(1)
    assert (action[half::2] == 0).all()
    assert (action[1 - half :: 2] > 0).all()


class BlockField(nn.Module):
    """``v(t, x) = relu(x + branch(x)) - x`` of a ResNet's block; ``branch`` may have been evaluated before."""

    def __init__(self, block):
        super().__init__()
        self.block, self.value = block, None

    def branch(self, x):
        block = self.block
        return block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))

    def forward(self, t, x):
        value = self.branch(x) if self.value is None else self.value
        self.value = None
        return torch.relu(x + value) - x


class Projection(nn.Module):
    """Between flows: to the projected state, with the branch of the block it starts evaluated on the way."""

    def __init__(self, field):
        super().__init__()
        self.fields = [field]

    def forward(self, x):
        self.fields[0].value = self.fields[0].branch(x)
        return self.fields[0].block.downsample(x)


def native(model):
    """The ResNet as a network of Euler flows with h = 1 that hold its modules."""
    layers = (model.layer1, model.layer2, model.layer3, model.layer4)
    parts = [[BlockField(block) for block in layer] for layer in layers]
    flows = [Flow(iter(fields).__next__, solver="euler", depth=len(fields), h=1.0) for fields in parts]
    return Network(
        nn.Sequential(model.conv1, model.bn1, nn.ReLU(), model.maxpool),
        flows,
        nn.Sequential(model.avgpool, nn.Flatten(), model.fc),
        transitions=[Projection(fields[0]) for fields in parts[1:]],
    )


def test_an_adapted_resnet_is_the_native_network_with_its_weights():
    """Same outputs, same records, and the same gradients of least action."""
    model = small_resnet(layers=(2, 1, 2, 1)).double()
    twin = copy.deepcopy(model)
    x, y = SMALL.double(), torch.tensor([1, 3])
    for network in (adapt(model), native(twin)):
        output, records = network.record(x, **QUANTITIES)
        (F.cross_entropy(output, y) + records["action"].mean(1).sum()).backward()
        if isinstance(network, AdaptedModel):
            expected = output, records
    torch.testing.assert_close(output, expected[0])
    assert records.starts == expected[1].starts == (0, 2, 3, 5)
    for name in QUANTITIES:
        torch.testing.assert_close(records[name], expected[1][name])
    assert_same_gradients(model, twin)


def test_gradients_of_records_reach_the_weights_of_their_branches():
    adapted = adapt(small_vit())
    adapted.record(SMALL, action=measures.action)[1]["action"][3].sum().backward()
    grads = {name for name, p in adapted.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "encoder.layers.encoder_layer_1.mlp.3.weight" in grads
    assert not any("encoder_layer_2" in name for name in grads)


def test_weights_go_back_into_the_plain_model():
    adapted = adapt(small_resnet())
    plain = small_resnet()
    plain.load_state_dict(adapted.model.state_dict())
    assert {f"model.{name}" for name in plain.state_dict()} == set(adapted.state_dict())
    assert torch.equal(plain.eval()(X), adapted.eval()(X))


def test_the_mode_is_that_of_the_model():
    assert not adapt(small_resnet().eval()).training
    assert adapt(small_resnet()).train(False).model.training is False


def test_prints_what_it_found():
    adapted = adapt(small_resnet())
    assert repr(adapted) == "AdaptedModel(ResNet, its steps are found at the first batch)"
    adapted(X)
    assert str(adapted).splitlines() == [
        "AdaptedModel(ResNet, 4 steps)",
        "  step  name      kind    shape         projection",
        "     0  layer1.0  ResNet  64 x 16 x 16",
        "     1  layer2.0  ResNet  128 x 8 x 8   layer2.0.downsample",
        "     2  layer3.0  ResNet  256 x 4 x 4   layer3.0.downsample",
        "     3  layer4.0  ResNet  512 x 2 x 2   layer4.0.downsample",
    ]
    by_name = adapt(small_resnet(), blocks={"layer1.0": None, "layer2.0": "layer2.0.downsample.0"})
    assert repr(by_name).splitlines()[1:] == [
        "  step  name      kind     projection",
        "     0  layer1.0  by name",
        "     1  layer2.0  by name  layer2.0.downsample.0",
    ]
    assert "1  encoder.layers.encoder_layer_0 mlp        transformer  5 x 16" in str(adapt(small_vit(), SMALL))


@pytest.mark.parametrize("passes", [0, 1])
def test_an_export_with_a_dynamic_batch_takes_any(passes):
    """Before the first pass too."""
    model = small_resnet().eval()
    network, x = adapt(model), torch.rand(2, 3, 32, 32)
    for _ in range(passes):
        network(x)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 5):
        x = torch.rand(size, 3, 32, 32)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
