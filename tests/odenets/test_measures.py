import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, measures
from solvers import get_tableau, integrate, rk_step
from tests.counting import Counted, Operations
from tests.odenets.networks import Velocity


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


def test_a_field_at_rest_has_a_cosine_of_zero_and_finite_gradients():
    flow = Flow(MLPField(3))
    nn.init.zeros_(flow.blocks[0].fields[0].second.weight)
    nn.init.zeros_(flow.blocks[0].fields[0].second.bias)
    _, records = flow.record(torch.randn(4, 3), cosine=measures.cosine)
    assert records["cosine"].tolist() == [[0.0] * 4]
    records["cosine"].sum().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "bs23"])
@pytest.mark.parametrize("features", [6, 6000])
def test_what_a_step_finds_while_its_state_is_made_is_what_is_measured_after(solver, features):
    x = torch.randn(16, features, requires_grad=True)
    flow = Flow(lambda: MLPField(features, 32), solver=solver, depth=2)
    named = {"action": measures.action, "residue": measures.residue, "cosine": measures.cosine}
    if get_tableau(solver).error_weights is not None:
        named["error"] = measures.error
    end, records = flow.record(x, **named)
    steps = list(flow.steps(x))
    assert all(step.reductions is None for step in steps)
    torch.testing.assert_close(end, steps[-1].x1)
    for name, measure in named.items():
        after = torch.stack([measure(step) for step in steps])
        torch.testing.assert_close(records[name], after)
        (ours,) = torch.autograd.grad(records[name].sum(), x, retain_graph=True)
        (theirs,) = torch.autograd.grad(after.sum(), x, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["action", "residue", "square_norm", "cosine", "error", "displacement"])
def test_measures_are_their_definitions_and_of_narrow_states_in_float32(name, dtype):
    """The sum of the squares of these states is beyond float16."""
    torch.manual_seed(0)
    flow = Flow(lambda: MLPField(300), solver="bs23", depth=2, h=[0.5, 0.25]).to(dtype)
    x = 300 * torch.randn(4, 300, dtype=dtype)
    with torch.no_grad():
        measured = flow.record(x, value=getattr(measures, name))[1]["value"]
        steps = list(flow.steps(x))
    assert measured.dtype == torch.promote_types(dtype, torch.float32)
    assert measured.isfinite().all()
    stages = [torch.stack([p.double() for p in step.stages]) for step in steps]
    weights = torch.tensor(steps[0].tableau.b, dtype=torch.float64)
    low = torch.tensor(steps[0].tableau.error_weights, dtype=torch.float64)
    h = torch.tensor([[0.5], [0.25]])
    residue, error = (torch.stack([torch.einsum("s,sbd->bd", w, p) for p in stages]) for w in (weights, low))
    expected = {
        "action": h * torch.stack([torch.einsum("s,sb->b", weights, p.square().mean(2)) for p in stages]),
        "residue": residue.square().mean(2),
        "square_norm": residue.square().sum(2),
        "cosine": residue.sum(2) / (residue.norm(dim=2) * 300**0.5),
        "error": h * error.square().mean(2).sqrt(),
        "displacement": h * residue.square().mean(2).sqrt(),
    }
    torch.testing.assert_close(measured.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("composed", "expected", "closing"),
    [
        (2 * measures.action + measures.residue, lambda a, r, e: 2 * a + r, False),
        (measures.error - measures.action / 3, lambda a, r, e: e - a / 3, True),
        (1 / (1 + measures.residue.map(torch.sqrt)), lambda a, r, e: 1 / (1 + r.sqrt()), False),
        (-(measures.action * measures.error), lambda a, r, e: -a * e, True),
        (1 - measures.action, lambda a, r, e: 1 - a, False),
    ],
)
def test_composed_measures_are_the_arithmetic_of_their_parts_and_read_what_they_read(x, composed, expected, closing):
    flow = Flow(lambda: MLPField(6), solver="bs23", depth=2).double()
    parts = {"action": measures.action, "residue": measures.residue, "error": measures.error}
    _, records = flow.record(x, composed=composed, **parts)
    torch.testing.assert_close(records["composed"], expected(*(records[name] for name in parts)))
    assert measures.needs_closing(composed) is closing


@pytest.mark.parametrize("one", [measures.action, measures.action.bind(p=3.0), 2 * measures.error.map(torch.log)])
def test_measures_are_equal_to_their_copies_and_frozen(one):
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert len({one, copy.copy(one)}) == 1
    with pytest.raises(AttributeError):
        one.closing = True


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measures.measure(3), TypeError, "must be a function Step -> .* got int"),
        (lambda: measures.measure(reduction="acton"), ValueError, "reduction must be 'error', 'action' or 'residue'"),
        (lambda: measures.action + "error", TypeError, "composed with measures and numbers, got str"),
        (lambda: measures.integrand_of("error", measures.error), ValueError, "'error' is no integral"),
    ],
)
def test_what_is_no_measure_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
