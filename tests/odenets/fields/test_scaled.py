"""Fields with scalars: SkipInit's multiplier and the Fixup block, against their formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import ConvField, Flow, MLPField, NeuralODE, initialize, measures
from odenets.fields import FixupField, ScaledField
from odenets.normalization import StageBatchNorm
from tests.odenets.networks import Velocity


def test_it_is_the_field_times_a_scalar_that_trains():
    field, x = ConvField(4, norm=None).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scaled = ScaledField(field, 0.5).double()
    torch.testing.assert_close(scaled(0.0, x), 0.5 * field(0.0, x))
    slopes = torch.autograd.grad(scaled(0.0, x).square().sum(), scaled.scale)
    torch.testing.assert_close(slopes[0], 2 * 0.5 * field(0.0, x).square().sum())


def test_skipinit_begins_as_the_identity_and_only_the_scalars_have_a_gradient():
    flow = Flow(lambda: ScaledField(MLPField(3)), solver="euler", h=1.0, depth=3)
    x = torch.randn(5, 3)
    assert torch.equal(flow(x), x)
    flow(x).square().sum().backward()
    for block in flow.blocks:
        field = block.fields[0]
        torch.testing.assert_close(field.scale.grad, (2 * x * field.field(0.0, x)).sum())
        assert not any(p.grad.any() for p in field.field.parameters())


def test_further_fields_begin_as_the_first():
    field = ScaledField(MLPField(3), 0.25)
    with torch.no_grad():
        field.scale.fill_(7.0)
    flow = Flow(field, depth=2)
    second = flow.blocks[1].fields[0]
    assert second.scale == 0.25
    assert not torch.equal(second.field.first.weight, field.field.first.weight)
    initialize(flow, "orthogonal")
    assert second.scale == 0.25


@pytest.mark.parametrize(
    "inner",
    [
        lambda: MLPField(3, norm="batch"),
        lambda: Velocity(lambda m, t, x: m.layer(m.norm(x)), norm=StageBatchNorm(3), layer=nn.Linear(3, 3)),
    ],
    ids=["ours", "one's own"],
)
def test_stages_have_statistics_of_their_own_in_it(inner):
    torch.manual_seed(0)
    flow = Flow(lambda: ScaledField(inner(), 1.0), solver="heun", depth=1)
    plain = Flow(lambda: copy.deepcopy(flow.blocks[0].fields[0].field), solver="heun", depth=1)
    x = torch.randn(6, 3)
    torch.testing.assert_close(flow.train()(x), plain.train()(x))
    torch.testing.assert_close(flow.eval()(x), plain.eval()(x))
    norm = next(module for module in flow.modules() if isinstance(module, StageBatchNorm))
    assert norm.stages == 2


def test_fields_get_what_they_take_besides():
    field = ScaledField(Velocity(lambda m, t, x: x), 2.0)
    field.field.forward = lambda t, x, c: c * x
    x, c = torch.randn(4, 3), torch.randn(4, 1)
    torch.testing.assert_close(field(0.0, x, c), 2 * c * x)
    torch.testing.assert_close(NeuralODE(field, solver="euler", steps=1)(x, c), x + 2 * c * x)


@pytest.mark.parametrize("leading", [True, False])
def test_a_fixup_block_is_that_of_figure_1(leading):
    first, second = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Conv2d(5, 3, 3, padding=1, bias=False)
    field = FixupField(first, second, leading=leading).double()
    with torch.no_grad():
        field.biases.normal_()
        field.scale.fill_(1.7)
    x, b = torch.randn(2, 3, 4, 4, dtype=torch.float64), [*field.biases]
    if leading:
        expected = 1.7 * second(F.relu(first(F.relu(x + b[0]) + b[1]) + b[2]) + b[3])
    else:
        expected = 1.7 * second(F.relu(first(x + b[0]) + b[1]) + b[2]) + b[3]
    torch.testing.assert_close(field(0.0, x), expected)
    assert sum(p.numel() for p in field.parameters()) == 2 * 3 * 5 * 9 + 5


def test_it_is_drawn_anew_for_every_block_and_recorded():
    field = FixupField(nn.Linear(3, 7, bias=False), nn.Linear(7, 3, bias=False), activation=nn.Tanh())
    with torch.no_grad():
        field.biases.fill_(3.0)
    flow = Flow(field, solver="euler", depth=2)
    second = flow.blocks[1].fields[0]
    assert not second.biases.any()
    assert second.scale == 1
    assert flow.record(torch.randn(4, 3), action=measures.action)[1]["action"].shape == (2, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ScaledField(torch.relu), TypeError, r"field must be a module v\(t, x\), got builtin"),
        (lambda: ScaledField(MLPField(2), "0"), TypeError, "initial must be a number, got '0'"),
        (lambda: ScaledField(MLPField(2), float("inf")), ValueError, "initial must be finite, got inf"),
        (lambda: FixupField(), ValueError, "at least one convolution or linear layer, got none"),
        (lambda: FixupField(nn.ReLU()), TypeError, "must be convolutions or linear layers, got ReLU"),
        (lambda: FixupField(nn.Linear(2, 2)), ValueError, "must have bias=False, since scalars take its place"),
        (
            lambda: FixupField(nn.Linear(2, 2, bias=False), activation="relu"),
            TypeError, r"activation must be a module, such as nn.ReLU\(\), got str",
        ),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
