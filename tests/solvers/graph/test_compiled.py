"""What the compiler makes of loops: it has written over what they carry, keep and return."""

import shutil

import pytest
import torch
from torch import nn

from solvers import Fixed, Tolerance, integrate
from solvers.graph import compilation
from solvers.graph.compiler import compile_loops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]
D = torch.float64


@pytest.fixture(autouse=True)
def _compiled(_traced, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", compile_loops)
    compilation.forget()
    yield
    compilation.forget()


class Velocity(nn.Module):
    """Of a state and a time; a linear map to few numbers and one to many."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(2, 16, dtype=D), nn.Linear(16, 2, dtype=D)

    def forward(self, t, x):
        return self.last(torch.tanh(3 * self.first(x))) * (1 + t)


class Image(nn.Module):
    """A convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1, dtype=D)

    def forward(self, t, x):
        return torch.tanh(self.layer(x))


def check(field, x, at=None, t1=1.0, **options):
    found = []
    for graph in (True, False):
        start = x.clone().requires_grad_()
        times = None if at is None else torch.tensor(at, dtype=D, requires_grad="gradient" not in options)
        solution = integrate(field, start, 0.0, t1, at=times, graph=graph, keep="last", **options)
        loss = solution.x1.square().sum() + (0 if at is None else solution.states.sin().sum())
        wanted = [start, *field.parameters(), *(() if times is None or not times.requires_grad else (times,))]
        found.append((solution, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)))
    (ours, gradients), (theirs, others) = found
    assert ours.stats == theirs.stats
    torch.testing.assert_close(ours.states, theirs.states, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, others, rtol=1e-9, atol=1e-11)
    return ours


@pytest.mark.usefixtures("few_slots")
def test_times_between_steps_of_which_most_hold_none_and_steps_taken_anew():
    """A loop without a pass returned memory that was written over: gradients were wrong, states were not."""
    x = torch.randn(5, 2, dtype=D)
    ours = check(Velocity(), x, at=[0.0, 0.3, 0.31, 1.0], control="sample", tolerance=Tolerance(1e-6, 1e-7))
    assert ours.sample_stats.accepted.min() > 12


def test_the_adjoint_solved_backwards_from_time_to_time():
    check(Velocity(), torch.randn(5, 2, dtype=D), at=[0.0, 0.4, 1.0], gradient="backsolve")


def test_a_solve_without_a_step_and_one_with():
    for t1 in (0.0, 1.0):
        check(Velocity(), torch.randn(5, 2, dtype=D), t1=t1)


def test_states_laid_out_in_another_order():
    """Strides of gradients differed between what a loop takes and what it returns (pytorch 183017)."""
    field, x = Image(), torch.randn(2, 3, 5, 5, dtype=D)
    check(field.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    check(Image(), torch.randn(5, 2, 5, 3, dtype=D).permute(1, 3, 0, 2), at=[0.5, 1.0])


def test_two_solves_in_one_graph_of_the_caller():
    """Chained scans had wrong gradients (pytorch 153679)."""
    fields, found = (Velocity(), Velocity()), []

    def loss(x, graph):
        for field in fields:
            x = integrate(field, x, 0.0, 0.5, graph=graph).x1
        return x.square().sum()

    for solve in (torch.compile(lambda x: loss(x, True), fullgraph=True), lambda x: loss(x, False)):
        x = torch.linspace(-1, 1, 10, dtype=D).view(5, 2).requires_grad_()
        found.append(torch.autograd.grad(solve(x), [x, *fields[0].parameters(), *fields[1].parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_sums_that_a_loop_carries():
    """The compiler wrote over sums of gradients that a loop carries, in its own graph and in the caller's."""
    layer, x = nn.Linear(2, 2), torch.randn(8, 2, generator=torch.Generator().manual_seed(3))
    options = {"tolerance": Tolerance(first_step=0.25), "controller": Fixed(), "at": [0.3, 0.5, 1.0]}

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t, x):
            return self.layer(x)

    field = Field()

    def loss(x, graph):
        solution = integrate(field, x, 0.0, 1.0, graph=graph, **options)
        return solution.states[0].sum() + solution.x1.square().sum()

    wanted = torch.autograd.grad(loss(x, False), [*field.parameters()])
    ours = torch.autograd.grad(loss(x, True), [*field.parameters()])
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    callers = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, True), [*field.parameters()])
    torch.testing.assert_close(callers, wanted, rtol=1e-5, atol=1e-6)
