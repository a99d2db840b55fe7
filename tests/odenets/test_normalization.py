"""Batch norm per stage: what has no statistics is refused, and what recalibration sets is what it saw."""

import copy
import itertools
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from odenets import ConvField, Flow, Network, measures, models, recalibrate
from odenets.detection import Trajectory
from odenets.fields import VelocityField
from odenets.modes import keeping_state
from odenets.module_wise import module_wise
from odenets.normalization import StageBatchNorm
from odenets.training import data
from odenets.training.evaluation import evaluate_schemes
from solvers import get_tableau

X = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def network(solver="bs23", **flow):
    torch.manual_seed(0)
    field = lambda: ConvField(3, norm="batch")  # noqa: E731
    head = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
    return Network(nn.Identity(), Flow(field, solver=solver, depth=2, **flow), head)


def trained(solver="bs23", **flow):
    """Its statistics are those that forward passes of a training set."""
    net = network(solver, **flow).train()
    for _ in range(3):
        net(X)
    return net.eval()


def dataset():
    return data.TensorData("noise", X, torch.zeros(len(X), dtype=torch.long), 2, (0, 0, 0), (1, 1, 1))


READERS = {
    "error": lambda net: net.record(X, error=measures.error),
    "own measure": lambda net: net.record(X, last=lambda step: step.stages[-1].flatten(1).sum(1)),
    "steps": lambda net: list(net.steps(X)),
    "outputs": lambda net: net.outputs(X),
    "ensemble": lambda net: net.ensemble(X),
    "ensemble of the flow": lambda net: net.flows[0].ensemble(X),
    "flow's readout": lambda net: net.flows[0](X, "ensemble"),
    "full passes": lambda net: net.outputs(X, full_passes=True),
    "Trajectory": lambda net: Trajectory("error")(net, X),
    "schemes": lambda net: evaluate_schemes(net, data.Batches(dataset(), 6)),
}


@pytest.mark.parametrize("reader", READERS)
def test_closing_stages_without_statistics_are_refused_until_recalibration(reader):
    net = trained()
    with pytest.raises(ValueError, match=r"no statistics of stage 4 of 4, only of \[1, 2, 3\].*recalibrate"):
        READERS[reader](net)
    net(X)
    recalibrate(net, [X])
    READERS[reader](net)


@pytest.mark.parametrize(
    ("solver", "stage"), [("dopri5", 7), ("tsit5", 7), (get_tableau("heun").forwarding("euler"), 2)], ids=str
)
def test_closing_stages_of_every_method_are_refused(solver, stage):
    with pytest.raises(ValueError, match=f"no statistics of stage {stage} of {stage}"):
        trained(solver).record(X, error=measures.error)


def test_stages_behind_the_solution_that_is_carried_on_are_refused():
    with pytest.raises(ValueError, match=r"no statistics of stage 3 of 4, only of \[1, 2\]"):
        trained(get_tableau("bs23").forwarding("midpoint")).ensemble(X)


def test_only_the_last_block_needs_closing_statistics_for_the_ensemble():
    net = network().train()
    net.readout = "ensemble"
    net(X)
    assert net.eval()(X).isfinite().all()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        net.record(X, error=measures.error)


@pytest.mark.parametrize("shared", [False, True])
def test_a_new_network_has_no_statistics_and_may_be_evaluated_as_in_torch(shared):
    net = network(shared=shared).eval()
    assert net.record(X, error=measures.error)[1]["error"].isfinite().all()


def test_training_with_what_reads_the_closing_stage_sets_its_statistics():
    net = network().train()
    net.record(X, error=measures.error)
    net.eval().record(X, error=measures.error)


def _copied(net):
    other = network().eval()
    with torch.no_grad():
        for own, value in zip(other.buffers(), net.buffers(), strict=True):
            own.copy_(value)
    return other


def _loaded(net):
    other = network().eval()
    other.load_state_dict(net.state_dict())
    return other


def _assigned(net):
    other = network().eval()
    other.load_state_dict(net.state_dict(), assign=True)
    return other


def _read_before(net):
    """Statistics that come after the first look are seen too."""
    other = network().eval()
    other.record(X, error=measures.error)
    other.train()(X)
    return other.eval()


@pytest.mark.parametrize("way", [copy.deepcopy, _copied, _loaded, _assigned, _read_before])
def test_statistics_that_came_another_way_are_known(way):
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        way(trained()).record(X, error=measures.error)


