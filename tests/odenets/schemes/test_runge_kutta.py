"""RKCNN: with the weights of a method its blocks are that method's, and their coefficients train."""

import pytest
import torch

import odenets
from odenets.schemes import LearnedRungeKutta
from tests.odenets.schemes.fields import flow_of


@pytest.mark.parametrize("start", ["bs23", "rk4"])
def test_it_begins_as_the_method(start):
    flow, x = flow_of(LearnedRungeKutta(start))
    plain = odenets.Flow.of([odenets.Block([b.fields[0]], b.h) for b in flow.blocks], solver=start)
    torch.testing.assert_close(flow(x), plain(x), rtol=1e-6, atol=1e-6)  # coefficients in the fields' precision
    assert flow.evaluations == 4 * flow.tableau.stages


def test_each_block_learns_coefficients_of_its_own():
    flow, x = flow_of("rkcnn", depth=2)
    flow(x).square().sum().backward()
    gradients = [block.fields[1].change_a.grad for block in flow.blocks]
    assert not torch.equal(*gradients)
    with torch.no_grad():
        flow.blocks[0].fields[1].change_a.add_(0.1)
    steps = list(flow.steps(x))
    assert not torch.equal(steps[0].tableau.b, steps[1].tableau.b)
    torch.testing.assert_close(sum(steps[0].tableau.b), torch.tensor(1.0, dtype=torch.float64))


def test_a_start_that_is_no_explicit_method_is_refused():
    with pytest.raises(ValueError, match="must be an explicit method"):
        LearnedRungeKutta("implicit_euler")
