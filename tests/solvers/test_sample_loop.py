import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import solvers.tolerance
from solvers import PI, MaxStepsError, NonFiniteError, StepUnderflowError, Tolerance, integrate
from solvers.sample_loop import align
from tests.counting import Counted
from tests.solvers.problems import D

TIGHT = Tolerance(1e-6, 1e-8)


def swing(t, x):
    """A pendulum with a driving force that depends on the time; every sample has its own frequency by its state."""
    angle, speed, frequency = x.unbind(-1)
    time = t.squeeze(-1) if isinstance(t, torch.Tensor) else t
    return torch.stack([speed, -(frequency**2) * angle.sin() + 0.1 * np.cos(1.0) * time, 0 * frequency], -1)


def scipys(pendulum, t0, t1, **options):
    velocity = lambda t, y: swing(t, torch.from_numpy(y)[None])[0].numpy()  # noqa: E731
    return solve_ivp(velocity, (t0, t1), pendulum.numpy(), rtol=1e-10, atol=1e-12, **options)


@pytest.fixture
def pendulums():
    frequencies = torch.tensor([0.5, 1.0, 3.0, 9.0], dtype=D)
    return torch.stack([torch.full_like(frequencies, 1.0), torch.zeros_like(frequencies), frequencies], -1)


@pytest.mark.parametrize("controller", [None, PI()])
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "tsit5", "dopri8", "heun"])
def test_a_sample_is_solved_as_if_it_were_alone(solver, controller, pendulums):
    tolerance = Tolerance(1e-4, 1e-5) if solver == "heun" else TIGHT
    options = {"solver": solver, "tolerance": tolerance, "controller": controller}
    together = integrate(swing, pendulums, 0.0, 2.0, control="sample", **options)
    assert together.status == ("finished",) * 4
    counts = []
    for i in range(4):
        alone = integrate(swing, pendulums[i : i + 1], 0.0, 2.0, **options)
        torch.testing.assert_close(together.x1[i], alone.x1[0], rtol=1e-6, atol=1e-9)
        counts.append((alone.stats.accepted, alone.stats.rejected))
    result = together.sample_stats
    assert list(zip(result.accepted.tolist(), result.rejected.tolist(), strict=True)) == counts
    assert result.accepted[3] > 3 * result.accepted[0]


def test_field_calls_are_those_of_the_sample_that_needs_most(pendulums):
    field = Counted(swing)
    solution = integrate(field, pendulums, 0.0, 2.0, control="sample", tolerance=TIGHT)
    assert solution.stats.evaluations == field.calls == solution.sample_stats.evaluations.max()
    assert solution.stats.accepted == solution.sample_stats.accepted.sum()
    assert solution.sample_stats.evaluations[0] < field.calls / 3


def test_one_wait_for_the_device_per_attempt(pendulums, monkeypatch):
    calls = []
    to_host = solvers.tolerance.to_host
    monkeypatch.setattr(solvers.tolerance, "to_host", lambda x: calls.append(0) or to_host(x))
    solution = integrate(swing, pendulums, 0.0, 2.0, control="sample", tolerance=Tolerance(1e-6, 1e-8, first_step=0.01))
    attempts = solution.sample_stats.accepted + solution.sample_stats.rejected
    assert len(calls) == attempts.max()


def test_each_sample_has_its_own_times(pendulums):
    t0, t1 = torch.tensor([0.0, 1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, -1.0, 3.0])
    solution = integrate(swing, pendulums, t0, t1, control="sample", tolerance=TIGHT, keep="states")
    torch.testing.assert_close(solution.t1, t1.double())
    assert torch.equal(solution.times[0], t0.double())
    torch.testing.assert_close(solution.x1[1], pendulums[1])
    for i in (0, 2, 3):
        exact = scipys(pendulums[i], t0[i].item(), t1[i].item())
        np.testing.assert_allclose(solution.x1[i].numpy(), exact.y[:, -1], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    features=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([D, torch.float32, torch.complex64, torch.complex128]),
    rtol=st.floats(1e-5, 1e-2),
    t1=st.floats(-1, 2),
)
def test_shapes_and_dtypes(batch, features, dtype, rtol, t1):
    x0 = torch.linspace(0.1, 1, batch * int(np.prod(features))).to(dtype).reshape(batch, *features)
    solution = integrate(lambda t, x: -x * (1 + t), x0, 0.0, t1, control="sample", tolerance=Tolerance(rtol, rtol / 10))
    assert solution.x1.dtype == dtype
    exact = x0 * np.exp(-(t1 + t1**2 / 2))
    assert ((solution.x1 - exact).abs() / (1 + exact.abs())).max() < 50 * rtol


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states(dtype):
    x0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, control="sample", tolerance=Tolerance(3e-2, 3e-2))
    assert solution.x1.dtype == dtype
    torch.testing.assert_close(solution.x1.double(), x0.double() * np.exp(-1), rtol=0.05, atol=0.05)


