"""What changes between solves, and between a solve and its gradient, is seen or refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from solvers import NonFiniteError, Tolerance, integrate
from solvers.controllers import I
from solvers.graph import compilation

D = torch.float64
X = torch.tensor([[0.3, -0.2], [0.5, 0.4], [-0.9, 1.3]], dtype=D)


@pytest.fixture(autouse=True)
def _anew():
    compilation.forget()


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2, dtype=D)
        self.register_buffer("scale", torch.ones(2, dtype=D))

    def forward(self, t, x):
        return torch.tanh(self.layer(x)) * self.scale


def last(field, x=X, graph=True, **options):
    return integrate(field, x, 0.0, 1.0, graph=graph, keep="last", **options).x1


def agree(field, wanted, x=X, **options):
    found = []
    for graph in (True, False):
        x1 = last(field, x, graph, **options)
        found.append((x1.detach(), *torch.autograd.grad(x1.square().sum().real, wanted)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("what", ["bias", pytest.param("buffer", marks=pytest.mark.slow)])
def test_what_is_written_over_before_the_gradient_is_refused(what):
    field, x = Velocity(), X.clone().requires_grad_()
    field.layer.bias.requires_grad_(False)
    x1 = last(field, x)
    (field.layer.bias if what == "bias" else field.scale).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x1.sum().backward()


@pytest.mark.slow
def test_a_last_state_that_is_changed_has_its_gradient():
    field, found = Velocity(), []
    for graph in (True, False):
        x1 = last(field, X.clone().requires_grad_(), graph)
        x1.mul_(2)
        found.append(torch.autograd.grad(x1.square().sum(), field.layer.weight))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_hooks_that_come_later_are_called():
    field = Velocity()
    with torch.no_grad():
        plain = last(field)
        handle = field.layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        torch.testing.assert_close(last(field), last(field, graph=False))
        handle.remove()
        torch.testing.assert_close(last(field), plain)


class Random(Velocity):
    def forward(self, t, x):
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


class Held:
    def __init__(self, weight):
        self.weight = weight


@pytest.mark.slow
def test_what_becomes_random_or_trainable_is_looked_at_again():
    field, x = Random().eval(), X.clone().requires_grad_()
    last(field, x)
    field.train()
    with pytest.raises(ValueError, match="draws random numbers"):
        last(field, x)
    weight = torch.ones(2, dtype=D)
    read = lambda t, x, held: -x * held.weight  # noqa: E731
    last(read, x, args=(Held(weight),))
    with pytest.raises(ValueError, match=r"reads a tensor that requires a gradient"):
        last(read, x, args=(Held(weight.clone().requires_grad_()),))


class Counted(Velocity):
    count = 0

    def forward(self, t, x):
        self.count += 1
        return self.layer(x)


def test_numbers_that_a_call_changes_are_refused():
    field = Counted()
    field.count = 0
    with pytest.raises(ValueError, match="changes its number 'count'"):
        last(field)


@pytest.mark.slow
def test_arguments_that_are_complex_or_come_twice():
    z = torch.tensor(0.3 + 0.2j, dtype=torch.complex128, requires_grad=True)
    agree(lambda t, x, z: -(x * z * z).real, [z], args=(z,))
    weight, x = torch.tensor([[0.3, 0.1], [0.2, -0.4]], dtype=D, requires_grad=True), X.clone().requires_grad_()
    agree(lambda t, x, a, b: x @ a - x @ b, [weight], args=(weight, weight.t()))
    agree(lambda t, x, x0: x0 - x, [x], x, args=(x,))


@dataclass
class Unhashable:
    """A rule whose numbers may change."""

    rule: I

    def __call__(self, state, error, order):
        return self.rule(state, error, order)

    def each(self, states, error, order):
        return self.rule.each(states, error, order)


@pytest.mark.slow
def test_rules_of_one_class_that_differ():
    field = Velocity()
    for safety in (0.9, 0.5):
        rule = Unhashable(I(safety=safety))
        with torch.no_grad():
            ours, theirs = (
                integrate(field, X, 0.0, 1.0, graph=graph, controller=rule, tolerance=Tolerance(1e-6, 1e-8))
                for graph in (True, False)
            )
        assert ours.stats == theirs.stats


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [Tolerance(1e-6, 0.0), Tolerance(torch.tensor([1e-6, 1e-5], dtype=D), 1e-8)])
def test_tolerances_of_the_adjoint(tolerance):
    field = Velocity()
    agree(field, [field.layer.weight], gradient="backsolve", tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, [0.01, 0.5, 1.0]])
def test_the_adjoint_begins_where_the_solve_ended(at):
    found = []
    for graph in (True, False):
        rate = torch.tensor(10.0, dtype=D, requires_grad=True)
        solution = integrate(
            lambda t, x, rate: rate * x, X, 0.0, 1.0, args=(rate,), at=at, keep="last", on_limit="return", graph=graph,
            tolerance=Tolerance(1e-6, 1e-2, max_steps=15), gradient="backsolve",
            **({} if graph else {"parameters": ()}),
        )  # fmt: skip
        assert solution.status == "max_steps"
        loss = solution.x1.sum() if at is None else solution.states[0].sum()
        found.append(torch.autograd.grad(1e-9 * loss, rate))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-15)


class Attribute(nn.Module):
    """A tensor that is no parameter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(2, dtype=D, requires_grad=True)

    def forward(self, t, x):
        return -x * self.weight


@pytest.mark.slow
def test_in_a_graph_of_the_caller_reads_are_refused_and_what_is_not_reached_is_nan():
    field, stiff = Attribute(), lambda t, x: -1000 * x
    with pytest.raises(Exception, match=r"reads a tensor that requires a gradient|Observed exception"):
        torch.compile(lambda x: last(field, x), fullgraph=True, backend="aot_eager")(X)
    with torch.no_grad():
        x1 = torch.compile(
            lambda x: last(stiff, x, tolerance=Tolerance(max_steps=5)), fullgraph=True, backend="aot_eager"
        )(X)
    assert x1.isnan().all()


def test_a_state_that_is_not_finite_behind_an_accepted_step():
    """Smallest steps are accepted whatever their error, and the next one has no first stage."""

    def field(t, x):
        return torch.where(x > 1, torch.nan, torch.ones_like(x))

    for graph in (True, False):
        with pytest.raises(NonFiniteError, match=r"the field is not finite at an accepted state|no smaller step"):
            last(field, graph=graph, tolerance=Tolerance(first_step=0.25, min_step=0.25))
