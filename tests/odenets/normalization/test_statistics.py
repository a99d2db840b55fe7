"""Statistics that training does not set, or leaves behind, are refused until recalibration."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from odenets import ConvField, Flow, Network, measures, recalibrate
from odenets.detection import Trajectory
from odenets.modes import keeping_state
from odenets.normalization import StageBatchNorm
from odenets.training import data
from odenets.training.evaluation import evaluate_schemes
from solvers import get_tableau
from tests.odenets.networks import Velocity
from tests.odenets.normalization.networks import X, network, trained


def dataset():
    return data.TensorData(X, torch.zeros(len(X), dtype=torch.long))


READERS = {
    "error": lambda net: net.record(X, error=measures.error),
    "own measure": lambda net: net.record(X, last=lambda step: step.stages[-1].flatten(1).sum(1)),
    "steps": lambda net: list(net.steps(X)),
    "outputs": lambda net: net.outputs(X),
    "ensemble": lambda net: net.ensemble(X),
    "ensemble of the flow": lambda net: net.flows[0].ensemble(X),
    "flow's readout": lambda net: net.flows[0](X, readout="ensemble"),
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


def _loaded(net, assign=False):
    other = network().eval()
    other.load_state_dict(net.state_dict(), assign=assign)
    return other


def _read_before(net):
    """Statistics that come after the first look are seen too."""
    other = network().eval()
    other.record(X, error=measures.error)
    other.train()(X)
    return other.eval()


@pytest.mark.parametrize("way", [copy.deepcopy, _copied, _loaded, partial(_loaded, assign=True), _read_before])
def test_statistics_that_came_another_way_are_known(way):
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        way(trained()).record(X, error=measures.error)


def test_statistics_are_known_in_inference_mode():
    net = trained()
    with torch.inference_mode(), pytest.raises(ValueError, match="no statistics of stage 4"):
        _loaded(net).ensemble(X)


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
        net = Network(nn.Identity(), Flow(plain, solver="bs23", depth=2, stage_fields="untied"), net.head)
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


def plain():
    """A field with torch's own batch norm."""
    return Velocity(lambda m, t, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 3, padding=1))


@pytest.mark.parametrize("field", [plain, lambda: ConvField(3, norm="batch")], ids=["torch's", "ours"])
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