@pytest.mark.parametrize("look", [lambda net: None, lambda net: net(X)])
def test_passes_that_leave_no_trace_leave_no_statistics(look):
    net = network().eval()
    look(net)
    expected = net.record(X, error=measures.error)[1]["error"]
    with keeping_state(net):
        net.train()(X)
        net.eval()(X)
    assert torch.equal(net.record(X, error=measures.error)[1]["error"], expected)


def _trained_on(net, passes=lambda net: net(X)):
    recalibrate(net, [X])
    passes(net.train())
    return net.eval()


WAYS = {
    "as it is": lambda net: net,
    "copied": copy.deepcopy,
    "loaded": lambda net: _loaded(net),
    "pickled": lambda net: pickle.loads(pickle.dumps(net.flows[0])),
}


@pytest.mark.parametrize("way", WAYS)
def test_closing_stages_that_stay_behind_further_training_are_refused(way):
    net = _trained_on(network())
    net(X)
    flow = WAYS[way](net)
    with pytest.raises(ValueError, match=r"behind further training of stage 4 of 4, newer ones of \[1, 2, 3\]"):
        flow.record(X, error=measures.error)
    recalibrate(flow, [X])
    assert flow.record(X, error=measures.error)[1]["error"].isfinite().all()


@pytest.mark.parametrize("norm", ["StageBatchNorm", "torch's"])
def test_closing_fields_that_stay_behind_further_training_are_refused(norm):
    net = network(stage_fields="untied")
    if norm == "torch's":
        net._flows[0] = Flow(Plain, solver="bs23", depth=2, stage_fields="untied")
    _trained_on(net)
    net(X)
    with pytest.raises(ValueError, match="closing fields of block 1 have statistics that are behind further training"):
        net.ensemble(X)
    recalibrate(net, [X])
    assert net.ensemble(X).isfinite().all()


@pytest.mark.parametrize(("times", "enough"), [(1, False), (9, False), (10, True)])
def test_errors_measured_now_and_then_in_training_keep_closing_stages_with_the_others(times, enough):
    """As soon as the statistics before are forgotten: three over the momentum."""

    def passes(net):
        for norm in net.modules():
            if isinstance(norm, StageBatchNorm):
                norm.momentum = 0.3
        for _ in range(times):
            net.record(X, error=measures.error)
            net(X)

    net = _trained_on(network(), passes)
    with nullcontext() if enough else pytest.raises(ValueError, match="behind further training of stage 4"):
        net.record(X, error=measures.error)


def test_states_from_before_recalibrations_were_counted_are_taken():
    net, other = trained(), network()
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("recalibrated")}
    recalibrate(other, [X])
    assert not any(other.load_state_dict(state))
    assert torch.equal(other.eval()(X), net(X))
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        other.record(X, error=measures.error)


def test_statistics_are_known_in_inference_mode():
    net = trained()
    with torch.inference_mode(), pytest.raises(ValueError, match="no statistics of stage 4"):
        _loaded(net).ensemble(X)


@torch.no_grad()
def test_statistics_are_known_to_a_compiled_flow():
    flow = network().flows[0].part(0, 1).train()
    run = torch.compile(lambda x, readout: flow(x, readout), backend="eager")
    run(X, "solution")
    assert flow.blocks[0].fields[0].norm1._known == [2, 2, 2, 0]
    flow.eval()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        run(X, "ensemble")
    recalibrate(flow, [X])
    torch.testing.assert_close(run(X, "ensemble"), flow(X, "ensemble"))
    flow.train()
    run(X, "solution")
    flow.eval()
    with pytest.raises(ValueError, match="statistics that are behind further training of stage 4"):
        run(X, "ensemble")


def test_statistics_are_known_under_vmap():
    flows = [network().flows[0] for _ in range(2)]
    parameters, buffers = stack_module_state(flows)
    one = copy.deepcopy(flows[0]).train()

    def call(readout, p, b):
        return functional_call(one, (p, b), (X, readout))

    torch.vmap(partial(call, "solution"))(parameters, buffers)
    one.eval()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        torch.vmap(partial(call, "ensemble"))(parameters, buffers)


def test_the_counts_of_batches_are_read_once(monkeypatch):
    """A device is waited for when they have changed, not at every call."""
    net = trained()
    norm = net.flows[0].blocks[0].fields[0].norm1
    norm.known()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the count was read"))
    for _ in range(3):
        norm(X, 1)


