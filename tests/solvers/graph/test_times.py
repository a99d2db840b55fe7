"""Times of solves in graphs: their digits, shapes and gradients."""

import pytest
import torch
from torch import nn

from solvers import Tolerance, integrate

D = torch.float64
X = torch.tensor([[0.3, -0.2], [0.5, 0.4], [-0.9, 1.3]], dtype=D)
LATER = torch.tensor([0.2, 0.21, 0.5, 1.0], dtype=D)


def pulled(t, x, rate):
    return torch.sin(3 * x) * rate - t * x


@pytest.mark.slow
@pytest.mark.usefixtures("few_slots")
def test_gradients_of_output_times_alone():
    """Also where there is no room for the states of all steps, of which some are taken anew."""
    found = []
    for graph in (True, False):
        at, rate = LATER.clone().requires_grad_(), torch.tensor(2.0, dtype=D)
        solution = integrate(pulled, X, 0.0, 1.0, args=(rate,), at=at, graph=graph, tolerance=Tolerance(1e-5, 1e-7))
        found.append((solution, *torch.autograd.grad(solution.states.square().sum(), at)))
    (ours, gradient), (theirs, other) = found
    assert ours.stats == theirs.stats
    assert ours.stats.accepted > 25
    torch.testing.assert_close(ours.states, theirs.states, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_function_has_gradients_of_its_arguments():
    found = []
    for graph in (True, False):
        x, rate = X.clone().requires_grad_(), torch.tensor(2.0, dtype=D, requires_grad=True)
        x1 = integrate(pulled, x, 0.0, 1.0, args=(rate,), graph=graph).x1
        found.append((x1, *torch.autograd.grad(x1.square().sum(), [x, rate])))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_times_keep_their_digits():
    """0.1 and 0.7 are no numbers of float32."""
    with torch.no_grad():
        ours, theirs = (integrate(pulled, X, 0.1, 0.7, args=(2.0,), graph=graph) for graph in (True, False))
    assert ours.t1 == theirs.t1 == 0.7
    torch.testing.assert_close(ours.x1, theirs.x1, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_times_of_each_sample_give_states_of_each_sample():
    at = torch.tensor([[0.2, 0.5], [0.5, 0.5], [0.1, 1.0]], dtype=D)
    with torch.no_grad():
        ours, theirs = (
            integrate(pulled, X, 0.0, 1.0, args=(2.0,), at=at, graph=graph, control="sample") for graph in (True, False)
        )
    torch.testing.assert_close(ours.states, theirs.states, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.times, theirs.times)


class Pulled(nn.Module):
    def forward(self, t, x):
        return pulled(t, x, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_times_in_a_graph_of_the_caller(control):
    """The second number is an input of the graph; those of samples are arrays."""
    field = Pulled()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def last(x, t1):
        return integrate(field, x, 0.0, t1, graph=True, control=control).x1

    for t1 in (0.5, 0.25, 1.5):
        reference = integrate(field, X, 0.0, t1, control=control).x1
        torch.testing.assert_close(last(X, t1), reference, rtol=1e-12, atol=1e-12)
