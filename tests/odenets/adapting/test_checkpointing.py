"""Measures within activation checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from odenets import Flow, MLPField, NeuralODE, measures
from odenets.adapting.checkpointing import measured_once, outside_checkpoints
from odenets.measures import measure
from odenets.observing import observing
from solvers import Tolerance

FLOWS = {
    "euler": lambda: Flow(lambda: MLPField(3), solver="euler", depth=2),
    "bs23": lambda: Flow(lambda: MLPField(3), solver="bs23", depth=2),
    "shared": lambda: Flow(MLPField(3), solver="bs23", depth=2, shared=True),
    "fixed": lambda: NeuralODE(MLPField(3), solver="rk4", steps=2),
    "adaptive": lambda: NeuralODE(MLPField(3), tolerance=Tolerance(rtol=1e-3)),
}


class Watch:
    def __init__(self, **measures):
        self.measures, self.records = measures, {}

    def measures_of(self, recorder):
        return {name: measured_once(name, one) for name, one in self.measures.items()}

    def receive(self, recorder, output, records):
        self.records = records


@measure(closing=False)
def farthest(step):
    return (step.x1 - step.x0).square().sum(1)


def gradients(loss, flow, x):
    return torch.autograd.grad(loss, [x, *flow.parameters()])


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_records_in_a_checkpoint_are_those_outside_of_it(name):
    flow, x = FLOWS[name](), torch.randn(4, 3, requires_grad=True)
    chosen = {"action": measures.action, "twice": 2 * measures.action, "farthest": farthest}
    output, records = flow.record(x, **chosen)
    expected = gradients(output.sin().sum() + sum(map(torch.sum, records.values())), flow, x)
    watch = Watch(**chosen)
    with observing(watch):
        observed = checkpoint(lambda x: flow(x).sin(), x, use_reentrant=False)
    assert observed.equal(output.sin())
    actual = gradients(observed.sum() + sum(map(torch.sum, watch.records.values())), flow, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_measure_that_may_read_the_closing_stage_is_refused_in_a_checkpoint():
    flow, x = FLOWS["bs23"](), torch.randn(4, 3, requires_grad=True)
    with observing(Watch(error=measures.error)), pytest.raises(ValueError, match=r"'error' may read .*closing=False"):
        checkpoint(flow, x, use_reentrant=False)
    with observing(Watch(error=measures.error)), torch.no_grad():
        flow(x)


def test_a_neural_ode_that_keeps_no_steps_is_refused_in_a_checkpoint():
    ode, x = NeuralODE(MLPField(3), steps=2, gradient="checkpoint"), torch.randn(4, 3, requires_grad=True)
    with observing(Watch(action=measures.action)):
        with pytest.raises(ValueError, match=r"'action' is integrated beside .* gradient='checkpoint' of its own"):
            checkpoint(ode, x, use_reentrant=False)
        ode(x)


def test_a_measure_elsewhere_is_itself():
    assert measured_once("action", measures.action) is measures.action


def test_a_state_that_is_changed_in_place_is_refused_where_a_measure_needs_it():
    x = torch.randn(4, 3, requires_grad=True)

    def block(x):
        y = x.sin()
        with outside_checkpoints():
            values.append(y.square().sum())
        return y * 1, y.mul_(2)

    values = []
    checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="has been changed in place: give the layers after it inplace=False"):
        values[0].backward()
