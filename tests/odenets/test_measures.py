import copy
import pickle
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, NeuralODE, measures
from odenets.detection import Trajectory
from odenets.penalties import error_penalty, square_error_penalty
from solvers import get_tableau, integrate, rk_step
from tests.counting import Counted, Operations
from tests.odenets.measure_tester import Case, MeasureTester, cosine, root_mean_square, step_of, tensors
from tests.odenets.networks import Velocity

FEATURES = Trajectory("embedding", "stages", vectors=2).measures(Flow(MLPField(2), solver="bs23"))


def wave(k, r):
    """The k-th vector of the discrete cosine transform."""
    return torch.cos(torch.pi * k / r.shape[1] * (torch.arange(r.shape[1], dtype=r.dtype, device=r.device) + 0.5))


CASES = {
    "action": Case(measures.action, lambda s: s.action()),
    "residue": Case(measures.residue, lambda s: s.residue.square().mean(1)),
    "square_norm": Case(measures.square_norm, lambda s: s.residue.square().sum(1)),
    "cosine": Case(measures.cosine, lambda s: cosine(s.residue)),
    "error": Case(measures.error, lambda s: root_mean_square(s.error)),
    "acceleration": Case(measures.acceleration, lambda s: (s.stages[-1] - s.stages[0]).square().mean(1) / s.h),
    "displacement": Case(measures.displacement, lambda s: root_mean_square(s.h[:, None] * s.residue)),
    "error_penalty": Case(error_penalty, lambda s: s.h * root_mean_square(s.error)),
    "square_error_penalty": Case(square_error_penalty, lambda s: s.error.square().mean(1)),
    # bound
    "action of p = 3": Case(measures.action.bind(p=3.0), lambda s: s.action(3.0)),
    "residue of p = 1.5": Case(measures.residue.bind(p=1.5), lambda s: s.residue.abs().pow(1.5).mean(1)),
    "partial": Case(partial(measures.action, p=3.0), lambda s: s.action(3.0)),
    # composed
    "sum": Case(2 * measures.action + measures.residue, lambda s: 2 * s.action() + s.residue.square().mean(1)),
    "difference": Case(1 - measures.action / 3, lambda s: 1 - s.action() / 3),
    "product": Case(-(measures.action * measures.error), lambda s: -s.action() * root_mean_square(s.error)),
    "quotient": Case(
        measures.residue / (1 + measures.displacement.map(torch.square)),
        lambda s: s.residue.square().mean(1) / (1 + (s.h[:, None] * s.residue).square().mean(1)),
    ),
    # features
    "embedding": Case(FEATURES["embedding"], lambda s: s.x1.square().mean(1)),
    "embedding cosine": Case(FEATURES["embedding cosine"], lambda s: cosine(s.x1)),
    "stage": Case(FEATURES["stage 2"], lambda s: s.stages[1].square().mean(1)),
    "stage cosine": Case(FEATURES["stage 2 cosine"], lambda s: cosine(s.stages[1])),
    "wave cosine": Case(FEATURES["cosine 2"], lambda s: cosine(s.residue, wave(2, s.residue))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestEveryMeasure(MeasureTester):
    """A measure is added to ``CASES`` with its definition, in a line."""


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 compiles no properties of named tuples")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_every_measure_is_compiled_in_one_graph(backend):
    def measured(*tensors):
        return {name: case.measure(step_of(*tensors)) for name, case in CASES.items()}

    compiled = torch.compile(measured, backend=backend, fullgraph=True)
    given = [[x.requires_grad_() for x in tensors((5, 6))] for _ in range(2)]
    given[1] = [x.detach().clone().requires_grad_() for x in given[0]]
    ours, theirs = compiled(*given[0]), measured(*given[1])
    torch.testing.assert_close(ours, theirs)
    for values in (ours, theirs):
        torch.stack([*values.values()]).square().sum().backward()
    torch.testing.assert_close([x.grad for x in given[0]], [x.grad for x in given[1]])


class Moving(nn.Module):
    """A time-dependent field."""

    def __init__(self, features=6):
        super().__init__()
        self.inner = MLPField(features, 32, activation="tanh", time=True)

    def forward(self, t, x):
        return 2 * self.inner(t, x)


@pytest.fixture
def x():
    return torch.randn(16, 6, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "bs23", "dopri5"])
def test_action_is_the_kinetic_energy_integrated_beside_the_state_at_no_extra_evaluation(solver, x):
    field = Counted(Moving().double())

    def beside(t, state):
        v = field(t, state[:, :-1])
        return torch.cat([v, v.square().mean(1, keepdim=True)], 1)

    with torch.no_grad():
        state = torch.cat([x, x.new_zeros(16, 1)], 1)
        expected = integrate(beside, state, 0.0, 1.0, solver=solver, steps=8)
        calls, field.calls = field.calls, 0
        action = torch.zeros(16, dtype=torch.float64)
        for m in range(8):
            step = rk_step(field, m / 8, x, 0.125, get_tableau(solver), closing=False)
            action, x = action + measures.action(step), step.x1
    torch.testing.assert_close(action, expected.x1[:, -1], rtol=1e-12, atol=0)
    assert field.calls == calls == expected.stats.evaluations


@pytest.mark.parametrize("solver", ["euler", "midpoint", "bs23"])
def test_action_and_displacement_do_not_change_when_a_constant_step_is_cut(solver):
    x, constant = torch.zeros(2, 4), Velocity(lambda m, t, x: torch.full_like(x, 3.0))
    for depth in (1, 5):
        flow = Flow(constant, solver=solver, depth=depth, total_time=2.0, shared=True)
        _, records = flow.record(x, **{name: getattr(measures, name) for name in ("action", "displacement", "residue")})
        torch.testing.assert_close(records["action"].sum(0), torch.full((2,), 18.0))
        torch.testing.assert_close(records["displacement"].sum(0), torch.full((2,), 6.0))
        torch.testing.assert_close(records["residue"], torch.full((depth, 2), 9.0))


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4", "bs23", "dopri5"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.0), (2.0, 0.0)])
def test_the_energy_of_a_constant_acceleration_is_exact(solver, steps, t0, t1):
    ode = NeuralODE(lambda t, x: torch.full_like(x, 3.0 * t), solver=solver, steps=steps, t0=t0, t1=t1)
    _, records = ode.record(torch.zeros(2, 4), acceleration=measures.acceleration)
    torch.testing.assert_close(records["acceleration"].sum(0), torch.full((2,), 18.0))  # 3^2 over a time of 2


@pytest.mark.parametrize(("solver", "order"), [("midpoint", 1), ("bs23", 2), ("dopri5", 2)])
def test_the_energy_of_the_acceleration_converges(solver, order):
    """Of a rotation that grows faster; with the order of the difference of two velocities."""

    def turning(t, x):
        return torch.stack([-(1 + t) * x[:, 1], (1 + t) * x[:, 0]], 1)

    errors = []
    for steps in (16, 32):
        ode = NeuralODE(turning, solver=solver, steps=steps)
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        _, records = ode.record(x, acceleration=measures.acceleration)
        t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        exact = torch.trapezoid((1 + t) ** 4 + 1, t) / 2  # |a|^2 = w^4 + w'^2, mean over two features
        errors.append((records["acceleration"].sum() - exact).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_an_acceleration_needs_two_velocities():
    step = rk_step(lambda t, x: x, 0.0, torch.ones(2, 3), 0.1, get_tableau("euler"))
    with pytest.raises(ValueError, match="euler has no stage after its first"):
        measures.acceleration(step)
    step = rk_step(lambda t, x: x, 0.0, torch.ones(2, 3), 0.1, get_tableau("bs23"), closing=False)
    with pytest.raises(ValueError, match="needs the closing stage of bs23"):
        measures.acceleration(step)


def test_a_recorded_block_is_finished_in_one_operation():
    x, flow = torch.randn(16, 6000), Flow(solver="bs23", depth=1)
    flow(x)
    named = {"action": measures.action, "residue": measures.residue, "cosine": measures.cosine}
    with Operations() as operations:
        flow.record(x, **named)
    assert operations.counts[torch.ops.solvers.finish_step.default] == 1


def test_a_partial_of_a_measure_reads_what_the_measure_reads():
    for p in (1.5, 3.0):
        assert not measures.needs_closing(partial(measures.action, p=p))
        assert not measures.needs_closing(partial(partial(measures.residue), p=p))
    assert measures.needs_closing(partial(lambda step, p: step.x1.sum(1), p=1))
    assert measures.needs_closing(measures.error)
    closed = measures.measure(closing=False)(lambda step, p: step.x1.sum(1))
    assert not measures.needs_closing(partial(closed, p=1))
    assert not measures.needs_closing(closed.bind(p=1))


@pytest.mark.parametrize(
    "network",
    [
        Flow(MLPField(3), solver="bs23", depth=2),
        NeuralODE(MLPField(3), solver="bs23"),
        NeuralODE(MLPField(3), solver="bs23", control="sample"),
    ],
)
def test_a_measure_without_the_closing_stage_never_sees_it(network):
    """Whatever is recorded beside it, whether a step has that stage for reasons of its own, and in compositions."""

    @measures.measure(closing=False)
    def last(step):
        return len(step.stages) + step.stages[-1].abs().sum(1)

    def third(step):
        return 3 + step.stages[2].abs().sum(1)

    x = torch.randn(4, 3)
    _, alone = network.record(x, last=last, twice=2 * last)
    _, beside = network.record(x, last=last, error=measures.error, both=last + measures.error, third=third)
    assert torch.equal(alone["last"], beside["last"])
    assert torch.equal(beside["last"], beside["third"])
    assert torch.equal(alone["twice"], 2 * alone["last"])
    assert torch.equal(beside["both"], beside["last"] + beside["error"])


def test_composed_measures_read_what_their_parts_read():
    assert not measures.needs_closing(2 * measures.action + measures.residue)
    assert measures.needs_closing(measures.action - measures.error / 3)
    assert measures.needs_closing(1 + measures.error.map(torch.sqrt))
    assert measures.needs_closing(measures.action + (lambda step: step.x1.sum(1)))
    assert measures.reductions_of([measures.action * measures.residue]) == {"action", "residue"}
    assert measures.reductions_of([measures.action * measures.displacement]) == set()


@dataclass(frozen=True)
class Scaled(measures.Measure):
    factor: float = 3.0

    def __call__(self, step, **options):
        return self.factor * super().__call__(step, **options)


A, WEIGHTS = measures.action, torch.arange(3.0)


def peak(step):
    return step.x1.abs().amax(1)


SCALED = Scaled(peak, closing=False, factor=5.0)


@pytest.mark.parametrize(
    "one", [A, A.bind(p=3.0), 2 * measures.error.map(torch.log), A * WEIGHTS, 2 * A.bind(p=3.0), SCALED, SCALED + A]
)
def test_measures_are_equal_to_their_copies_and_frozen(one):
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert len({one, copy.copy(one)}) == 1
    with pytest.raises(AttributeError):
        one.closing = True
    step = step_of(*tensors((3, 4)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(one))(step), one(step))


def test_measures_of_other_numbers_differ():
    assert A * WEIGHTS != A * (WEIGHTS + 1) != A * 2.0 != A * 3.0
    assert A.map(torch.log) != A.map(torch.sqrt)
    assert Scaled(peak, closing=False) != SCALED


def test_numbers_of_numpy_are_numbers():
    assert np.float32(2) * A == np.float64(2) * A == 2 * A
    assert A * np.int64(2) == A * np.float32(2) == A * 2
    with pytest.raises(TypeError, match="composed with measures and numbers, got ndarray"):
        np.ones(3) * A


def test_a_measure_of_a_measure_is_that():
    assert measures.measure(A) is A


LINEAR = {
    "product": 2 * A,
    "sum": A + A.bind(p=3.0) / 4,
    "sum of many": sum([A, A * torch.tensor(0.5), -A]),
    "partial": partial(A, p=3.0),
    "partials": A - partial(partial(A.bind(p=1.5), p=2.5), p=4.0),
    "weights": A * torch.tensor([0.5, 1.0, 2.0]),
}


@pytest.mark.parametrize("one", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("gradient", ["checkpoint", "backsolve"])
def test_linear_compositions_of_integrals_are_integrals(one, gradient):
    field, x = Moving(4).double(), torch.randn(3, 4, dtype=torch.float64)
    records = [NeuralODE(field, steps=3, solver="rk4", gradient=g).record(x, one=one)[1] for g in ("direct", gradient)]
    torch.testing.assert_close(records[0]["one"].sum(0), records[1]["one"].sum(0))


@pytest.mark.parametrize(
    "one", [A + 1, A * A, 1 / A, A.map(torch.sqrt), A * torch.ones(1, requires_grad=True), A + measures.error]
)
def test_others_are_not(one):
    with pytest.raises(ValueError, match="measure 'one' is no integral over time"):
        NeuralODE(Moving(4), steps=3, gradient="checkpoint").record(torch.randn(3, 4), one=one)


@pytest.mark.parametrize("network", [Flow(MLPField(3)), NeuralODE(MLPField(3), steps=1), Flow(MLPField(3), depth=2)])
@pytest.mark.parametrize(
    ("args", "check", "message"),
    [
        ((), A, r"measures come by a name of their own, record\(x, action=measure\)"),
        ((A,), True, r"measures come by a name of their own, record\(x, action=measure\)"),
        ((), abs, "check must be True or False, got .*abs"),
    ],
)
def test_a_measure_without_a_name_is_refused(network, args, check, message):
    with pytest.raises(TypeError, match=message):
        network.record(torch.randn(2, 3), *args, check=check)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measures.measure(3), TypeError, "must be a function Step -> .* got int"),
        (lambda: measures.measure(reduction="acton"), ValueError, "reduction must be 'error', 'action' or 'residue'"),
        (lambda: measures.action + "error", TypeError, "composed with measures and numbers, got str"),
        (
            lambda: (measures.action + 1).bind(p=3),
            TypeError,
            "a composed measure takes no p: bind options to its parts",
        ),
        (lambda: measures.integrand_of("error", measures.error), ValueError, "'error' is no integral"),
    ],
)
def test_what_is_no_measure_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