def test_tolerances_may_differ_by_sample(pendulums):
    rtol = torch.tensor([[1e-2], [1e-4], [1e-6], [1e-8]], dtype=D)
    same = pendulums[1].expand(4, 3).clone()
    solution = integrate(swing, same, 0.0, 2.0, control="sample", tolerance=Tolerance(rtol, 0.1 * rtol))
    accepted = solution.sample_stats.accepted.tolist()
    assert accepted == sorted(accepted)
    assert accepted[0] < accepted[3] / 5


def wall(t, x):
    """Velocity 1, and no velocity behind x = 2."""
    return torch.where(x > 2, torch.nan, torch.ones_like(x))


def test_a_sample_that_cannot_go_on_is_named():
    x0 = torch.tensor([[-5.0], [1.0]], dtype=D)
    with pytest.raises(NonFiniteError, match=r"no smaller step avoids it \(t = 1, .*stage [123], sample 1\)") as caught:
        integrate(wall, x0, 0.0, 2.0, control="sample", tolerance=Tolerance(max_step=0.3))
    assert caught.value.sample == 1
    assert caught.value.solution.status == ("finished", "not_finite")
    with pytest.raises(NonFiniteError, match="stage 0, sample 1"):
        integrate(wall, torch.tensor([[0.0], [3.0]]), 0.0, 1.0, control="sample")
    with pytest.raises(StepUnderflowError, match=r"last error ratio.*stiff.*sample 1"):
        integrate(lambda t, x: x**2, torch.tensor([[0.1], [1.0]], dtype=D), 0.0, 2.0, control="sample")
    with pytest.raises(MaxStepsError, match=r"3 attempted steps did not reach t1 = 10.*sample 0"):
        integrate(wall, x0, 0.0, 10.0, control="sample", tolerance=Tolerance(max_steps=3, max_step=0.1))


def test_a_sample_that_cannot_go_on_leaves_the_others_and_their_gradients_alone():
    x0 = torch.tensor([[-5.0], [1.0], [-4.0]], dtype=D, requires_grad=True)
    scale = torch.tensor(1.0, dtype=D, requires_grad=True)
    solution = integrate(
        lambda t, x: scale * wall(t, x),
        x0, 0.0, 2.0, control="sample", tolerance=Tolerance(max_step=0.3), on_limit="return",
    )  # fmt: skip
    assert solution.status == ("finished", "not_finite", "finished")
    torch.testing.assert_close(solution.t1, torch.tensor([2.0, 1.0, 2.0], dtype=D), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solution.x1[[0, 2]], x0[[0, 2]] + 2)
    assert solution.x1[1].item() == pytest.approx(2.0, abs=1e-5)
    (grad,) = torch.autograd.grad(solution.x1[[0, 2]].sum(), scale)
    assert grad.item() == pytest.approx(4.0)


def test_no_nan_reaches_the_gradient_of_a_parameter():
    x0 = torch.tensor([[0.25], [1.0]], dtype=D)
    scale = torch.tensor(1.0, dtype=D, requires_grad=True)
    solution = integrate(
        lambda t, x: scale * x**2, x0, 0.0, 1.5, control="sample", on_limit="return", tolerance=Tolerance(max_steps=200)
    )
    assert solution.status[0] == "finished"
    assert solution.status[1] in ("underflow", "not_finite", "max_steps")
    (grad,) = torch.autograd.grad(solution.x1[0].sum(), scale)
    exact = x0[0] ** 2 * 1.5 / (1 - 1.5 * x0[0]) ** 2  # of x0 / (1 - scale t x0)
    assert grad.item() == pytest.approx(exact.item(), rel=1e-2)


