"""The layer itself: statistics of each stage, in states, inference mode, compiled and under vmap."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from odenets import ConvField, Flow, measures, recalibrate
from tests.odenets.normalization.networks import X, network, trained

IMAGES = torch.randn(4, 8, 6, 6)


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


def test_states_from_before_recalibrations_were_counted_are_taken():
    net, other = trained(), network()
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("recalibrated")}
    recalibrate(other, [X])
    assert not any(other.load_state_dict(state))
    assert torch.equal(other.eval()(X), net(X))
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        other.record(X, error=measures.error)


@pytest.mark.slow
@torch.no_grad()
def test_statistics_are_known_to_a_compiled_flow():
    flow = network().flows[0].part(0, 1).train()
    run = torch.compile(lambda x, readout: flow(x, readout=readout), backend="eager")
    run(X, "solution")
    assert flow.blocks[0].fields[0].norm1._known == [2, 2, 2, 0]
    flow.eval()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        run(X, "ensemble")
    recalibrate(flow, [X])
    torch.testing.assert_close(run(X, "ensemble"), flow(X, readout="ensemble"))
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
        return functional_call(one, (p, b), (X,), {"readout": readout})

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


def test_a_state_of_another_method_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"norm1: the state holds batch norm statistics of 4 stage\(s\).*has 1"):
        network("euler").load_state_dict(trained("bs23").state_dict())
