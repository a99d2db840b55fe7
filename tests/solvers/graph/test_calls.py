"""How often a graph calls the field as it runs, counted by an operator inside."""

import pytest
import torch
from torch import nn

from solvers import Tolerance, get_tableau, integrate

D = torch.float64
calls = 0


@torch.library.custom_op("odenets_tests::count", mutates_args=())
def count(t: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    return torch.ones_like(t)


count.register_fake(torch.empty_like)


class Counted(nn.Module):
    """A field whose calls are counted through its time, which no gradient passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2, dtype=D)

    def forward(self, t, x):
        return torch.tanh(self.layer(x)) * (1 + t) * count(torch.as_tensor(t))


def counted(function):
    global calls
    calls = 0
    result = function()
    return result, calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("bs23", {"tolerance": Tolerance(rtol=1e-4)}),
        ("bs23", {"at": [0.1, 0.5], "control": "sample"}),
        ("heun", {}),
    ],
)
def test_calls_are_those_counted_and_those_of_a_gradient_at_most_the_stages(solver, options):
    """Anew for another batch, so that the calls of the compiler are left out."""
    field, x = Counted(), torch.randn(4, 2, dtype=D)
    options = {"solver": solver, "graph": True, **options}
    integrate(field, x.clone().requires_grad_(), 0.0, 1.0, **options).x1.sum().backward()
    start = x.clone().requires_grad_()
    solution, made = counted(lambda: integrate(field, start, 0.0, 1.0, **options))
    assert made == solution.stats.evaluations
    _, pulled = counted(lambda: solution.x1.sum().backward())
    steps = solution.stats.accepted
    if "control" in options:  # rows of steps: those of one sample at least
        steps = solution.stats.evaluations // 3
    assert 0 < pulled <= get_tableau(solver).stages * steps
    with torch.no_grad():
        reference, made = counted(lambda: integrate(field, x, 0.0, 1.0, **options | {"graph": False}))
    assert made == reference.stats.evaluations
    if get_tableau(solver).fsal:
        assert reference.stats == solution.stats


@pytest.mark.slow
def test_a_solution_is_differentiated_once_more_if_it_is_kept_and_never_twice_over():
    field, x = Counted(), torch.randn(4, 2, dtype=D, requires_grad=True)
    x1 = integrate(field, x, 0.0, 1.0, graph=True).x1
    x2 = integrate(field, x, 0.0, 1.0).x1
    for i in range(2):  # of one solve, other losses
        (ours,), (theirs,) = (torch.autograd.grad(y[:, i].sum(), x, retain_graph=True) for y in (x1, x2))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    x1.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        x1.sum().backward()
    x1 = integrate(field, x, 0.0, 1.0, graph=True).x1
    (gradient,) = torch.autograd.grad(x1.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()
