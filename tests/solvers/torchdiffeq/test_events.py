import math

import pytest
import torch

from solvers import SolverError, odeint, odeint_adjoint, odeint_event
from solvers.packing import Packing
from solvers.torchdiffeq.problem import MAX_STEPS_TO_EVENT, make_task
from tests.solvers.torchdiffeq.fields import D, Forced

Y = torch.ones(2)
T = torch.tensor([0.0, 1.0])


def ball(t, state):
    _, speed = state
    return speed, torch.full_like(speed, -9.81)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "fehlberg2"])
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_event_time_and_its_gradient(interface, method):
    """A falling ball: it lands at t = (v + sqrt(v^2 + 2 g x)) / g."""

    def landing(x, v):
        t, states = odeint_event(
            ball, (x, v), torch.zeros((), dtype=D), event_fn=lambda t, s: s[0], method=method, rtol=1e-6, atol=1e-8,
            odeint_interface=interface, **({"adjoint_params": ()} if interface is odeint_adjoint else {}),
        )  # fmt: skip
        return torch.cat([t.reshape(1), states[0][-1], states[1][-1]])

    x = torch.tensor([10.0], dtype=D, requires_grad=True)
    v = torch.tensor([2.0], dtype=D, requires_grad=True)
    end = (v + (v * v + 2 * 9.81 * x).sqrt()) / 9.81
    torch.testing.assert_close(landing(x, v)[0], end[0], rtol=1e-8, atol=1e-8)
    for exact, i in ((end, 0), (v - 9.81 * end, 2)):
        expected = torch.autograd.grad(exact.sum(), (x, v), retain_graph=True)
        result = torch.autograd.grad(landing(x, v)[i], (x, v))
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


def test_events_of_fixed_methods_backwards_and_of_several_entries():
    start = torch.zeros((), dtype=D)
    t, y = odeint_event(
        lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=D), start,
        event_fn=lambda t, y: torch.cat([y + 0.5, y + 0.3]), reverse_time=True, method="rk4",
        options={"step_size": 0.2}, atol=1e-10,
    )  # fmt: skip
    assert t.item() == pytest.approx(-0.3, abs=1e-8)
    assert y[-1].item() == pytest.approx(-0.3, abs=1e-8)


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_event_times_have_the_precision_of_the_start_whatever_that_of_the_state(dtype, method, solve):
    at = 1000.123456789
    more = {"options": {"step_size": 0.1}} if method == "rk4" else {}
    more |= {"adjoint_params": ()} if solve is odeint_adjoint else {}
    time, _ = odeint_event(
        lambda t, y: torch.zeros_like(y), torch.zeros(1, dtype=dtype), torch.tensor(1000.0, dtype=D),
        event_fn=lambda t, y: t - at, method=method, rtol=1e-3, atol=1e-10, odeint_interface=solve, **more,
    )  # fmt: skip
    assert time.dtype == D
    assert time.item() == pytest.approx(at, abs=1e-9)


@pytest.mark.parametrize("start", [0.0, 0, torch.tensor(0.0)])
def test_the_start_of_an_event_may_be_a_number(start):
    time, _ = odeint_event(lambda t, y: -y, torch.ones(1), start, event_fn=lambda t, y: y - 0.5)
    assert time.item() == pytest.approx(math.log(2), rel=1e-5)


NEVER = [
    (lambda t, y: torch.zeros_like(y), {}, "no event before time overflows"),  # its steps grow without limit
    (lambda t, y: -y, {"options": {"max_num_steps": 200}}, "no event within 200 attempted steps"),
    (lambda t, y: torch.cos(t) + 0 * y, {"options": {"max_num_steps": 200}}, "raise max_num_steps, or check event_fn"),
    (lambda t, y: -y, {"method": "euler", "options": {"step_size": 0.1}}, "no event within 20000 steps: raise step"),
]


@pytest.mark.parametrize(("field", "options", "message"), NEVER)
def test_a_search_for_an_event_that_never_comes_ends(field, options, message):
    with pytest.raises((ValueError, SolverError), match=message):
        odeint_event(field, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y + 3, **options)


def test_an_adaptive_search_has_as_many_attempts_as_a_fixed_one():
    """And a solve five times as many, not 2^31."""
    assert MAX_STEPS_TO_EVENT == 20_000
    assert make_task(Forced(), Packing(Y), Y, T, 1e-3, 1e-3, None, None).tolerance.max_steps == 100_000


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_event_function_that_is_nan_is_no_event(method):
    options = {"step_size": 0.1} if method == "rk4" else {}
    with pytest.raises(ValueError, match="event_fn must not be NaN, as it is at t ="):
        odeint_event(
            lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: (0.7 - t).sqrt() + 1,
            method=method, options=options, rtol=1e-3, atol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "euler"])
def test_an_event_that_comes_and_goes_within_a_step_is_met(method, back, interface):
    """y = t, in steps that grow by ten times; the event lasts from 2.5 to 3.5."""
    options = {"step_size": 8.0} if method == "euler" else {"first_step": 1.0}
    time, y = odeint_event(
        lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=D), torch.tensor(0.0, dtype=D), reverse_time=back,
        event_fn=lambda t, y: torch.stack([(y - 3).abs() - 0.5, (y + 3).abs() - 0.5]), method=method, options=options,
        odeint_interface=interface, **({"adjoint_params": ()} if interface is odeint_adjoint else {}),
    )  # fmt: skip
    assert time.item() == pytest.approx(-2.5 if back else 2.5, abs=1e-6)
    assert y[-1].item() == pytest.approx(time.item(), abs=1e-6)


def test_an_event_that_is_stepped_over_is_named_with_its_remedy():  # its values overflow, and warnings are errors
    with pytest.raises(ValueError, match=r"no event before time overflows: give options=.'max_step': h"):
        odeint_event(
            lambda t, y: torch.ones_like(y), torch.zeros(1), 0.0, event_fn=lambda t, y: (y - 4.0) * (y - 4.001)
        )
