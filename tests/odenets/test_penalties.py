"""Penalties of steps: their value and gradient against formulas and differences, and the evaluations that they cost."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField, Network, NeuralODE, measures
from odenets.least_action import ActionPenalty, LeastAction
from odenets.models import points_network
from odenets.penalties import ErrorPenalty, Penalty
from odenets.training import Batches, CrossEntropy, Task, TensorData, fit
from solvers import Tolerance, rk_step

H = 0.5
ZERO = Task(lambda output, y: 0.0 * output.sum())


class Linear(nn.Module):
    """``v = x A^T`` in float64."""

    def __init__(self, features=3):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(features, features, dtype=torch.float64) / 2)

    def forward(self, t, x):
        return x @ self.matrix.T


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


def gradient(value, *parameters):
    return torch.autograd.grad(value, parameters)


def heun_error(A, x, h):
    """``h/2 (p_2 - p_1)`` is ``h^2/2 A^2 x`` where ``p_2 = A (x + h p_1)``; the step is of order 2."""
    return h**2 / 2 * x @ A.T @ A.T, x + h * x @ A.T + h**2 / 2 * x @ A.T @ A.T


def rms(e):
    return e.square().mean(1).sqrt()


FLOWS = {
    "a neural ODE": lambda field: NeuralODE(field, solver="heun", steps=3, t1=3 * H),
    "a neural ODE backwards": lambda field: NeuralODE(field, solver="heun", steps=3, t0=3 * H, t1=0.0),
    "a flow of one block": lambda field: Flow(field, solver="heun", depth=3, h=H, shared=True),
}


@pytest.mark.parametrize(("kind", "of"), [("error", lambda e: H * rms(e)), ("square", lambda e: e.square().mean(1))])
@pytest.mark.parametrize("kind_of_flow", FLOWS)
def test_value_and_gradient_of_a_linear_field_are_those_of_the_formula(x, kind, of, kind_of_flow):
    field = Linear()
    flow = FLOWS[kind_of_flow](field)
    h = -H if "backwards" in kind_of_flow else H
    value = ErrorPenalty(2.0, ZERO, kind=kind)(flow, x, x)
    state, expected = x, 0.0
    for _ in range(3):
        error, state = heun_error(field.matrix, state, h)
        expected = expected + 2 * of(error).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, *flow.parameters()), gradient(expected, field.matrix))


@pytest.mark.parametrize("kind", ["error", "square"])
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "heun"])
@pytest.mark.parametrize("options", [{"steps": 4}, {}, {"control": "sample"}], ids=["fixed", "batch", "sample"])
def test_the_gradient_is_that_of_differences_at_the_same_steps(x, kind, solver, options):
    """Steps of the same sizes, for what is differentiated is the sum at constant h."""
    torch.manual_seed(0)
    field = MLPField(3, hidden=8).double()
    ode = NeuralODE(field, solver=solver, tolerance=None if options.get("steps") else Tolerance(1e-2, 1e-2), **options)
    objective, weight = ErrorPenalty(1.0, ZERO, kind=kind), field.first.weight
    kept = ode.solution(x)
    (slope,) = gradient(objective(ode, x, x), weight)

    def total():
        state, value, samples = x.clone(), 0.0, getattr(kept, "samples", None)
        for k, taken in enumerate(kept.steps):
            rows = slice(None) if samples is None else samples[k]
            step = rk_step(field, taken.t, state[rows], taken.h, ode.tableau)
            sizes, errors = torch.as_tensor(step.h).abs().reshape(-1), rms(step.error())
            value += ((sizes * errors).sum() if kind == "error" else errors.square().sum()) / len(x)
            state[rows] = step.x1
        return value

    direction, eps = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight += eps * direction
        above = total()
        weight -= 2 * eps * direction
        below = total()
        weight += eps * direction
        torch.testing.assert_close(objective(ode, x, x), total())
    torch.testing.assert_close((slope * direction).sum(), (above - below) / (2 * eps), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "heun"])
def test_a_solve_that_controls_its_error_evaluates_nothing_for_it(x, solver, control):
    ode = NeuralODE(MLPField(3).double(), solver=solver, control=control)
    calls = []
    ode.field.register_forward_hook(lambda *_: calls.append(1))
    ode(x)
    plain = len(calls)
    ErrorPenalty(1.0, ZERO)(ode, x, x)
    assert len(calls) == 2 * plain


@pytest.mark.parametrize(
    ("flow", "further"),
    [
        (NeuralODE(MLPField(3), solver="heun", steps=4), 0),
        (NeuralODE(MLPField(3), solver="bs23", steps=4), 1),
        (Flow(MLPField(3), solver="heun", depth=4), 0),
        (Flow(MLPField(3), solver="bs23", depth=4), 4),
    ],
)
def test_fixed_steps_evaluate_the_closing_stage_of_an_fsal_method(flow, further):
    flow, calls, x = copy.deepcopy(flow), [], torch.randn(5, 3)
    for module in flow.modules():
        if isinstance(module, MLPField):
            module.register_forward_hook(lambda *_: calls.append(1))
    flow(x)
    plain = len(calls)
    ErrorPenalty(1.0, ZERO)(flow, x, x)
    assert len(calls) - plain == plain + further


def test_straight_lines_cost_nothing_and_have_a_gradient():
    ode = NeuralODE(MLPField(3), steps=3, solver="bs23")
    nn.init.zeros_(ode.field.second.weight)
    for kind in ("error", "square"):
        value = ErrorPenalty(1.0, ZERO, kind=kind)(ode, torch.randn(5, 3), torch.zeros(5, 3))
        assert value.abs() < 1e-7
        value.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in ode.parameters())


@pytest.fixture
def network():
    return points_network(depth=2, solver="bs23")


@pytest.fixture
def batch():
    return torch.rand(8, 2), torch.arange(8) % 2


def test_penalties_are_tasks_of_each_other(network, batch):
    output, records = network.record(batch[0], action=measures.action, error=measures.error)
    cost, error = records["action"].sum(0).mean(), records["error"].sum(0).mean()
    expected = F.cross_entropy(output, batch[1]) + 0.1 * cost + 0.3 * network.flows[0].h[0] * error
    for objective in (
        ErrorPenalty(0.3, ActionPenalty(0.1)),
        ActionPenalty(0.1, ErrorPenalty(0.3)),
        Penalty(0.1, measures.action, ErrorPenalty(0.3)),
        ErrorPenalty(0.3, Penalty(0.1, measures.action)),
    ):
        torch.testing.assert_close(objective(network, *batch), expected)
        torch.testing.assert_close(
            objective.validation_loss(network, batch, output, records), F.cross_entropy(output, batch[1])
        )


def test_multipliers_inside_of_it_count_the_steps(network, batch):
    objective = ErrorPenalty(0.1, LeastAction(lambda0=1.0, tau=0.5, every=2))
    part = TensorData(*batch)
    training = fit(network, Batches(part, 4), epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1), objective=objective)
    assert training.rows[-1]["lambda"] > 1
    assert objective.task.steps == 4


def test_what_it_trains_is_easier_to_solve():
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    y = (x.norm(dim=1) > 1.2).long()
    evaluations = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        ode = NeuralODE(MLPField(2), solver="bs23", t1=2.0, tolerance=Tolerance(1e-2, 1e-2))
        network = Network(nn.Identity(), ode, nn.Linear(2, 2))
        adam = partial(torch.optim.Adam, lr=0.02)
        fit(network, Batches(TensorData(x, y), 64), epochs=60, optimizer=adam, objective=ErrorPenalty(weight))
        tight = NeuralODE(ode.field, solver="bs23", t1=2.0, tolerance=Tolerance(1e-5, 1e-5))
        tight(x)
        evaluations.append(tight.evaluations)
    assert evaluations[1] < 0.8 * evaluations[0]


def test_batch_figures_are_the_parts(network, batch):
    objective = ErrorPenalty(0.5)
    value = objective(network, *batch)
    figures = objective.batch_figures()
    assert figures["batch_loss"] + 0.5 * figures["batch_cost"] == pytest.approx(value.item())


def test_it_is_copied_pickled_and_printed(network, batch):
    objective = ErrorPenalty(0.5, ActionPenalty(0.1), kind="square")
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(other(network, *batch), objective(network, *batch))
    assert "ErrorPenalty(\n  weight=0.5, measure='square_error_penalty'" in repr(objective)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda: Flow(MLPField(2), solver="euler"), "euler carries no embedded error: take bs23"),
        (lambda: NeuralODE(MLPField(2), solver="rk4", steps=4), "rk4 carries no embedded error: take bs23"),
        (lambda: NeuralODE(MLPField(2), gradient="checkpoint"), "take gradient='direct'"),
        (lambda: NeuralODE(MLPField(2), gradient="backsolve"), "take gradient='direct'"),
        (lambda: NeuralODE(MLPField(2), event=lambda t, x: x[:, 0] - 9), "take gradient='direct'"),
    ],
)
def test_a_network_without_embedded_errors_is_refused(flow, message):
    with pytest.raises(ValueError, match=message):
        ErrorPenalty(1.0)(flow(), torch.randn(4, 2), torch.arange(4) % 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ErrorPenalty(-1.0), ValueError, "weight must be finite and not negative, got -1.0"),
        (lambda: ErrorPenalty(float("nan")), ValueError, "weight must be finite"),
        (lambda: ErrorPenalty(True), TypeError, r"weight must be a number, and comes first, ErrorPenalty\(0.1, "),
        (lambda: ErrorPenalty(ActionPenalty(1.0)), TypeError, "weight must be a number, and comes first"),
        (lambda: ErrorPenalty(1.0, F.mse_loss), TypeError, r"task must be an objective.*Task\(mse_loss\) is one"),
        (lambda: ErrorPenalty(1.0, kind="cube"), ValueError, "kind must be 'error' or 'square', got 'cube'"),
        (lambda: ErrorPenalty(1.0, p=2), TypeError, "ErrorPenalty takes no 'p': that is kind"),
        (
            lambda: Penalty(1.0, CrossEntropy()),
            TypeError,
            r"measure must be a function Step -> \(B,\).*got CrossEntropy",
        ),
        (
            lambda: Penalty(1.0, measures.error, Penalty(1.0, measures.action, name="error")),
            ValueError,
            "task must not record another measure as 'error'",
        ),
    ],
)
def test_what_it_cannot_weigh_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weight_of_several_numbers_is_refused():
    with pytest.raises(TypeError, match=r"weight must be a number, .* got one tensor \(2,\)"):
        ErrorPenalty(torch.tensor([0.1, 0.2]))


def test_an_error_names_what_the_user_has_written():
    flow = NeuralODE(MLPField(2), solver="bs23", gradient="backsolve")
    network, x, y = Network(nn.Identity(), flow, nn.Linear(2, 2)), torch.randn(4, 2), torch.arange(4) % 2
    with pytest.raises(ValueError, match="measure 'error_penalty' is no integral over time"):
        ErrorPenalty(1.0)(network, x, y)
    with pytest.raises(TypeError, match="task must be an objective, got 'square': text comes by keyword, the kind of"):
        ErrorPenalty(1.0, "square")


def test_the_parts_of_the_last_batch_are_told():
    network, objective, x, y = points_network(depth=2), ErrorPenalty(0.5), torch.randn(4, 2), torch.arange(4) % 2
    loss, figures = objective(network, x, y), objective.batch_figures()
    assert loss.item() == pytest.approx(figures["batch_loss"] + 0.5 * figures["batch_cost"])
    assert figures["batch_loss"] == pytest.approx(F.cross_entropy(network(x), y).item())
