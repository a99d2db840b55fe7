"""States of a NeuralODE at chosen times: those of solves that end there, in every mode, for each sample its own."""

import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn
from torch.testing import assert_close

from odenets import MLPField, NeuralODE, measures
from solvers import Tolerance
from tests.odenets.networks import Velocity

TIGHT = Tolerance(1e-9, 1e-9)
MODES = [
    {"gradient": "direct"},
    {"gradient": "checkpoint"},
    {"gradient": "backsolve"},
    {"gradient": "direct", "control": "sample"},
    {"gradient": "checkpoint", "control": "sample"},
]
STEPS = [{"tolerance": TIGHT}, {"steps": 40, "solver": "rk4"}, {"steps": 40, "solver": "dopri5"}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("at", [[0.0, 0.25, 0.25, 1.5], [-0.5, -1.0], [1.0]])
def test_states_at_times_and_their_gradients_are_torchdiffeqs(x, field, mode, at):
    x.requires_grad_()
    states = NeuralODE(field, tolerance=TIGHT, **mode)(x, at=at)
    later = sorted({0.0, *at}, reverse=at[-1] < 0)
    theirs = torchdiffeq.odeint(field, x, torch.tensor(later, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    theirs = theirs[[later.index(t) for t in at]]
    assert_close(states, theirs, rtol=1e-6, atol=1e-7)
    weight = torch.randn_like(states)
    inputs = [x, *field.parameters()]
    for one, other in zip(
        torch.autograd.grad((weight * states).sum(), inputs),
        torch.autograd.grad((weight * theirs).sum(), inputs),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=["adaptive", "rk4", "dopri5"])
def test_states_at_times_are_those_of_scipy(x, field, mode, steps):
    at = [0.1, 0.5, 0.77]
    states = NeuralODE(field, **steps, **mode)(x, at=at)

    def v(t, flat):
        with torch.no_grad():
            return field(t, torch.from_numpy(flat).view(5, 3)).flatten().numpy()

    exact = solve_ivp(v, (0, 1), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11, t_eval=at).y.T
    np.testing.assert_allclose(states.detach().flatten(1), exact, atol=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_oscillators_turn_in_every_mode_and_dtype(mode, dtype):
    x = torch.randn(3, 2, dtype=dtype)
    real = x.real.dtype
    at = torch.linspace(0, 2, 5, dtype=real)
    small = 1e-4 if real == torch.float32 else 1e-7
    tolerance = Tolerance(1e-6, 1e-6) if real == torch.float32 else TIGHT
    if x.is_complex():
        states = NeuralODE(Velocity(lambda m, t, x: 1j * x), tolerance=tolerance, **mode)(x, at=at)
        assert_close(states, x * torch.exp(1j * at)[:, None, None], rtol=small, atol=small)
        return
    tree = NeuralODE(Velocity(lambda m, t, x: {"q": x["p"], "p": -x["q"]}), tolerance=tolerance, **mode)
    states = tree({"q": x, "p": torch.zeros_like(x)}, at=at)
    assert_close(states["q"], x * torch.cos(at)[:, None, None], rtol=small, atol=small)
    assert states["p"].dtype == dtype


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_each_sample_has_its_own_start_and_times(x, field, gradient):
    """And as many as it has: a row is filled up with its last time."""
    t0 = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    ode = NeuralODE(field, control="sample", gradient=gradient, t0=t0)
    at = t0[:, None] + torch.rand(5, 4).sort().values
    counts = [4, 3, 2, 1, 4]
    for i, count in enumerate(counts):
        at[i, count:] = at[i, count - 1]
    states = ode(x, at=at)
    assert states.shape == (5, 4, 3)
    for i, count in enumerate(counts):
        alone = NeuralODE(field, t0=t0[i].item())(x[i : i + 1], at=at[i, :count].tolist())
        assert_close(states[i, :count], alone[:, 0])
        assert_close(states[i, count:], alone[-1].expand(4 - count, 3))


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_gradients_flow_to_the_times(x, field, control):
    at = torch.rand(5, 3, dtype=torch.float64).sort().values
    at = (at if control == "sample" else at[0]).requires_grad_()
    states = NeuralODE(field, tolerance=TIGHT, control=control)(x, at=at)
    (gradient,) = torch.autograd.grad(states.sum(), at)
    velocity = field(at[..., None], states) if control == "sample" else torch.stack([*map(field, at, states)])
    expected = velocity.sum(-1) if control == "sample" else velocity.sum((1, 2))
    assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 99), st.floats(-2, 2), st.sampled_from(MODES))
def test_solved_back_the_state_is_the_first_one(seed, t1, mode):
    torch.manual_seed(seed)
    field, x = MLPField(2, 8, activation="tanh", time=True).double(), torch.randn(3, 2, dtype=torch.float64)
    there = NeuralODE(field, tolerance=TIGHT, t1=t1, **mode)
    back = NeuralODE(field, tolerance=TIGHT, t0=t1, t1=0.0, **mode)
    assert_close(back(there(x)), x, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from(MODES))
def test_an_interval_in_two_parts_is_the_interval(seed, middle, mode):
    torch.manual_seed(seed)
    field, x = MLPField(2, 8, activation="tanh", time=True).double(), torch.randn(3, 2, dtype=torch.float64)
    first = NeuralODE(field, tolerance=TIGHT, t1=middle, **mode)
    second = NeuralODE(field, tolerance=TIGHT, t0=middle, **mode)
    (half, one), (end, other) = first.record(x, action=measures.action), second.record(first(x), action=measures.action)
    whole, records = NeuralODE(field, tolerance=TIGHT, **mode).record(x, action=measures.action)
    assert_close(end, whole, rtol=1e-6, atol=1e-6)
    assert_close(one["action"].sum(0) + other["action"].sum(0), records["action"].sum(0), rtol=1e-5, atol=1e-6)
    assert_close(half, NeuralODE(field, tolerance=TIGHT, **mode)(x, at=[middle])[0], rtol=1e-6, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(1, 6))
def test_samples_are_solved_as_if_alone_in_any_order(seed, samples):
    torch.manual_seed(seed)
    field, x = MLPField(2, 8, time=True).double(), 3 * torch.randn(samples, 2, dtype=torch.float64)
    t1 = 4 * torch.rand(samples, dtype=torch.float64) - 2
    ends = NeuralODE(field, control="sample", t1=t1)(x)
    order = torch.randperm(samples)
    assert_close(NeuralODE(field, control="sample", t1=t1[order])(x[order]), ends[order])
    for i in range(samples):
        assert_close(NeuralODE(field, t1=t1[i])(x[i : i + 1])[0], ends[i])


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from(MODES))
def test_a_field_that_commutes_with_rotations_makes_a_flow_that_does(seed, mode):
    torch.manual_seed(seed)
    field = Velocity(lambda m, t, x: (1 - t) * torch.tanh(x.norm(dim=-1, keepdim=True)) * x)
    ode = NeuralODE(field, tolerance=TIGHT, t1=0.2, **mode)
    x, turn = torch.randn(4, 3, dtype=torch.float64), torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert_close(ode(x @ turn), ode(x) @ turn, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_states_behind_an_event_are_nan(mode):
    event = (lambda t, x: x[:, 0] - 0.75) if "control" in mode else (lambda t, x: x[:, 0].max() - 0.75)
    ode = NeuralODE(Velocity(lambda m, t, x: torch.ones_like(x)), event=event, tolerance=TIGHT, **mode)
    x = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
    states = ode(x, at=[0.125, 0.5, 1.0]).squeeze(-1)
    expected = torch.tensor([[0.125, 0.625], [0.5, math.nan], [math.nan, math.nan]], dtype=torch.float64)
    expected = expected if "control" in mode else torch.where(expected.isnan().any(1, True), math.nan, expected)
    assert_close(states, expected, equal_nan=True)


def test_the_solution_has_states_at_times_beside_its_steps(x, field):
    solution = NeuralODE(field, tolerance=TIGHT).solution(x, at=[0.2, 0.6])
    assert_close(solution(0.2), solution.states[0])
    assert_close(solution.x1, solution.states[1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_time_moves_nothing(x, field, mode):
    ode = NeuralODE(field, t0=2.0, t1=2.0, **mode)
    end, records = ode.record(x, action=measures.action)
    assert torch.equal(end, x)
    assert records["action"].shape[1:] == (5,)
    assert not records["action"].any()
    assert torch.equal(ode(x, at=[2.0])[0], x)


def test_times_are_numbers_of_the_host_and_no_state(x, field):
    for t1 in (torch.linspace(0.5, 1.5, 5), np.linspace(0.5, 1.5, 5), [0.5, 0.75, 1.0, 1.25, 1.5]):
        ode = NeuralODE(field, control="sample", t1=t1)
        assert ode(x).shape == (5, 3)
        assert ode.h == (1.5,)
        assert set(ode.state_dict()) == {f"field.{name}" for name in field.state_dict()}
        assert NeuralODE(MLPField(3), control="sample", t1=t1).to("meta").t1.device.type == "cpu"
    assert NeuralODE(field, t1=torch.tensor(2.0)).t1 == 2.0
    with pytest.raises(ValueError, match=r"t1 must not require a gradient.*at=times"):
        NeuralODE(field, t1=nn.Parameter(torch.tensor(1.0)))


@pytest.mark.gpu
def test_times_of_samples_go_with_states_on_a_gpu(x, field):
    ode = NeuralODE(field, control="sample", t0=torch.zeros(5), t1=torch.linspace(0.5, 1.5, 5))
    at = torch.rand(5, 3).sort().values
    end, states = ode(x), ode(x, at=at)
    ode.to("cuda")
    assert_close(ode(x.cuda()).cpu(), end)
    assert_close(ode(x.cuda(), at=at.cuda()).cpu(), states)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            [0.5, 0.2, 0.7],
            "without turning back, got 0.2 behind 0.5 at index 1: .*repeat the last one",
        ),
        ([0.2, -0.1], "without turning back"),
        ([0.2, math.nan], "at of sample 0 must be finite.*repeat the last one where a sample has fewer"),
        ([[0.1, 0.2, 0.0]] * 5, "without turning back.*repeat the last one"),
        ([[0.1], [0.1, 0.2], [0.3], [0.4], [0.5]], "repeat the last"),
        ([], "at must hold at least one time"),
        (torch.zeros(4, 3), r"at must have shape \(n,\) or \(5, n\), got \(4, 3\)"),
        (0.5, "at must be a tensor, an array or a list of times"),
        ("half", "at must be a tensor, an array or a list of times"),
        ([True], "at must hold real numbers|at must be"),
    ],
)
def test_bad_times_are_named(x, field, at, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NeuralODE(field, control="sample")(x, at=at)


def test_times_of_each_sample_want_control_of_each(x, field):
    with pytest.raises(ValueError, match=r"at must have shape \(n,\), got \(5, 2\); control='sample' takes \(B, n\)"):
        NeuralODE(field)(x, at=torch.rand(5, 2).sort().values)


def test_times_in_float32_begin_at_a_start_in_float64(x, field):
    at = torch.tensor([0.1, 0.3, 0.7])
    assert_close(NeuralODE(field, t0=0.1)(x, at=at)[0], x, rtol=1e-6, atol=1e-6)
