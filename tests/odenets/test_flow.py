import math

import pytest
import torch
from torch import nn

import odenets
from odenets import ConvField, Flow, MLPField, measures
from solvers import get_tableau
from tests.odenets.networks import Calling

VECTORS, IMAGES = torch.randn(5, 3), torch.randn(4, 8, 6, 6)


@pytest.mark.parametrize("x", [VECTORS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("stage_fields", ["tied", "chained", "untied"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "bs23", "dopri5"])
def test_one_function_through_forward_steps_and_record(solver, stage_fields, x):
    flow = Flow(solver=solver, depth=3, stage_fields=stage_fields)
    *_, last = flow.steps(x)
    end, records = flow.record(x, action=measures.action, mine=lambda step: step.x0.flatten(1).sum(1))
    assert torch.equal(flow(x), last.x1)
    assert torch.equal(flow(x), end)
    assert records["action"].shape == records["mine"].shape == (3, len(x))


@pytest.mark.parametrize(("solver", "stage_fields"), [("euler", "tied"), ("bs23", "tied"), ("bs23", "chained")])
def test_compiles_to_the_same_function(solver, stage_fields):
    flow = Flow(solver=solver, depth=3, stage_fields=stage_fields)
    end = flow(IMAGES)
    torch.testing.assert_close(torch.compile(flow, fullgraph=True, backend="aot_eager")(IMAGES), end)


def test_records_compile_without_graph_break():
    flow = Flow(solver="bs23", depth=2)
    flow(VECTORS)

    def run(x):
        end, records = flow.record(x, action=measures.action, error=measures.error, cosine=measures.cosine)
        return end, records["action"], records["error"], records["cosine"]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(VECTORS), run(VECTORS))


def preactivation_resnet(channels, depth):
    """He et al. 2016, written by hand."""

    def half():
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return nn.BatchNorm2d(channels), nn.ReLU(), conv

    branches = [nn.Sequential(*half(), *half()) for _ in range(depth)]
    return nn.Sequential(*(Calling(lambda m, x: x + m.branch(x), branch=branch) for branch in branches))


def test_euler_with_h_one_is_a_preactivation_resnet():
    by_hand = preactivation_resnet(8, 4)
    flow = Flow(lambda: ConvField(8, norm="batch"), solver="euler", depth=4, h=1.0)
    for residual, block in zip(by_hand, flow.blocks, strict=True):
        for layer, name in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (5, "conv2")):
            getattr(block.fields[0], name).weight.data.copy_(residual.branch[layer].weight.data)
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


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
@pytest.mark.parametrize(
    ("solver", "interior", "all_stages", "full"),
    [("bs23", 3, 4, 10), ("dopri5", 6, 7, 14), ("rk4", 4, 4, 7), ("euler", 1, 1, 1), ("midpoint", 2, 2, 3)],
)
def test_only_stages_that_are_read_are_evaluated(solver, interior, all_stages, full, stage_fields):
    depth = 5
    flow = Flow(Tallied, solver=solver, depth=depth, stage_fields=stage_fields)
    once = depth * interior
    assert calls(lambda: flow(VECTORS)) == flow.evaluations == once
    ensemble = once + all_stages - interior
    assert calls(lambda: flow.ensemble(VECTORS)) == calls(lambda: flow(VECTORS, readout="ensemble")) == ensemble
    assert flow.evaluations_per_pass(readout="ensemble") == ensemble
    assert calls(lambda: flow.record(VECTORS, readout="ensemble", action=measures.action)) == ensemble
    assert calls(lambda: flow.ensemble(VECTORS, full_passes=True)) == full * depth
    closed = depth * interior + 1 if stage_fields == "chained" and interior < all_stages else depth * all_stages
    assert calls(lambda: list(flow.steps(VECTORS))) == flow.evaluations_per_pass(closing=True) == closed
    assert calls(lambda: flow.record(VECTORS, readout="ensemble", peak=lambda step: step.x1.sum(1))) == closed


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
@pytest.mark.parametrize(("output", "needed"), [("euler", 1), ("midpoint", 2), ("order2", 4), ("order3", 3)])
def test_a_method_that_carries_another_output_on_takes_its_stages_alone(output, needed, stage_fields):
    torch.manual_seed(0)
    flow = Flow(Tallied, solver=get_tableau("bs23").forwarding(output), depth=5, stage_fields=stage_fields)
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


def test_outputs_and_ensemble():
    flow = Flow(MLPField(3), depth=2)
    *_, last = flow.steps(VECTORS)
    outputs = flow.outputs(VECTORS)
    assert list(outputs) == ["euler", "midpoint", "order2", "order3"]
    assert torch.equal(outputs["order3"], flow(VECTORS))
    assert torch.equal(outputs["order2"], last.output("order2"))
    torch.testing.assert_close(flow.ensemble(VECTORS), sum(outputs.values()) / 4)
    assert torch.equal(flow(VECTORS, readout="ensemble"), flow.ensemble(VECTORS))
    euler = Flow(MLPField(3), solver="euler", depth=2)
    euler.load_state_dict(flow.state_dict())
    full = flow.outputs(VECTORS, full_passes=True)
    torch.testing.assert_close(full["euler"], euler(VECTORS))
    torch.testing.assert_close(full["order3"], flow(VECTORS))


def test_ensemble_trains_every_stage():
    flow = Flow(lambda: MLPField(3), depth=1, stage_fields="untied")
    flow(VECTORS).sum().backward()
    assert flow.blocks[0].fields[3].first.weight.grad is None
    flow(VECTORS, readout="ensemble").sum().backward()
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
    with pytest.raises(ValueError, match="readout must be 'solution' or 'ensemble', got <measure action>"):
        flow.record(VECTORS, readout=measures.action)
    plain = odenets.Flow(solver="implicit_euler", depth=2)
    plain(VECTORS)
    for call in (
        lambda: plain(VECTORS, readout="ensemble"),
        lambda: plain.ensemble(VECTORS),
        lambda: odenets.Network(torch.nn.Identity(), plain, torch.nn.Identity(), readout="ensemble"),
        lambda: odenets.Network(torch.nn.Identity(), plain, torch.nn.Identity()).ensemble(VECTORS),
    ):
        with pytest.raises(ValueError, match="readout must be 'solution': implicit_euler has no embedded outputs"):
            call()
    with pytest.raises(ValueError, match="euler carries no embedded error"):
        Flow(solver="euler").record(VECTORS, error=measures.error)
