import math

import numpy as np
import pytest
import torch

from solvers import Tolerance, integrate
from tests.counting import NoDouble
from tests.solvers.problems import D, constant, lotka

X0 = torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=D)


@pytest.mark.parametrize("steps", [None, 50])
@pytest.mark.parametrize("keep", ["last", "states", "steps"])
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "heun"])
def test_an_event_ends_the_solve(solver, keep, steps):
    fall = lambda t, x: torch.stack([x[:, 1], torch.full_like(x[:, 1], -9.81)], -1)  # noqa: E731
    x0 = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=D)
    tolerance = None if steps else Tolerance(1e-6, 1e-6)
    solution = integrate(
        fall, x0, 0.0, 3.0, event=lambda t, x: x[:, 0], solver=solver, steps=steps, tolerance=tolerance, keep=keep
    )
    exact = math.sqrt(2 / 9.81)
    assert solution.status == "event"
    assert solution.event_time.item() == pytest.approx(exact, rel=1e-6)
    assert solution.t1 == solution.event_time.item()
    assert solution.x1[1, 0].item() == pytest.approx(0, abs=1e-9)
    if keep == "steps":
        torch.testing.assert_close(solution(solution.t1), solution.x1)


def test_an_event_at_the_start_and_no_event():
    solution = integrate(lotka, X0, 0.0, 1.0, event=lambda t, x: x - 1)
    assert (solution.status, solution.t1, solution.stats.evaluations) == ("event", 0.0, 0)
    solution = integrate(lotka, X0, 0.0, 1.0, event=lambda t, x: x + 1)
    assert (solution.status, solution.event_time) == ("finished", None)


@pytest.mark.parametrize("t1", [2.0, 1e2, 1e6])
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_far_end_costs_an_event_no_precision(t1, control):
    fall = lambda t, x: torch.stack([x[..., 1], torch.full_like(x[..., 1], -9.81)], -1)  # noqa: E731
    solution = integrate(fall, torch.tensor([[1.0, 0.0]]), 0.0, t1, event=lambda t, x: x[:, 0], control=control)
    assert solution.event_time.item() == pytest.approx(math.sqrt(2 / 9.81), rel=1e-6)


def test_the_gradient_of_an_event_to_its_own_parameters():
    """Nothing else asks for one: e^-t = c at t = -ln c."""
    c = torch.tensor(0.5, requires_grad=True, dtype=D)
    solution = integrate(lambda t, x: -x, torch.ones(1, 1, dtype=D), 0.0, 2.0, event=lambda t, x: x[0, 0] - c)
    (gradient,) = torch.autograd.grad(solution.event_time, c)
    assert gradient.item() == pytest.approx(-2.0, rel=1e-3)


WAYS = [{}, {"solver": "dopri5"}, {"solver": "heun"}, {"gradient": "checkpoint"}, {"steps": 3}, {"control": "sample"}]
WAYS += [{"control": "sample", "solver": "heun"}, {"steps": 2, "solver": "rk4"}, {"steps": 2, "solver": "euler"}]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize(
    ("event", "first"),
    [
        (lambda t, x: (x + 0.1).sin()[:, 0], math.pi - 0.1),
        (lambda t, x: ((x - 1) * (x - 2) * (x - 3))[:, 0], 1.0),
        (lambda t, x: ((x - 1) * (x - 3))[:, 0], 1.0),  # of one sign at both ends of a long step
        (lambda t, x: ((x - 9) * (x - 9.5))[:, 0], 9.0),
        (lambda t, x: torch.cat([x - 5, x - 2], 1), 2.0),
        (lambda t, x: (2 * math.pi * x).cos()[:, 0], 0.25),
    ],
)
def test_the_first_of_several_changes_in_a_step_is_the_event(event, first, options):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, first), rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.x1, torch.full((2, 1), first, dtype=D), rtol=1e-9, atol=0)


def test_the_first_change_backwards_in_time():
    solution = integrate(constant, torch.full((1, 1), 10.0), 10.0, 0.0, event=lambda t, x: (x - 4) * (x - 6))
    assert solution.event_time.item() == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"control": "sample"}])
