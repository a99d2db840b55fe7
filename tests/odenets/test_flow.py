import copy
import math

import pytest
import torch
import torchdiffeq
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import odenets
from odenets import ConvField, Flow, MLPField, measures
from odenets.fields import VelocityField
from solvers import PI, Tolerance, get_tableau
from tests.counting import Counted

VECTORS, IMAGES = torch.randn(5, 3), torch.randn(4, 8, 6, 6)


@pytest.mark.parametrize("x", [VECTORS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("stages", ["tied", "chained", "untied"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "bs23", "dopri5"])
def test_one_function_through_forward_steps_and_record(solver, stages, x):
    flow = Flow(solver=solver, depth=3, stage_fields=stages)
    *_, last = flow.steps(x)
    end, records = flow.record(x, action=measures.action, mine=lambda step: step.x0.flatten(1).sum(1))
    assert torch.equal(flow(x), last.x1)
    assert torch.equal(flow(x), end)
    assert records["action"].shape == records["mine"].shape == (3, len(x))


@pytest.mark.parametrize(("solver", "stages"), [("euler", "tied"), ("bs23", "tied"), ("bs23", "chained")])
def test_compiles_to_the_same_function(solver, stages):
    flow = Flow(solver=solver, depth=3, stage_fields=stages)
    end = flow(IMAGES)
    torch.testing.assert_close(torch.compile(flow, fullgraph=True, backend="aot_eager")(IMAGES), end)


def test_records_compile_without_graph_break():
    flow = Flow(solver="bs23", depth=2)
    flow(VECTORS)

    def run(x):
        end, records = flow.record(x, action=measures.action, error=measures.error, cosine=measures.cosine)
        return end, records["action"], records["error"], records["cosine"]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(VECTORS), run(VECTORS))


class HandWritten(nn.Module):
    """A pre-activation residual network, He et al. 2016."""

    def __init__(self, channels, depth):
        super().__init__()
        branch = lambda: nn.Sequential(  # noqa: E731
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.branches = nn.ModuleList(branch() for _ in range(depth))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_euler_with_h_one_is_a_preactivation_resnet():
    by_hand = HandWritten(8, 4)
    flow = Flow(lambda: ConvField(8, norm="batch"), solver="euler", depth=4, h=1.0)
    for branch, block in zip(by_hand.branches, flow.blocks, strict=True):
        for layer, name in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (5, "conv2")):
            getattr(block.fields[0], name).weight.data.copy_(branch[layer].weight.data)
    x, y = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    for mode in (True, False):
        ours, theirs = flow.train(mode)(x), by_hand.train(mode)(y)
        assert torch.equal(ours, theirs)
        grads = torch.autograd.grad(ours.square().sum(), [x, *flow.parameters()])
        expected = torch.autograd.grad(theirs.square().sum(), [y, *by_hand.parameters()])
        by_norm = lambda tensors: sorted(g.norm().item() for g in tensors)  # noqa: E731
        assert torch.equal(grads[0], expected[0])
        assert by_norm(grads) == by_norm(expected)


def test_a_flow_knows_its_time():
    flow = Flow(MLPField(3), depth=4, total_time=2.0)
    assert flow.h == (0.5,) * 4
    assert flow.total_time == 2.0
    assert Flow(MLPField(3), depth=2, h=[0.3, 0.7]).h == (0.3, 0.7)
    assert Flow(depth=3).total_time == pytest.approx(1.0)
    times = [step.t for step in flow.steps(VECTORS)]
    assert times == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("stages", "with_error", "expected"),
    [("tied", False, 9), ("tied", True, 12), ("chained", False, 9), ("chained", True, 10), ("untied", True, 12)],
)
def test_evaluations(stages, with_error, expected):
    counters = []

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Counted(nn.Linear(3, 3))
            self.inner.field = lambda t, x: torch.sin(x)
            counters.append(self.inner)

        def forward(self, t, x):
            return self.inner(t, x)

    flow = Flow(Field, depth=3, stage_fields=stages)
    flow.record(VECTORS, **({"error": measures.error} if with_error else {"action": measures.action}))
    assert sum(counter.calls for counter in counters) == expected
    if not with_error:
        assert flow.evaluations == expected