class Plain(nn.Module):
    """A field with torch's own batch norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, t, x):
        return self.conv(self.norm(x))


@pytest.mark.parametrize("field", [Plain, lambda: ConvField(3, norm="batch")], ids=["torch's", "ours"])
def test_closing_fields_of_untied_blocks_without_statistics_are_refused(field):
    flow = Flow(field, solver="bs23", depth=2, stage_fields="untied")
    flow.eval().record(X, error=measures.error)  # new, as it is
    flow.train()(X)
    for reader in (lambda: flow.record(X, error=measures.error), lambda: flow.outputs(X, full_passes=True)):
        with pytest.raises(ValueError, match=r"closing fields of block 0 .*forwarding\('order2'\)"):
            flow.eval() and reader()
    recalibrate(flow, [X])
    flow.record(X, error=measures.error)
    reading = Flow(field, solver=get_tableau("bs23").forwarding("order2"), depth=2, stage_fields="untied")
    reading.train()(X)
    reading.eval().record(X, error=measures.error)


# -- recalibrate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["bs23", "dopri5", "rk4"])
def test_recalibrated_statistics_are_those_of_the_states_of_each_stage(solver):
    net = trained(solver)
    *_, step = (
        net.flows[0].train().steps(X)
    )  # each batch normalized with its own statistics, as while it is recalibrated
    points = [
        step.x0 + step.h * sum((a * p for a, p in zip(row, step.stages, strict=False)), torch.zeros(()))
        for row in step.tableau.a
    ]
    recalibrate(net, [X])
    field = net.flows[0].blocks[1].fields[0]
    mean = torch.stack([x.mean((0, 2, 3)) for x in points])
    torch.testing.assert_close(field.norm1.running_mean, mean, rtol=1e-4, atol=1e-4)
    assert field.norm1.batches.tolist() == [1] * len(points)


def test_the_average_weighs_batches_by_their_samples():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    recalibrate(net, [X[:9], X[9:]])
    torch.testing.assert_close(net[0].running_mean, X.mean((0, 2, 3)))
    by_batch = torch.stack([X[:9].transpose(0, 1).flatten(1).var(1), X[9:].transpose(0, 1).flatten(1).var(1)])
    torch.testing.assert_close(net[0].running_var, (9 * by_batch[0] + 3 * by_batch[1]) / 12)
    torch.testing.assert_close(net[1].running_mean, torch.zeros(3), rtol=0, atol=1e-3)  # behind the batch norm, in sum
    assert net[0].num_batches_tracked == 2
    assert net[1].num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_are_as_precise_as_the_dtype_holds_them(dtype):
    """A running average in bfloat16 stops moving after a few hundred batches."""
    norm = nn.BatchNorm1d(1).to(dtype)
    batches = [
        torch.full((2, 1), float(i % 2)).to(dtype) + torch.tensor([[0.25], [-0.25]]).to(dtype) for i in range(400)
    ]
    recalibrate(norm, batches)
    assert norm.running_mean.dtype == dtype
    assert norm.running_mean.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_taken_to_the_dtype_of_the_network(dtype):
    net = network().to(dtype)
    recalibrate(net, [X])
    again = copy.deepcopy(net)
    recalibrate(again, [X.to(dtype)], again)
    torch.testing.assert_close(net.state_dict(), again.state_dict())


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momenta_modes_and_hooks_are_restored(momentum):
    net = network().train()
    norms = [m for m in net.modules() if isinstance(m, StageBatchNorm)]
    for norm in norms:
        norm.momentum = momentum
    net.head.eval()
    modes = [m.training for m in net.modules()]
    assert recalibrate(net, [X]) == 4
    assert [m.training for m in net.modules()] == modes
    assert all(norm.momentum == momentum and not norm._forward_hooks for norm in norms)
    assert not net.flows[0].takes_closing


def test_a_compiled_network_is_recalibrated():
    net = network().train()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(X)
    assert recalibrate(compiled, [X, X]) == 4
    assert net.flows[0].blocks[0].fields[0].norm1.batches.tolist() == [2, 2, 2, 2]


def test_norms_that_are_not_run_keep_their_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = torch.randn(8, 2) + 3
    net.train()(x)
    before = net[1].running_mean.clone()
    assert recalibrate(net, [x], net[0]) == 1
    torch.testing.assert_close(net[0].running_mean, x.mean(0))
    assert torch.equal(net[1].running_mean, before)
    assert net[1].num_batches_tracked == 1


def test_frozen_norms_keep_their_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2).eval().requires_grad_(False), nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))
    x = torch.randn(8, 2) + 3
    assert recalibrate(net, [x]) == 2
    assert [norm.running_mean.any().item() for norm in net] == [False, True, True]
    assert [norm.training for norm in net] == [False, False, True]
    assert recalibrate(net.eval(), [x]) == 3  # a network in eval mode has no frozen part
    assert net[0].running_mean.all()


def test_norms_without_statistics_are_passed_over():
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2))
    assert recalibrate(net, [torch.randn(4, 2, 3)]) == 0


def test_synchronized_batch_norms_are_recalibrated():
    net = nn.SyncBatchNorm(2)
    x = torch.randn(8, 2) + 3
    recalibrate(net, [x])
    torch.testing.assert_close(net.running_mean, x.mean(0))


def _broken(x):
    yield x
    raise KeyError("no more")


@pytest.mark.parametrize(
    ("batches", "run", "error", "message"),
    [
        (lambda: iter(()), None, ValueError, "batches must hold at least one batch, got none"),
        (lambda: [X], lambda x: None, ValueError, "none of the 4 batch norms was run"),
        (lambda: _broken(X), None, KeyError, "no more"),
        (lambda: [X, X[:, :2]], None, RuntimeError, "weight should contain 2 elements|running_mean should"),
        (lambda: X, None, TypeError, r"batches must hold inputs.*got one tensor: pass \[x\]"),
        (lambda: [X, [X, X]], None, TypeError, r"batches must hold inputs.*got a list of 2.*x for x, y in"),
    ],
)
def test_after_an_error_the_statistics_are_what_they_were(batches, run, error, message):
    net = trained().train()
    net.head.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(error, match=message):
        recalibrate(net, batches(), run)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in net.modules()] == modes
    assert net.flows[0].blocks[0].fields[0].norm1.momentum == 0.1
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        net.eval().ensemble(X)


def test_a_batch_of_one_number_per_channel_is_refused_and_changes_nothing():
    net = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate(net, [torch.randn(4, 2), torch.randn(1, 2)])
    assert not net.running_mean.any()


def test_a_lazy_batch_norm_is_refused():
    with pytest.raises(ValueError, match=r"lazy batch norm.*call network\(x\) once"):
        recalibrate(nn.LazyBatchNorm1d(), [torch.randn(4, 2)])


def test_statistics_that_became_nan_are_replaced():
    net = nn.BatchNorm1d(2)
    net.running_mean.fill_(torch.nan)
    x = torch.randn(8, 2)
    recalibrate(net, [x])
    torch.testing.assert_close(net.running_mean, x.mean(0))


@pytest.mark.parametrize("last_head", ["own", "auxiliary"])
def test_all_heads_of_modules_are_recalibrated(last_head):
    torch.manual_seed(0)
    images = torch.rand(16, 1, 8, 8)
    modules = module_wise(models.resnet9(features=4, size=8, depth=2), 2, images, last_head=last_head)
    norms = [m for part in modules.modules_in_order for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    heads = [m for part in modules.modules_in_order for m in part.head.modules() if hasattr(m, "num_batches_tracked")]
    assert norms
    assert heads
    recalibrate(modules, [images, images])
    assert all(norm.num_batches_tracked == 2 for norm in (*norms, *heads))


def test_a_shared_norm_averages_over_all_its_calls():
    norm = nn.BatchNorm1d(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + self.norm(x + 2)

    x = torch.randn(8, 2)
    recalibrate(Twice(), [x])
    torch.testing.assert_close(norm.running_mean, x.mean(0) + 1)


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["field", "function"])
@pytest.mark.parametrize("stages", ["tied", "untied"])
def test_a_field_keeps_its_statistics_and_the_flow_trains_its_parameters(source, stages):
    torch.manual_seed(0)
    field = ConvField(3, norm="batch")
    field.train()(0.0, X)
    before = copy.deepcopy(field.state_dict())
    fields = itertools.chain([field], iter(lambda: ConvField(3, norm="batch"), None))
    flow = Flow(field if source == "field" else lambda: next(fields), solver="bs23", stage_fields=stages)
    for name, value in field.state_dict().items():
        assert torch.equal(value, before[name]), name
    own = flow.blocks[0].fields[0]
    assert [id(p) for p in own.parameters()] == [id(p) for p in field.parameters()]
    flow.train()(X)
    if stages == "tied":
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


def test_a_state_of_another_method_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"norm1: the state holds batch norm statistics of 4 stage\(s\).*has 1"):
        network("euler").load_state_dict(trained("bs23").state_dict())


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
