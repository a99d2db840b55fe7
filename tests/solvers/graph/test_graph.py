"""A solve in a graph against the loops on the host: states, steps, counts, gradients, errors."""

import re

import pytest
import torch
from torch import nn

from solvers import (
    PI,
    HalveDouble,
    MaxStepsError,
    NonFiniteError,
    StepUnderflowError,
    Tolerance,
    get_tableau,
    integrate,
    odeint,
)
from solvers.controllers import ControllerState, SampleStates
from solvers.graph import compilation

TIGHT = Tolerance(rtol=1e-6, atol=1e-7)
AT = [0.0, 0.1, 0.15, 0.151, 0.7, 1.0]


class Velocity(nn.Module):
    """A field of time, state and an argument, that counts its calls outside of graphs."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(2, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)

    def forward(self, t, x, c):
        return self.last(torch.tanh(self.first(x))) * (1 + t) + c


def problem(**requires):
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return Velocity(), x.requires_grad_(requires.get("x", False)), c.requires_grad_(requires.get("c", True))


def solved(graph, field, x, c, at=None, t0=0.0, t1=1.0, **options):
    """The solution, and the gradients of a loss of it of whatever requires one."""
    solution = integrate(field, x, t0, t1, args=(c,), at=at, graph=graph, **options)
    weights = torch.linspace(1, 2, 6, dtype=torch.float64)[:, None]
    loss = (weights * solution.x1.square()).sum()
    if at is not None:
        loss = loss + (solution.states.sin() * torch.arange(1, 7)[:, None, None]).sum()
    wanted = [p for p in (*field.parameters(), c, x, at) if isinstance(p, torch.Tensor) and p.requires_grad]
    return solution, torch.autograd.grad(loss, wanted) if wanted else ()


def check(at=None, requires=(), frozen=False, rtol=1e-10, **options):
    field, x, c = problem(**dict.fromkeys(requires, True))
    if "c" not in requires:
        c.requires_grad_(False)
    field.requires_grad_(not frozen)
    ours, gradients = solved(True, field, x, c, at, **options)
    theirs, others = solved(False, field, x, c, at, **options)
    torch.testing.assert_close(ours.x1, theirs.x1, rtol=rtol / 100, atol=1e-12)
    if at is not None:
        torch.testing.assert_close(ours.states, theirs.states, rtol=rtol / 100, atol=1e-12)
    assert (ours.stats.accepted, ours.stats.rejected) == (theirs.stats.accepted, theirs.stats.rejected)
    assert ours.status == theirs.status
    if get_tableau(options.get("solver", "bs23")).fsal:
        assert ours.stats == theirs.stats
        if options.get("control") == "sample":
            assert torch.equal(ours.sample_stats.evaluations, theirs.sample_stats.evaluations)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=1e-12)
    return ours


def test_states_steps_and_gradients_are_those_of_the_loop():
    check(requires=("c",), solver="bs23")


@pytest.mark.slow
def test_gradients_of_inputs_alone_and_of_weights_alone_with_one_graph_each():
    check(requires=("x",), frozen=True, solver="heun")
    check(solver="heun", t0=1.0, t1=-0.5)  # backward in time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("bs23", {"controller": PI(), "tolerance": TIGHT, "control": "sample"}),
        ("dopri5", {"t1": -0.7, "rtol": 1e-4}),  # sizes follow the rounding of a tiny error
        ("tsit5", {"tolerance": Tolerance(rtol=1e-5, first_step=1.0), "control": "sample"}),
        ("dopri8", {"tolerance": Tolerance(rtol=1e-8)}),
        ("midpoint", {"controller": HalveDouble(), "tolerance": Tolerance(first_step=0.1)}),
        ("fehlberg2", {"tolerance": Tolerance(max_step=0.1, min_step=0.01), "control": "sample"}),
    ],
)
def test_methods_and_controllers(solver, options):
    check(requires=("x", "c"), solver=solver, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "times", "control"),
    [("bs23", True, "batch"), ("bs23", True, "sample"), ("tsit5", False, "batch"), ("dopri5", False, "sample")],
)
def test_output_times_and_their_gradients(solver, times, control):
    at = torch.tensor(AT, dtype=torch.float64, requires_grad=times)
    check(at=at, requires=("x", "c"), solver=solver, control=control)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "control"), [("bs23", "batch"), ("heun", "sample")])
@pytest.mark.usefixtures("few_slots")
def test_steps_beyond_the_room_for_states_are_taken_anew(solver, control):
    solution = check(requires=("x",), solver=solver, control=control, tolerance=TIGHT)
    assert solution.stats.accepted > 25
    if solver == "bs23":
        check(
            at=torch.tensor(AT, dtype=torch.float64), requires=("x",), solver=solver, control=control, tolerance=TIGHT
        )


def square(t, x):
    return x * x


def decay(t, x):
    return torch.where(torch.as_tensor(t, dtype=x.dtype) > 0.5, torch.nan, -x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "t1", "tolerance", "error"),
    [
        (square, 2.0, Tolerance(), StepUnderflowError),
        (square, 0.9, Tolerance(max_steps=3), MaxStepsError),
        (decay, 1.0, Tolerance(), NonFiniteError),
    ],
)
def test_what_cannot_go_on_raises_as_on_the_host(field, t1, tolerance, error):
    x = torch.ones(3, 1, dtype=torch.float64)
    raised = []
    for graph in (True, False):
        with torch.no_grad(), pytest.raises(error) as info:
            integrate(field, x, 0.0, t1, tolerance=tolerance, graph=graph)
        raised.append(info.value)
    ours, theirs = raised
    assert re.sub(r"[\d.e+-]+", "#", str(ours)) == re.sub(r"[\d.e+-]+", "#", str(theirs))
    assert (ours.t, ours.stage, ours.sample) == (pytest.approx(theirs.t, rel=1e-6), theirs.stage, theirs.sample)
    assert ours.solution.stats == theirs.solution.stats
    torch.testing.assert_close(ours.solution.x1, theirs.solution.x1, rtol=1e-2, atol=0.0)  # near a pole
    with torch.no_grad():
        solution = integrate(field, x, 0.0, t1, tolerance=tolerance, graph=True, on_limit="return")
    assert solution.status == theirs.status


@pytest.mark.slow
def test_a_sample_that_fails_alone():
    x = torch.tensor([[1.0], [0.1], [3.0]], dtype=torch.float64)
    statuses = []
    for graph in (True, False):
        with torch.no_grad():
            solution = integrate(square, x, 0.0, 0.5, control="sample", graph=graph, on_limit="return")
        statuses.append((solution.status, solution.x1[:2]))
    assert statuses[0][0] == statuses[1][0] == ("finished", "finished", "underflow")
    torch.testing.assert_close(statuses[0][1], statuses[1][1])


def keep(state, error, order):
    return state._replace(accepted=True)


class OfArrays:
    """A rule that takes arrays alone."""

    def __call__(self, state: ControllerState, error: float, order: int) -> ControllerState:
        return state

    def each(self, states: SampleStates, error, order: int) -> SampleStates:
        return states._replace(h=states.h.astype("float64"))


class Drops(nn.Module):
    def forward(self, t, x):
        return nn.functional.dropout(x, 0.5, training=True)


X = torch.ones(3, 2)
FREE = torch.ones(2, requires_grad=True)
TRAINING = nn.Sequential(nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 3}, ValueError, "graph=True holds the loop that chooses steps"),
        ({"event": lambda t, x: x}, ValueError, "graph=True finds no event"),
        ({"keep": "steps"}, ValueError, "graph=True keeps no steps"),
        ({"gradient": "checkpoint"}, ValueError, "leave out gradient='checkpoint'"),
        ({"solver": "heun", "at": [0.5]}, ValueError, "heun has none"),
        ({"controller": keep}, TypeError, r"a method each\(\) with graph=True, got function"),
        ({"controller": OfArrays()}, TypeError, "controller.each must take tensors with graph=True"),
        ({"graph": "yes"}, ValueError, "graph must be True, False or 'auto', got 'yes'"),
        ({"parameters": [FREE]}, ValueError, r"leave them out, or pass \(\)"),
        ({"field": lambda t, x: x * FREE}, ValueError, "reads a tensor that requires a gradient"),
        ({"field": Drops()}, ValueError, "draws random numbers"),
        ({"field": lambda t, x: nn.functional.dropout(x)}, ValueError, "draws random numbers"),
        ({"x0": X + 0j}, ValueError, "takes real states, got torch.complex64"),
    ],
)
def test_what_no_graph_takes(options, error, message):
    options = {"graph": True, "field": lambda t, x: -x, "x0": X} | options
    with pytest.raises(error, match=message):
        integrate(options.pop("field"), options.pop("x0"), 0.0, 1.0, **options)


@pytest.mark.parametrize(
    ("layer", "message"), [(nn.BatchNorm1d(2), "batch norm in training mode"), (nn.Dropout(), "a dropout in training")]
)
def test_layers_that_differ_from_call_to_call(layer, message):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t, x):
            return self.layer(x)

    with pytest.raises(ValueError, match=message):
        integrate(Field(), X, 0.0, 1.0, graph=True)


def test_autocast_is_refused():
    with torch.autocast("cpu"), pytest.raises(ValueError, match="call it outside of autocast"):
        integrate(lambda t, x: -x, X, 0.0, 1.0, graph=True)


@pytest.mark.slow
def test_in_a_graph_of_the_caller():
    field, x, c = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x, c):
        solution = integrate(field, x, 0.0, 1.0, args=(c,), graph=True)
        return solution.x1.square().sum(), solution.status, solution.stats.accepted

    value, status, accepted = loss(x, c)
    reference = integrate(field, x, 0.0, 1.0, args=(c,))
    assert (status.item(), accepted.item()) == (0, reference.stats.accepted)
    ours = torch.autograd.grad(value, [*field.parameters(), c])
    theirs = torch.autograd.grad(reference.x1.square().sum(), [*field.parameters(), c])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_function_in_a_graph_of_the_caller_must_say_that_it_has_no_parameters():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def last(x, parameters):
        return integrate(lambda t, x: -x, x, 0.0, 1.0, graph=True, parameters=parameters).x1

    with pytest.raises(Exception, match=r"field must be a module with graph=True in a graph"):
        last(X, None)
    torch.testing.assert_close(last(X, ()), integrate(lambda t, x: -x, X, 0.0, 1.0).x1)


@pytest.mark.slow
def test_one_graph_serves_every_batch_size_and_time():
    compilation.forget()
    torch._dynamo.utils.counters.clear()
    field, _, _ = problem()
    for batch, t1 in ((6, 1.0), (9, 1.0), (13, 2.0), (40, -1.0)):
        x = torch.randn(batch, 2, dtype=torch.float64)
        with torch.no_grad():
            ours = integrate(field, x, 0.0, t1, args=(x,), graph=True)
            theirs = integrate(field, x, 0.0, t1, args=(x,))
        torch.testing.assert_close(ours.x1, theirs.x1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of the first size, and of any


@pytest.mark.slow
@pytest.mark.parametrize(("method", "moving"), [("bosh3", True), ("dopri5", False)])
def test_odeint(method, moving):
    """The times' gradient reaches the start too, and the field's own time."""
    generator = torch.Generator().manual_seed(2)
    y0 = tuple(torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64, requires_grad=moving)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, t, y):
            return -self.rate * y[0] * t, y[0].sin() - y[1]

    func, found = Pair(), []
    for options in ({"graph": True}, {}):
        y = odeint(func, y0, t, rtol=1e-5, atol=1e-7, method=method, options=options)
        wanted = [func.rate, *y0, *([t] if moving else [])]
        found.append((*y, *torch.autograd.grad(y[0].square().sum() + y[1].sin().sum(), wanted)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"step_t": [0.5]}, "graph excludes step_t"), ({"dtype": torch.float32}, "graph excludes dtype")],
)
def test_options_that_a_graph_excludes(options, message):
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: -y, X, torch.tensor([0.0, 1.0]), options={"graph": True, **options})