class Tallied(nn.Module):
    """A linear field whose calls are counted together."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, x):
        Tallied.calls += 1
        return self.linear(x)


def calls(work):
    Tallied.calls = 0
    work()
    return Tallied.calls


@pytest.mark.parametrize("stages", ["tied", "untied", "chained"])
@pytest.mark.parametrize(
    ("solver", "interior", "all_stages", "full"),
    [("bs23", 3, 4, 10), ("dopri5", 6, 7, 14), ("rk4", 4, 4, 7), ("euler", 1, 1, 1), ("midpoint", 2, 2, 3)],
)
def test_only_stages_that_are_read_are_evaluated(solver, interior, all_stages, full, stages):
    depth = 5
    flow = Flow(Tallied, solver=solver, depth=depth, stage_fields=stages)
    once = depth * interior
    assert calls(lambda: flow(VECTORS)) == flow.evaluations == once
    ensemble = once + all_stages - interior
    assert calls(lambda: flow.ensemble(VECTORS)) == calls(lambda: flow(VECTORS, "ensemble")) == ensemble
    assert flow.evaluations_per_pass(readout="ensemble") == ensemble
    assert calls(lambda: flow.record(VECTORS, "ensemble", action=measures.action)) == ensemble
    assert calls(lambda: flow.ensemble(VECTORS, full_passes=True)) == full * depth
    closed = depth * interior + 1 if stages == "chained" and interior < all_stages else depth * all_stages
    assert calls(lambda: list(flow.steps(VECTORS))) == flow.evaluations_per_pass(closing=True) == closed
    assert calls(lambda: flow.record(VECTORS, "ensemble", peak=lambda step: step.x1.sum(1))) == closed


@pytest.mark.parametrize("stages", ["tied", "untied", "chained"])
@pytest.mark.parametrize(("output", "needed"), [("euler", 1), ("midpoint", 2), ("order2", 4), ("order3", 3)])
def test_a_method_that_carries_another_output_on_takes_its_stages_alone(output, needed, stages):
    torch.manual_seed(0)
    flow = Flow(Tallied, solver=get_tableau("bs23").forwarding(output), depth=5, stage_fields=stages)
    assert calls(lambda: flow(VECTORS)) == flow.evaluations == 5 * needed
    assert calls(lambda: list(flow.steps(VECTORS, closing=False))) == 5 * needed
    *_, whole = flow.steps(VECTORS)
    assert len(whole.stages) == 4
    assert torch.equal(whole.x1, flow(VECTORS))
    weights = dict(get_tableau("bs23").embedded)[output].b
    by_hand = whole.x0 + whole.h * sum(b * p for b, p in zip(weights, whole.stages, strict=True))
    torch.testing.assert_close(whole.x1, by_hand)
    assert whole.error().shape == VECTORS.shape


def test_gradients_reach_the_fields_of_the_stages_that_are_read():
    flow = Flow(Tallied, solver=get_tableau("bs23").forwarding("midpoint"), depth=1, stage_fields="untied")
    flow(VECTORS).sum().backward()
    learning = [field.linear.weight.grad is not None for field in flow.blocks[0].fields]
    assert learning == [True, True, False, False]
    assert calls(lambda: flow(VECTORS)) == 2


def test_a_shared_flow_passes_its_closing_stage_on():
    flow = Flow(Tallied, solver="bs23", depth=5, shared=True)
    assert calls(lambda: flow.record(VECTORS, error=measures.error)) == flow.evaluations_per_pass(closing=True) == 16
    assert calls(lambda: flow.ensemble(VECTORS)) == 16


@pytest.mark.parametrize("ends", [(1, 3), (0, 3)], ids=["part", "whole"])
def test_a_part_has_hooks_and_a_mode_of_its_own(ends):
    flow = Flow(MLPField(3), depth=3)
    fired = []
    part = flow.part(*ends)
    part.register_forward_hook(lambda *_: fired.append("part"))
    part.register_state_dict_post_hook(lambda *_: fired.append("state"))
    flow(VECTORS)
    flow.state_dict()
    assert fired == []
    part(VECTORS)
    assert fired == ["part"]
    flow.register_forward_pre_hook(lambda *_: fired.append("whole"))
    flow.register_full_backward_hook(lambda *_: fired.append("whole"))
    part(VECTORS).sum().backward()
    assert fired == ["part", "part"]
    part.register_buffer("extra", torch.zeros(1))
    assert not list(flow.buffers())
    assert [id(p) for p in part.parameters()] == [
        id(p) for block in flow.blocks[slice(*ends)] for p in block.parameters()
    ]
    part.eval()
    assert flow.training
    assert flow.blocks.training


def test_a_flow_is_cut_where_tensors_are_fake():
    flow = Flow(MLPField(3), depth=3)
    with FakeTensorMode():
        assert flow.part(0, 2).depth == 2


def test_a_part_of_a_frozen_flow_is_frozen():
    flow = Flow(MLPField(3), depth=3).eval()
    assert not any(module.training for module in flow.part(0, 2).modules())


def test_a_part_of_a_compiled_flow_is_the_part():
    flow = Flow(MLPField(3), depth=3)
    flow.compile(backend="eager")
    *_, last = flow.part(0, 2).steps(VECTORS)
    torch.testing.assert_close(flow.part(0, 2)(VECTORS), last.x1)


def test_a_part_keeps_what_a_class_overrides_and_lacks_no_setting_of_it():
    class Doubling(Flow):
        def forward(self, x, readout="solution"):
            return 2 * super().forward(x, readout)

    flow = Doubling(MLPField(3), depth=3)
    *_, last = flow.part(0, 2).steps(VECTORS)
    assert torch.equal(flow.part(0, 2)(VECTORS), 2 * last.x1)

    class Scaled(Flow):
        def __init__(self, *args, scale=1.0, **settings):
            super().__init__(*args, **settings)
            self.scale = scale

    with pytest.raises(TypeError, match="Scaled has settings of its own, which a part would lack: let it define part"):
        Scaled(MLPField(3), depth=3, scale=2.0).part(0, 2)


@pytest.mark.parametrize("settings", [{"shared": True, "depth": 3}, {"tolerance": Tolerance(), "controller": PI()}])
def test_the_whole_of_a_shared_or_continuous_flow_is_a_part(settings):
    flow = Flow(MLPField(3), solver="bs23", total_time=2.0, **settings)
    part = flow.part(0, flow.depth)
    assert torch.equal(part(VECTORS), flow(VECTORS))
    assert (part.h, part.controller, part.tolerance) == (flow.h, flow.controller, flow.tolerance)


def test_a_flow_without_a_field_has_no_parts():
    with pytest.raises(ValueError, match="call it once before it is cut"):
        Flow(depth=2).part(0, 2)


def test_a_field_made_in_inference_mode_can_be_trained():
    flow = Flow(depth=2)
    with torch.inference_mode():
        flow(VECTORS)
    flow(VECTORS).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_a_field_made_under_autocast_has_weights_of_full_precision():
    flow = Flow(depth=2)
    with torch.autocast("cpu", torch.bfloat16):
        flow(VECTORS.bfloat16())
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    flow = Flow(depth=2)
    flow(VECTORS.bfloat16())
    assert {p.dtype for p in flow.parameters()} == {torch.bfloat16}


def test_fields_of_blocks_differ_and_copies_are_drawn_anew():
    flow = Flow(MLPField(3), depth=3)
    weights = [block.fields[0].first.weight for block in flow.blocks]
    assert len({w.data_ptr() for w in weights}) == 3
    assert not torch.equal(weights[0], weights[1])

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, t, x):
            return self.scale * x

    with pytest.raises(ValueError, match=r"'Odd' has parameters but no reset_parameters.*field=lambda"):
        Flow(Odd(), depth=2)
    assert len(Flow(Odd, depth=2).blocks) == 2

    class OddToo(VelocityField):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, t, x, stage=0):
            return self.scale * x

    with pytest.raises(ValueError, match=r"'OddToo' has parameters but no reset_parameters.*field=lambda"):
        Flow(OddToo(), depth=2)


def test_batch_norm_keeps_statistics_per_stage():
    flow = Flow(ConvField(8, norm="batch"), solver="bs23", depth=1, total_time=4.0)
    for _ in range(20):
        flow.record(torch.randn(16, 8, 6, 6), error=measures.error)
    field = flow.blocks[0].fields[0]
    assert field.norm1.running_var.shape == (4, 8)
    assert field.norm1.batches.tolist() == [20] * 4
    *_, step = flow.train().steps(IMAGES)
    stage_inputs = [step.x0, step.x0 + 2.0 * step.stages[0], step.x0 + 3.0 * step.stages[1], step.x1]
    for i, x in enumerate(stage_inputs):
        torch.testing.assert_close(field.norm1(x, i), nn.functional.batch_norm(x, None, None, training=True))


def test_recalibration_replaces_lagging_averages():
    flow = Flow(ConvField(8, norm="batch"), depth=2)
    batches = [3 + 2 * torch.randn(32, 8, 6, 6) for _ in range(4)]
    flow.train()(batches[0])
    before = {k: v.clone() for k, v in flow.named_parameters()}
    assert odenets.recalibrate(flow, batches) == 4
    norm = flow.blocks[0].fields[0].norm1
    torch.testing.assert_close(norm.running_mean[0], torch.cat(batches).mean((0, 2, 3)))
    assert norm.momentum == 0.1
    assert flow.training
    assert all(torch.equal(v, before[k]) for k, v in flow.named_parameters())
    assert odenets.recalibrate(nn.Linear(2, 2), batches) == 0


def test_continuous_flow_agrees_with_torchdiffeq():
    field = MLPField(3, time=True).double()
    x = VECTORS.double()
    flow = Flow(field, tolerance=Tolerance(1e-8, 1e-9))
    theirs = torchdiffeq.odeint(field, x, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=1e-9, atol=1e-10)[-1]
    torch.testing.assert_close(flow(x), theirs, rtol=1e-6, atol=1e-6)
    assert flow.evaluations == flow.statistics.evaluations > 12
    _, records = flow.record(x, action=measures.action)
    assert records["action"].shape == (flow.statistics.accepted, 5)


def test_what_is_measured_changes_no_state_of_a_shared_flow_with_batch_norm():
    """Every stage has statistics of its own, so that a closing stage is not the first of the next step."""
    torch.manual_seed(0)
    flow = Flow(ConvField(4, norm="batch"), solver="bs23", depth=3, shared=True)
    x = torch.rand(8, 4, 5, 5)
    for _ in range(3):
        flow.train().record(x, error=measures.error)
    state, records = flow.eval().record(x, error=measures.error)
    assert torch.equal(state, flow(x))
    assert records["error"].shape == (3, 8)
    assert flow.evaluations_per_pass(closing=True) == 12


def test_batch_norm_takes_the_precision_of_its_weights():
    flow = Flow(ConvField(4, norm="batch").double(), solver="bs23", depth=2)
    assert flow(torch.rand(3, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_a_refused_first_input_leaves_a_lazy_flow_as_it_was():
    flow = Flow()
    with pytest.raises(ValueError, match="no default field"):
        flow(torch.rand(2, 3, 4))
    assert flow(torch.rand(2, 3)).shape == (2, 3)
    assert flow.input_shape == (3,)


class Reusing(nn.Module):
    """A field that returns the same tensor at every call."""

    def forward(self, t, x):
        self.out = getattr(self, "out", torch.empty_like(x))
        return self.out.copy_(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wrap", [lambda flow: flow, lambda flow: odenets.Network(nn.Identity(), flow, nn.Identity())])
def test_steps_that_are_kept_are_not_overwritten_by_later_ones(wrap, mode):
    """A record measures each step as it is taken, which is right with such a field of one stage."""
    x, flow = torch.ones(2, 3), wrap(Flow(Reusing(), solver="euler", depth=3, h=1.0, shared=True))
    with mode():
        torch.testing.assert_close(flow(x), 8 * x)
        assert flow.record(x, residue=measures.residue)[1]["residue"][:, 0].tolist() == [1, 4, 16]
        with pytest.raises(ValueError, match="field must not write into what it has returned"):
            list(flow.steps(x))


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


def test_outputs_and_ensemble():
    flow = Flow(MLPField(3), depth=2)
    *_, last = flow.steps(VECTORS)
    outputs = flow.outputs(VECTORS)
    assert list(outputs) == ["euler", "midpoint", "order2", "order3"]
    assert torch.equal(outputs["order3"], flow(VECTORS))
    assert torch.equal(outputs["order2"], last.output("order2"))
    torch.testing.assert_close(flow.ensemble(VECTORS), sum(outputs.values()) / 4)
    assert torch.equal(flow(VECTORS, "ensemble"), flow.ensemble(VECTORS))
    euler = Flow(MLPField(3), solver="euler", depth=2)
    euler.load_state_dict(flow.state_dict())
    full = flow.outputs(VECTORS, full_passes=True)
    torch.testing.assert_close(full["euler"], euler(VECTORS))
    torch.testing.assert_close(full["order3"], flow(VECTORS))


def test_ensemble_trains_every_stage():
    flow = Flow(lambda: MLPField(3), depth=1, stage_fields="untied")
    flow(VECTORS).sum().backward()
    assert flow.blocks[0].fields[3].first.weight.grad is None
    flow(VECTORS, "ensemble").sum().backward()
    assert all(field.first.weight.grad is not None for field in flow.blocks[0].fields)


def test_duplicating_a_block_changes_the_output_as_theory_says():
    """Tied, time-independent: two half steps differ from one step by O(h^4) for bs23, its local error."""
    field = MLPField(3).double()
    x = VECTORS.double()
    changes = []
    for h in (0.2, 0.1):
        once = Flow(field, h=h)
        twice = Flow(field, depth=2, h=h / 2, shared=True)
        changes.append((once(x) - twice(x)).norm().item())
    assert changes[0] / changes[1] == pytest.approx(16, rel=0.15)


def test_step_sizes_travel_with_the_state():
    flow, other = Flow(MLPField(3), depth=2, h=[0.3, 0.7]), Flow(MLPField(3), depth=2)
    other.load_state_dict(flow.state_dict())
    assert other.h == (0.3, 0.7)
    assert torch.equal(other(VECTORS), flow(VECTORS))
    with pytest.raises((ValueError, RuntimeError)):
        Flow(MLPField(3), depth=3).load_state_dict(flow.state_dict())


def test_lazy_flow_shows_that_it_has_no_field_yet():
    flow = Flow()
    assert [nn.parameter.is_lazy(p) for p in flow.parameters()] == [True]
    flow(VECTORS.double())
    assert all(p.dtype == torch.float64 for p in flow.parameters())
    assert flow.input_shape == (3,)
    assert not any(nn.parameter.is_lazy(p) for p in copy.deepcopy(flow).parameters())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int), TypeError, r"x must be of a floating dtype, got torch.int32; convert"),
        (torch.ones(0, 3), ValueError, "x must hold at least one sample"),
        (torch.full((2, 3), math.nan), ValueError, r"x must be finite, got NaN or infinity in sample\(s\) \[0, 1\]"),
        (torch.ones(2, 3, 4), ValueError, "no default field for x of shape"),
    ],
)
def test_bad_input_is_named(x, error, message):
    with pytest.raises(error, match=message):
        Flow()(x)


def test_wrong_measures_are_named():
    flow = Flow()
    with pytest.raises(ValueError, match=r"measure 'total' must return one number per sample, shape \(5,\), got \(\)"):
        flow.record(VECTORS, total=lambda step: step.x1.sum())
    with pytest.raises(TypeError, match="measure 'action' must be a function"):
        flow.record(VECTORS, action="action")
    with pytest.raises(TypeError, match="the readout is positional"):
        flow.record(VECTORS, readout="ensemble")
    with pytest.raises(ValueError, match="euler carries no embedded error"):
        Flow(solver="euler").record(VECTORS, error=measures.error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"h": -0.1}, "h must be positive"),
        ({"depth": 2, "h": [0.1]}, "one step size per block"),
        ({"h": 0.1, "total_time": 1.0}, "exclude each other"),
        ({"stage_fields": "loose"}, "stage_fields must be"),
        ({"solver": "rk5"}, "unknown solver"),
        ({"tolerance": Tolerance(), "depth": 2}, "continuous flow"),
        ({"tolerance": Tolerance(), "solver": "euler"}, "no embedded error"),
        ({"shared": True, "stage_fields": "untied"}, "stage_fields must be 'tied'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Flow(**arguments)


def test_step_sizes_of_a_state_reach_shared_continuous_and_lazy_flows():
    for settings in ({"shared": True, "depth": 2}, {"tolerance": Tolerance(0.1, 0.1)}):
        flow, other = (Flow(MLPField(3), total_time=total, **settings) for total in (3.0, 1.0))
        other.load_state_dict(flow.state_dict())
        assert other.h == flow.h
        assert torch.equal(other(VECTORS), flow(VECTORS))
    lazy = Flow(depth=2)
    lazy.set_extra_state(torch.tensor([0.3, 0.7]))
    lazy(VECTORS)
    assert lazy.h == pytest.approx((0.3, 0.7))
