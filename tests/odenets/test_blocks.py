"""Fields of blocks: whose they are, how often one is drawn, and the statistics of their stages."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from odenets import ConvField, Flow, MLPField, NeuralODE, measures
from odenets.fields import VelocityField
from tests.odenets.normalization.networks import X, trained

VECTORS = torch.randn(5, 3)


def test_fields_of_blocks_differ_and_copies_are_drawn_anew():
    flow = Flow(MLPField(3), depth=3)
    weights = [block.fields[0].first.weight for block in flow.blocks]
    assert len({w.data_ptr() for w in weights}) == 3
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("base", [nn.Module, VelocityField])
def test_a_field_that_cannot_be_drawn_anew_is_refused_where_there_are_several(base):
    class Odd(base):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, t, x, stage=0):
            return self.scale * x

    with pytest.raises(ValueError, match=r"'Odd' has parameters but no reset_parameters.*field=lambda"):
        Flow(Odd(), depth=2)
    assert len(Flow(Odd, depth=2).blocks) == 2


@pytest.mark.parametrize(
    "arguments", [{"depth": 2}, {"stage_fields": "untied"}, {"depth": 3, "stage_fields": "chained"}]
)
def test_a_function_that_makes_one_field_only_is_refused(arguments):
    field = MLPField(2)
    with pytest.raises(ValueError, match=r"field must make a new module at each call.*shared=True"):
        Flow(lambda: field, solver="bs23", **arguments)
    assert Flow(lambda: field, solver="bs23", depth=3, shared=True).blocks[0].fields[0] is field


def test_shared_flow_uses_one_field():
    flow = Flow(MLPField(3), depth=4, shared=True)
    assert len(flow.blocks) == 1
    deep = Flow(MLPField(3), depth=4)
    for block in deep.blocks:
        block.load_state_dict(flow.blocks[0].state_dict())
    torch.testing.assert_close(flow(VECTORS), deep(VECTORS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"h": -0.1}, "h must be positive"),
        ({"depth": 2, "h": [0.1]}, "one step size per block"),
        ({"h": 0.1, "total_time": 1.0}, "exclude each other"),
        ({"stage_fields": "loose"}, "stage_fields must be"),
        ({"solver": "rk5"}, "unknown solver"),
        ({"shared": True, "stage_fields": "untied"}, "stage_fields must be 'tied'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Flow(**arguments)


@pytest.mark.parametrize("h", [torch.tensor(0.1), torch.tensor([0.1, 0.1]), "0.1"])
def test_step_sizes_are_numbers(h):
    with pytest.raises(TypeError, match="h must be a number, or one for each block"):
        Flow(depth=2, h=h)


@pytest.mark.parametrize("source", ["field", "function"])
@pytest.mark.parametrize("stage_fields", ["tied", "untied"])
def test_a_field_keeps_its_statistics_and_the_flow_trains_its_parameters(source, stage_fields):
    torch.manual_seed(0)
    field = ConvField(3, norm="batch")
    field.train()(0.0, X)
    before = copy.deepcopy(field.state_dict())
    fields = itertools.chain([field], iter(lambda: ConvField(3, norm="batch"), None))
    flow = Flow(field if source == "field" else lambda: next(fields), solver="bs23", stage_fields=stage_fields)
    for name, value in field.state_dict().items():
        assert torch.equal(value, before[name]), name
    own = flow.blocks[0].fields[0]
    assert [id(p) for p in own.parameters()] == [id(p) for p in field.parameters()]
    flow.train()(X)
    if stage_fields == "tied":
        assert torch.equal(field.norm1.running_mean, before["norm1.running_mean"])
    field.load_state_dict(before)


def test_each_stage_begins_with_the_statistics_of_the_field():
    field = ConvField(3, norm="batch")
    field.train()(0.0, X)
    flow = Flow(field.eval(), solver="bs23").eval()
    for stage in range(4):
        assert torch.equal(flow.blocks[0].fields[0](0.0, X, stage), field(0.0, X))
    assert flow.record(X, error=measures.error)[1]["error"].isfinite().all()


def test_a_field_that_fits_is_taken_as_it_is():
    field = ConvField(3, norm="batch")
    assert Flow(field, solver="euler").blocks[0].fields[0] is field
    plain = ConvField(3, norm="group")
    assert Flow(plain, solver="bs23").blocks[0].fields[0] is plain


def test_a_field_of_another_method_keeps_the_statistics_of_its_first_stage_alone():
    field = trained("bs23").flows[0].blocks[0].fields[0]
    flow = Flow(field, solver="heun").eval()
    with pytest.raises(ValueError, match=r"no statistics of stage 2 of 2, only of \[1\]"):
        flow(X)
    euler = Flow(field, solver="euler").eval()
    torch.testing.assert_close(euler(X), X + field(0.0, X, 0))


def test_one_field_in_two_flows_has_statistics_in_each():
    field = ConvField(3, norm="batch")
    first, second = Flow(field, solver="bs23"), Flow(field, solver="rk4")
    first.train()(X)
    assert not second.blocks[0].fields[0].norm1.batches.any()
    assert {id(p) for p in first.parameters()} == {id(p) for p in second.parameters()}


def test_fields_of_ones_own_may_expand_in_their_own_way():
    class Scaled(VelocityField):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def expand_stages(self, stages):
            self.scale = nn.Parameter(torch.ones(stages))

        def forward(self, t, x, stage=0):
            return self.scale[stage] * x

    field = Scaled()
    assert Flow(field, solver="bs23").blocks[0].fields[0].scale.shape == (4,)
    assert field.scale.shape == (1,)


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
def test_what_follows_x_is_never_taken_for_the_stage(stage_fields):
    flow = Flow(MLPField(3), solver="bs23", stage_fields=stage_fields)
    with pytest.raises(TypeError, match=r"but MLPField takes \(t, x\) \(no further arguments by position\)$"):
        flow(VECTORS, 1)
    with pytest.raises(TypeError, match="1 further, as v"):
        flow.ensemble(VECTORS, 1, full_passes=True)


def test_an_error_within_a_field_is_its_own():
    class Wrong(nn.Linear):
        def forward(self, t, x):
            return super().forward(len(t) + x)

    with pytest.raises(TypeError, match=r"object of type 'float' has no len\(\)"):
        Flow(Wrong(3, 3))(VECTORS)


def test_functions_of_fields_do_not_outlive_them():
    big = nn.Linear(3, 3).requires_grad_(False)
    held = weakref.ref(big)

    class Bound(nn.Module):
        def forward(self, t, x, of=big):
            return -x

    assert torch.equal(NeuralODE(Bound(), solver="euler", steps=1)(VECTORS), Flow(Bound(), solver="euler")(VECTORS))
    del Bound, big
    gc.collect()
    assert held() is None


def test_a_field_without_a_hash():
    class Plain:
        __hash__ = None

        def __call__(self, t, x):
            return -x

    torch.testing.assert_close(NeuralODE(Plain(), solver="euler", steps=1)(VECTORS), 0 * VECTORS)
