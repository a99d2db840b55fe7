"""NeuralODE agrees with torchdiffeq, SciPy and closed forms, in every gradient and control mode."""

import math
import pickle

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp
from torch import nn

import odenets
from odenets import Flow, MLPField, Network, NeuralODE, measures
from odenets.least_action import LeastAction
from solvers import PI, SolverError, Tolerance
from tests.odenets.networks import Velocity
from tests.odenets.neural_ode.fields import Bound, Conditioned

TIGHT = Tolerance(1e-9, 1e-9)
GRADIENTS = ("direct", "checkpoint", "backsolve")


def test_it_agrees_with_torchdiffeq_and_scipy(x, field):
    ode = NeuralODE(field, tolerance=TIGHT)
    theirs = torchdiffeq.odeint(field, x, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=1e-9, atol=1e-9)[-1]
    torch.testing.assert_close(ode(x), theirs, rtol=1e-7, atol=1e-7)

    def v(t, flat):
        with torch.no_grad():
            return field(t, torch.from_numpy(flat).view(5, 3)).flatten().numpy()

    exact = solve_ivp(v, (0, 1), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
    np.testing.assert_allclose(ode(x).detach().flatten(), exact, atol=1e-7)
    assert ode.evaluations == ode.statistics.evaluations > 12


@pytest.mark.parametrize("solver", ["euler", "rk4", "bs23"])
def test_fixed_steps_are_a_shared_flow(x, field, solver):
    flow = Flow(field, solver=solver, depth=4, shared=True, total_time=2.0)
    ode = NeuralODE(flow.blocks[0].fields[0], solver=solver, steps=4, t1=2.0)
    named = {"action": measures.action, "residue": measures.residue}
    (end, records), (theirs, expected) = ode.record(x, **named), flow.record(x, **named)
    torch.testing.assert_close(end, theirs)
    for name in named:
        torch.testing.assert_close(records[name], expected[name])
    assert (ode.depth, ode.h) == (flow.depth, flow.h)
    assert [step.t for step in ode.steps(x)] == pytest.approx([step.t for step in flow.steps(x)])


@pytest.mark.parametrize("settings", [{"tolerance": TIGHT}, {"steps": 20, "solver": "rk4"}])
def test_gradients_of_state_and_action_are_equal_in_every_mode(x, settings):
    c = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    field = Conditioned().double()
    results = []
    for gradient in GRADIENTS:
        ode = NeuralODE(field, gradient=gradient, **settings)
        end, records = ode.record(x, c, action=measures.action)
        torch.testing.assert_close(ode(x, c), end)
        loss = end.square().sum() + records["action"].sum()
        results.append((loss, records["action"].sum(0), *torch.autograd.grad(loss, [c, *field.parameters()])))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_measures_beside_the_state_do_not_choose_its_steps(x, field):
    """Whatever the tolerance is made of."""
    for tolerance in (
        Tolerance(1e-5, 1e-5),
        Tolerance(rtol=0.0, atol=torch.tensor([1e-4, 1e-6, 1e-5])),
        Tolerance(1e-5, 1e-5, norm=lambda scaled: scaled.abs().max()),
    ):
        for control in ("batch", "sample"):
            plain = NeuralODE(field, tolerance=tolerance, gradient="checkpoint", control=control)
            expected = plain(x)
            evaluations = plain.evaluations
            end, _ = plain.record(x, action=measures.action)
            torch.testing.assert_close(end, expected, rtol=1e-12, atol=1e-12)
            assert plain.evaluations == evaluations


def test_the_action_of_a_bound_power_is_integrated(x):
    ode = NeuralODE(Velocity(lambda m, t, x: torch.full_like(x, 2.0)), gradient="checkpoint", t1=3.0)
    _, records = ode.record(x, cubic=measures.action.bind(p=3.0))
    torch.testing.assert_close(records["cubic"], torch.full((1, 5), 24.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="measure 'error' is no integral over time"):
        ode.record(x, error=measures.error)


def test_each_sample_is_solved_and_measured_as_if_alone(x, field):
    ode = NeuralODE(field, control="sample", t1=torch.tensor([0.5, 1.0, 1.5, 2.0, 0.0]))
    end, records = ode.record(x, action=measures.action, cosine=measures.cosine)
    for i, t1 in enumerate(ode.t1):
        alone = NeuralODE(field, t1=t1.item())
        one, expected = alone.record(x[i : i + 1], action=measures.action)
        torch.testing.assert_close(end[i : i + 1], one)
        torch.testing.assert_close(records["action"][:, i].sum(), expected["action"].sum())
    assert (records["cosine"][:, 4] == 0).all()


def test_an_event_ends_the_solve_and_its_action():
    ode = NeuralODE(Velocity(lambda m, t, x: torch.ones_like(x)), event=lambda t, x: x[:, 0] - 0.25, tolerance=TIGHT)
    x = torch.zeros(2, 1, dtype=torch.float64)
    solution = ode.solution(x)
    assert solution.status == "event"
    assert solution.event_time.item() == pytest.approx(0.25)
    end, records = ode.record(x, action=measures.action)
    torch.testing.assert_close(end, torch.full_like(x, 0.25))
    torch.testing.assert_close(records["action"], torch.full((1, 2), 0.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="no event"):
        ode.steps(x)


def test_the_state_at_any_time_comes_of_the_steps(x):
    ode = NeuralODE(Velocity(lambda m, t, x: -x), tolerance=TIGHT)
    torch.testing.assert_close(ode.solution(x)(0.3), x * math.exp(-0.3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_network_with_a_neural_ode_trains_with_its_action(gradient):
    torch.manual_seed(0)
    network = Network(nn.Linear(2, 4), NeuralODE(MLPField(4), gradient=gradient, solver="bs23"), nn.Linear(4, 2))
    points = torch.randn(64, 2)
    labels = (points.norm(dim=1) > 1).long()
    optimizer, objective = torch.optim.Adam(network.parameters(), 0.05), LeastAction()
    losses = []
    for _ in range(30):
        output, records = network.record(points, **objective.measures)
        loss = objective.loss(network, (points, labels), output, records)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(network, (points, labels))
        losses.append(nn.functional.cross_entropy(output, labels).item())
    assert losses[-1] < losses[0] / 2
    assert network.evaluations == network.flows[0].evaluations > 0


def test_methods_of_modules_and_plain_functions_are_fields(x):
    model = Bound().double()
    assert {*NeuralODE(model.velocity).parameters()} == {*model.parameters()}
    torch.testing.assert_close(NeuralODE(lambda t, x: -x, tolerance=TIGHT)(x), x / math.e, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="a function hides 'model', whose parameters no optimizer would see"):
        NeuralODE(lambda t, x: model.layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": 1e-3}, TypeError, "tolerance must be a Tolerance"),
        ({"steps": 3, "tolerance": TIGHT}, ValueError, "steps excludes tolerance"),
        ({"steps": 0}, ValueError, "steps must be a whole number, at least 1"),
        ({"solver": "euler"}, ValueError, "no embedded error"),
        ({"gradient": "adjoint"}, ValueError, "gradient must be 'direct', 'checkpoint', 'backsolve' or 'reversible'"),
        ({"control": "each"}, ValueError, "control must be"),
        ({"control": "sample", "gradient": "backsolve"}, ValueError, "needs one time for the batch"),
        ({"control": "sample", "steps": 3}, ValueError, "leave out steps"),
        ({"t1": math.inf}, ValueError, "t1 must be finite"),
        ({"t1": torch.ones(5)}, ValueError, "t1 must be a number"),
        ({"event": 3}, TypeError, "event must be a function"),
        ({"controller": PI}, TypeError, "controller must be a step-size rule"),
        ({"field": nn.Linear(3, 3)}, TypeError, "field must take t and x"),
        ({"field": MLPField}, TypeError, "field must be a velocity"),
        ({"field": 3}, TypeError, "field must be a velocity"),
    ],
)
def test_bad_settings_are_named_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        NeuralODE(**({"field": MLPField(3)} | arguments))


def test_bad_calls_are_named(x, field):
    ode = NeuralODE(field)
    with pytest.raises(TypeError, match="field must take t, x and 1 further"):
        ode(x, x)
    with pytest.raises(TypeError, match=r"field must take t and x.*missing a required argument: 'c'"):
        NeuralODE(Conditioned().double())(x)
    with pytest.raises(TypeError, match="measure 'readout' must be a function"):
        ode.record(x, readout="ensemble")
    with pytest.raises(TypeError, match=r"measures come by a name of their own, record\(x, action=measure\)"):
        ode.record(x, measures.action)
    with pytest.raises(ValueError, match="x must be finite"):
        ode.record(x * math.nan, action=measures.action)
    with pytest.raises(SolverError):
        NeuralODE(Velocity(lambda m, t, x: x * x))(x.abs() + 2)
    with pytest.raises(TypeError, match=r"odenets.NeuralODE\(field"):
        Flow(field, tolerance=TIGHT)


def test_it_is_copied_saved_and_printed(tmp_path, x, field):
    ode = NeuralODE(field, tolerance=TIGHT, t1=2.0)
    other = pickle.loads(pickle.dumps(ode))
    assert torch.equal(other(x), ode(x))
    odenets.save_weights(ode, tmp_path / "ode.safetensors")
    fresh = NeuralODE(MLPField(3, 16, activation="tanh", time=True).double(), tolerance=TIGHT, t1=2.0)
    assert torch.equal(odenets.load_weights(fresh, tmp_path / "ode.safetensors")(x), ode(x))
    assert "t1=2.0, gradient=direct" in repr(ode)


def test_fixed_steps_compile_whole(x, field):
    ode = NeuralODE(field, solver="rk4", steps=3)
    compiled = torch.compile(lambda x: ode.record(x, action=measures.action), backend="eager", fullgraph=True)
    end, records = compiled(x)
    torch.testing.assert_close(end, ode(x))
    torch.testing.assert_close(records["action"], ode.record(x, action=measures.action)[1]["action"])


@pytest.mark.parametrize(
    "settings", [{"gradient": "checkpoint"}, {"gradient": "backsolve"}, {"event": lambda t, x: x[0, 0] - 9}]
)
def test_measures_beside_a_narrow_state_would_be_sums_of_its_precision(settings):
    ode = NeuralODE(lambda t, x: -x, **settings)
    with pytest.raises(ValueError, match="x must be float32 or wider where measures are integrated beside it"):
        ode.record(torch.ones(2, 3, dtype=torch.bfloat16), action=measures.action)