@pytest.mark.parametrize(
    "event",
    [
        lambda t, x: x[:, 0] > 3,
        lambda t, x: x[:, 0] < 3,
        lambda t, x: (x < 3)[:, 0].int(),
        lambda t, x: (3 - x).half(),
        lambda t, x: torch.stack([x < 7, x < 3], 1),
        lambda t, x: x.detach().numpy() - 3,
    ],
)
def test_events_of_any_type(event, options):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "event",
    [
        lambda t, x: bool(x.mean() < 3),
        lambda t, x: 3 - float(x.mean()),
        lambda t, x: x.mean() - 3,
        lambda t, x: np.float64(x.mean() - 3),
        lambda t, x: t < 3,
    ],
)
def test_an_event_of_the_batch_may_be_a_number(event):
    solution = integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event)
    assert solution.event_time.item() == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize(
    ("event", "error", "message"),
    [
        (lambda t, x: x + 1j, TypeError, "event must return real numbers or comparisons, got torch.complex128"),
        (lambda t, x: None, TypeError, "event must return a tensor or a number, got NoneType"),
        (lambda t, x: x[:0], ValueError, r"event must return .*got shape \(0, 1\)"),
        (lambda t, x: x * math.nan, ValueError, "event must return numbers, got NaN at t = 0"),
        (lambda t, x: 0.1 + (1 - x).sqrt(), ValueError, r"event must return numbers, got NaN at t = [1-9]"),
        (lambda t, x: x.sub_(1), ValueError, "event must not write into its input"),
    ],
)
def test_events_that_are_none(event, error, message, control):
    with pytest.raises(error, match=message):
        integrate(constant, torch.zeros(2, 1, dtype=D), 0.0, 15.0, event=event, control=control)


@pytest.mark.parametrize("options", [{}, {"control": "sample"}, {"gradient": "checkpoint"}, {"steps": 5}])
@pytest.mark.parametrize(
    "event", [lambda t, x: x[:, 0] > 2, lambda t, x: (x[:, 0] - 2).sign(), lambda t, x: x[:, 0].detach() - 2]
)
def test_an_event_without_slope_has_a_time_and_says_that_it_has_no_gradient(event, options):
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    x0 = torch.zeros(2, 1, dtype=D)
    solution = integrate(lambda t, x: rate * torch.ones_like(x), x0, 0.0, 15.0, event=event, **options)
    torch.testing.assert_close(solution.event_time, torch.full_like(solution.event_time, 2.0), rtol=1e-9, atol=0)
    for value in (solution.event_time, solution.x1):
        with pytest.raises(ValueError, match=r"event has no slope.*comparison"):
            value.sum().backward()


@pytest.mark.parametrize(
    "options", [*WAYS, {"keep": "steps"}, {"gradient": "backsolve"}, {"keep": "steps", "control": "sample"}]
)
@pytest.mark.parametrize("watched", [False, True])
def test_solves_on_a_device_without_float64(options, watched):
    field = torch.nn.Linear(2, 2)
    x0 = torch.ones(3, 2)
    event = {"event": lambda t, x: (x - 1).abs().amax(1) - 0.05} if watched else {}
    with NoDouble():
        solution = integrate(
            lambda t, x: field(x), x0, 0.0, 2.0, **options, **event,
            **({"parameters": field.parameters()} if options.get("gradient") == "backsolve" else {}),
        )  # fmt: skip
        solution.x1.sum().backward()
        if options.get("keep") == "steps":
            end = solution.t1.min() if isinstance(solution.t1, torch.Tensor) else solution.t1
            assert solution(end).isfinite().all()
    assert field.weight.grad.abs().sum() > 0
    plain = integrate(lambda t, x: field(x), x0, 0.0, 2.0, **options | {"gradient": "direct"}, **event)
    torch.testing.assert_close(solution.x1, plain.x1)
    if watched:
        assert solution.event_time.dtype == torch.float32
        assert plain.event_time.dtype == D


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_far_from_time_0_states_in_float32_have_events_and_dense_states_as_near_it(control):
    t0 = 1e8 + 0.125 if control == "batch" else 1000.125
    event = {"event": lambda t, x: x[:, 0] - 0.3}
    solution = integrate(constant, torch.zeros(2, 1), t0, t0 + 1, control=control, **event)
    torch.testing.assert_close(solution.event_time - t0, torch.full_like(solution.event_time, 0.3), rtol=1e-3, atol=0)
    dense = integrate(constant, torch.zeros(2, 1), t0, t0 + 1, control=control, keep="steps")
    for t in (0.2, 0.71):
        torch.testing.assert_close(dense(t0 + t), torch.full((2, 1), t), rtol=1e-4, atol=0)
        wide = dense(torch.tensor(t0 + t, dtype=D, requires_grad=True))
        torch.testing.assert_close(wide, torch.full((2, 1), t), rtol=1e-4, atol=0)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_an_event_that_is_zero_at_the_start_fires_there(control):
    """Without a gradient of its time; a comparison that holds at the start waits until it turns."""

    def thrown(t, x):
        return torch.stack([x[:, 1], torch.full_like(x[:, 1], -9.81)], 1)

    x0 = torch.tensor([[0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    solution = integrate(thrown, x0, 0.0, 10.0, event=lambda t, x: x[:, 0], control=control)
    assert float(solution.event_time) == 0
    assert not solution.event_time.requires_grad
    torch.testing.assert_close(solution.x1, x0)
    up = integrate(thrown, x0.detach(), 0.0, 10.0, event=lambda t, x: (x > 0).any(1), control=control)
    assert float(up.event_time) == pytest.approx(2 * 5 / 9.81)