def fall(t, x, k):
    """Height and speed under gravity and air."""
    return torch.stack([x[..., 1], -9.81 - k * x[..., 1]], -1)


def test_events_end_their_own_sample():
    x0 = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, -1.0], [100.0, 0.0]], dtype=D)
    solution = integrate(
        fall, x0, 0.0, 2.0, control="sample", event=lambda t, x: x[:, 0], args=(0.0,), tolerance=TIGHT, solver="dopri5"
    )
    assert solution.status == ("event", "event", "event", "finished")
    exact = (2 * x0[:2, 0] / 9.81).sqrt()
    torch.testing.assert_close(solution.event_time[:2], exact)
    torch.testing.assert_close(solution.t1[:2], exact)
    assert solution.event_time[2] == 0
    assert solution.event_time[3].isnan()
    assert solution.t1[3] == 2.0
    torch.testing.assert_close(solution.x1[:3, 0], torch.zeros(3, dtype=D), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", ["bs23", "dopri5", "tsit5", "heun"])
def test_dense_solution(solver, pendulums):
    tight = Tolerance(1e-4, 1e-6) if solver == "heun" else TIGHT
    solution = integrate(swing, pendulums, 0.0, 2.0, control="sample", keep="steps", tolerance=tight, solver=solver)
    times = torch.linspace(0, 2, 9, dtype=D)
    result = solution(times)
    assert result.shape == (9, 4, 3)
    for i in range(4):
        exact = scipys(pendulums[i], 0.0, 2.0, t_eval=times.numpy())
        np.testing.assert_allclose(result[:, i].numpy(), exact.y.T, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(solution(2.0), solution.x1, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"t must lie between 0 and 2 for sample 0, got 2.1"):
        solution(2.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8))
def test_aligned_steps_are_each_samples_own_in_order(accepted):
    accepted = np.array(accepted)
    times = np.vstack([np.zeros(3), np.cumsum(accepted, 0)]).astype(float)
    starts, sizes = align(accepted, times[:-1], times[1:])
    assert len(starts) == accepted.sum(0).max()
    for i in range(3):
        n = accepted[:, i].sum()
        np.testing.assert_array_equal(starts[:n, i], np.arange(n))
        np.testing.assert_array_equal(sizes[:, i], [1.0] * n + [0.0] * (len(sizes) - n))


@pytest.mark.parametrize("solver", ["bs23", "dopri5", "heun"])
def test_dense_solution_of_samples_that_met_their_event(solver):
    """The last step of such a sample goes on beyond its event."""
    x0 = torch.tensor([[1.0, 0.0], [3.0, 0.0], [100.0, 0.0]], dtype=D)
    solution = integrate(
        fall, x0, 0.0, 2.0, control="sample", event=lambda t, x: x[:, 0], args=(0.0,), keep="steps", solver=solver
    )
    for i in range(2):
        time = solution.event_time[i]
        at = torch.stack([0 * time, time / 3, time * 0.9]).clamp(max=float(solution.t1.min()))
        result = solution(at)
        exact = torch.stack([x0[i, 0] - 9.81 * at**2 / 2, -9.81 * at], -1)
        torch.testing.assert_close(result[:, i], exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solution(solution.t1.min())[0], solution.x1[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ["bs23", "heun", "fehlberg2"])
@pytest.mark.parametrize("rates", [[1.0, 20.0], [1.0, 2.0, 3.0, 20.0]])
def test_dense_solution_of_a_field_that_knows_its_samples_by_position(solver, rates):
    rates = torch.tensor(rates, dtype=D)[:, None]
    solution = integrate(
        lambda t, x, a: -a * x, torch.ones_like(rates), 0.0, 1.0, solver=solver, control="sample", keep="steps",
        args=(rates,), tolerance=Tolerance(1e-5, 1e-7),
    )  # fmt: skip
    torch.testing.assert_close(solution(0.5), (-rates / 2).exp(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"gradient": "checkpoint"}, {"solver": "heun", "keep": "steps"}])
def test_the_field_is_asked_within_the_interval_of_each_sample(dtype, options):
    """Also by the probe for the first step, by samples at rest, and where times are rounded to narrow numbers."""
    t0 = np.array([0.7879, 0.2, 0.9, 1.0, 0.0, -3.3])
    t1 = np.array([0.0, 1.0, 0.85, 1.0, 0.3, -2.1])

    def field(t, x):
        assert t.dtype == x.dtype
        times = np.array(t.double().flatten().tolist())
        assert (np.minimum(t0, t1) <= times).all()
        assert (times <= np.maximum(t0, t1)).all()
        return torch.sin(5 * x) * torch.tensor([[1.0], [3.0], [10.0], [0.0], [1.0], [2.0]], dtype=dtype)

    tolerance = Tolerance(5e-2, 5e-2) if dtype == torch.bfloat16 else None
    x0 = torch.ones(6, 1, dtype=dtype, requires_grad=True)
    solution = integrate(field, x0, t0, t1, control="sample", tolerance=tolerance, **options)
    np.testing.assert_array_equal(solution.t1.numpy(), t1)
    assert torch.equal(solution.x1[3], x0[3])


def test_a_sample_at_rest_stays_where_it_is_even_without_a_finite_velocity():
    """At its start, which is its end, and at the end that it has reached before the others."""
    t1 = torch.tensor([0.0, 1.0, 3.0], dtype=D)

    def field(t, x):
        pole = (t == t1[:, None]) & (t1[:, None] < 3)
        return torch.where(pole & (x != 1), torch.inf, torch.ones_like(x))

    x0 = torch.tensor([[5.0], [0.0], [0.0]], dtype=D)
    solution = integrate(field, x0, 0.0, t1, control="sample", solver="heun", keep="steps")
    torch.testing.assert_close(solution.x1, x0 + t1[:, None])
    assert torch.equal(solution(0.0), x0)


def test_the_times_of_the_solve_are_out_of_reach_of_the_field():
    def field(t, x):
        velocity = torch.cos(t) + 0 * x
        t.zero_()
        return velocity

    solution = integrate(field, torch.zeros(2, 1, dtype=D), 0.0, 2.0, control="sample", tolerance=TIGHT)
    torch.testing.assert_close(solution.x1, torch.full((2, 1), np.sin(2.0), dtype=D), rtol=1e-5, atol=0)


@pytest.mark.parametrize("t1", [1.1e-283, -1e-300, 1e-46])
def test_an_interval_below_the_resolution_of_float32_is_over_at_once(t1):
    ends = torch.tensor([t1, 1.0], dtype=D)
    solution = integrate(lambda t, x: -x, torch.ones(2, 1), 0.0, ends, control="sample", tolerance=TIGHT)
    torch.testing.assert_close(solution.x1, torch.tensor([[1.0], [np.exp(-1)]], dtype=torch.float32))
    assert solution.status == ("finished", "finished")


def test_a_controller_that_returns_no_states_is_named():
    class Wrong:
        def __call__(self, state, error, order):
            return state

        def each(self, states, error, order):
            return 0.1

    with pytest.raises(TypeError, match="controller must return SampleStates, got float"):
        integrate(swing, torch.ones(2, 3, dtype=D), 0.0, 1.0, control="sample", controller=Wrong())


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda t, x: x.mean(), r"event must return \(3, ...\) with control='sample', got shape \(\)"),
        (lambda t, x: x[:2, 0], r"got shape \(2,\)"),
        (lambda t, x: True, r"got shape \(\)"),
    ],
)
def test_events_per_sample_have_a_row_for_each(event, message):
    with pytest.raises(ValueError, match=message):
        integrate(swing, torch.ones(3, 3, dtype=D), 0.0, 1.0, control="sample", event=event)


def _of_a_number(t, x):
    return torch.cat([x, torch.full_like(x[:, :1], t)], 1)[:, 1:]


@pytest.mark.parametrize("field", [_of_a_number, lambda t, x: x if t < 0.5 else -x, lambda t, x: x * math.sin(t)])
def test_a_field_that_takes_its_time_for_a_number_is_told_what_it_is(field):
    with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
        integrate(field, torch.ones(3, 2), 0.0, 1.0, control="sample")
    assert "t is a tensor (3, 1), a time for each sample" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as caught:
        integrate(lambda t, x: x @ x, torch.ones(3, 2), 0.0, 1.0, control="sample")
    assert not hasattr(caught.value, "__notes__")
