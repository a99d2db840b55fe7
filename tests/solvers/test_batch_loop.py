import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from solvers import (
    ControllerState,
    Fixed,
    MaxStepsError,
    NonFiniteError,
    SolverError,
    StepUnderflowError,
    Tolerance,
    integrate,
)
from tests.counting import Counted, Operations
from tests.solvers.problems import CONTROLS, D, decay


@pytest.mark.parametrize("keep", ["last", "states", "steps"])
def test_evaluations_are_counted_and_the_closing_stage_reused(keep):
    x0 = torch.randn(3, 2, dtype=D)
    field = Counted(decay)
    fixed = integrate(field, x0, 0.0, 1.0, steps=10, keep=keep)
    assert fixed.stats.evaluations == field.calls == (31 if keep == "steps" else 30)
    field = Counted(decay)
    adaptive = integrate(field, x0, 0.0, 5.0, tolerance=Tolerance(first_step=1.0), keep=keep)
    stats = adaptive.stats
    assert stats.rejected > 0
    assert stats.evaluations == field.calls == 1 + 3 * (stats.accepted + stats.rejected)
    assert len(adaptive.steps) == (stats.accepted if keep == "steps" else 0)
    assert len(adaptive.states) == (1 if keep == "last" else 1 + stats.accepted)


def test_synchronizations():
    x0 = torch.randn(3, 2)
    with Operations() as operations:
        integrate(decay, x0, 0.0, 1.0, steps=10)
    assert operations.synchronizations == 0
    with Operations() as operations:
        solution = integrate(decay, x0, 0.0, 5.0, tolerance=Tolerance(first_step=0.1))
    attempts = solution.stats.accepted + solution.stats.rejected
    assert operations.synchronizations == attempts


def test_operations_per_attempted_adaptive_step():
    p = torch.randn(4, 3)
    field, ends, totals, attempts = (lambda t, x: p), (1.0, 2.0), [], []
    for end in ends:
        with Operations() as operations:
            solution = integrate(
                field, torch.ones(4, 3), 0.0, end, tolerance=Tolerance(first_step=0.1, max_step=0.1), keep="last"
            )
        totals.append(operations.total)
        attempts.append(solution.stats.accepted + solution.stats.rejected)
    assert (totals[1] - totals[0]) / (attempts[1] - attempts[0]) <= 17


def test_step_underflow_says_where_and_keeps_the_rest():
    blow_up = lambda t, x: x**2  # noqa: E731
    with pytest.raises(StepUnderflowError, match=r"last error ratio.*stiff.*t = 1.*, h = ") as caught:
        integrate(blow_up, torch.ones(1, 1, dtype=D), 0.0, 2.0)
    assert caught.value.t == pytest.approx(1.0, abs=1e-2)
    assert caught.value.solution.times[-1] == caught.value.t
    assert caught.value.solution.stats.accepted == len(caught.value.solution.states) - 1


def test_too_many_steps():
    with pytest.raises(MaxStepsError, match="5 attempted steps did not reach t1 = 10") as caught:
        integrate(decay, torch.ones(1, 1), 0.0, 10.0, tolerance=Tolerance(max_steps=5))
    assert caught.value.stage is None
    assert caught.value.solution.stats.accepted + caught.value.solution.stats.rejected == 5
    assert caught.value.solution.status == "max_steps"


def stiff(t, x):
    return -200.0 * (x - 1.0)


@pytest.mark.parametrize("options", CONTROLS)
@pytest.mark.parametrize("t0", [0.0, 0.3, -0.7, 967.1378944377053, 1e5 + 0.1])
@pytest.mark.parametrize("direction", [1, -1])
def test_a_step_that_asks_for_min_step_is_accepted(t0, direction, options):
    """Read back from the times it may differ from min_step by rounding."""
    field = Counted(lambda t, x: direction * stiff(t, x))
    tolerance = Tolerance(1e-6, 1e-6, min_step=0.2, max_steps=200)
    solution = integrate(field, torch.zeros(1, 1, dtype=D), t0, t0 + 3 * direction, tolerance=tolerance, **options)
    assert solution.stats.accepted <= 60


@pytest.mark.parametrize("options", CONTROLS)
def test_no_smaller_step_than_min_step_is_tried_where_the_field_is_not_finite(options):
    field = Counted(lambda t, x: torch.where(torch.as_tensor(t) > 0.5, torch.nan, torch.ones_like(x)))
    with pytest.raises(NonFiniteError, match="no smaller step avoids it"):
        integrate(field, torch.ones(1, 1), 0.0, 1.0, tolerance=Tolerance(min_step=0.01), **options)
    assert field.calls < 100


@dataclass(frozen=True)
class Stubborn:
    """Returns the same whatever the error."""

    h: float
    accepted: bool

    def __call__(self, state, error, order):
        return ControllerState(self.h, self.accepted)

    def each(self, states, error, order):
        full = np.full_like(states.h, self.h)
        return states._replace(h=full, accepted=np.full(full.shape, self.accepted))


@pytest.mark.parametrize("options", CONTROLS)
@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize(
    ("h", "error"),
    [(0.0, StepUnderflowError), (math.nan, ValueError), (-1.0, (ValueError, SolverError)), (1e-300, SolverError)],
)
def test_a_solve_ends_whatever_its_controller_returns(h, error, accepted, options):
    with pytest.raises(error):
        integrate(
            decay if not options else lambda t, x: -x, torch.ones(2, 1, dtype=D), 0.0, 1.0,
            controller=Stubborn(h, accepted), tolerance=Tolerance(max_steps=50), **options,
        )  # fmt: skip


@pytest.mark.parametrize("options", CONTROLS)
def test_infinite_steps_go_to_the_end(options):
    x0 = torch.ones(2, 1, dtype=D)
    solution = integrate(lambda t, x: 0 * x, x0, 0.0, 7.0, controller=Stubborn(math.inf, True), **options)
    assert torch.equal(solution.x1, x0)
    with pytest.raises(MaxStepsError):
        integrate(
            lambda t, x: 0 * x, x0, 0.0, 7.0, controller=Stubborn(math.inf, False), tolerance=Tolerance(max_steps=9),
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("options", CONTROLS)
@pytest.mark.parametrize("edge", [0.55, 0.95])
def test_accepted_steps_are_finite_whatever_accepts_them(edge, options):
    wall = lambda t, x: torch.where(torch.as_tensor(t) > edge, torch.nan, torch.ones_like(x))  # noqa: E731
    with pytest.raises(NonFiniteError, match="no smaller step avoids it"):
        integrate(wall, torch.ones(2, 1), 0.0, 1.0, controller=Fixed(), tolerance=Tolerance(first_step=0.1), **options)


@pytest.mark.parametrize("options", CONTROLS)
def test_a_field_that_vanishes_lets_steps_grow_to_a_far_end(options):
    x0 = torch.ones(2, 1)
    assert torch.equal(integrate(lambda t, x: 0 * x, x0, 0.0, 1e30, **options).x1, x0)
    with pytest.raises((NonFiniteError, MaxStepsError)):  # no number of float32 is as large as the steps there
        integrate(lambda t, x: 0 * x, x0, 0.0, 1e300, tolerance=Tolerance(max_steps=500), **options)


SHORT = [
    (0.0, 1.1e-283), (0.0, -5e-324), (1.0, math.nextafter(1.0, 2)), (-3.0, math.nextafter(-3.0, -9)), (2, 2 + 1e-9),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 2, "keep": "steps"}, *CONTROLS, {"solver": "heun"}])
@pytest.mark.parametrize(("t0", "t1"), SHORT)
def test_an_interval_below_the_resolution_of_time_is_over_at_once(t0, t1, options, dtype):
    x0 = torch.tensor([[0.5], [1.0]]).to(dtype)
    field = Counted(lambda t, x: -x * (1 + t))
    solution = integrate(field, x0, t0, t1, **options)
    torch.testing.assert_close(solution.x1, x0, rtol=1e-8 if dtype == D else 1e-6, atol=0)
    assert field.calls <= 10
    assert set(np.atleast_1d(solution.status)) == {"finished"}
    if "keep" in options:
        torch.testing.assert_close(solution((t0 + t1) / 2), x0)


@pytest.mark.parametrize("t0", [0.0, 0.1, -1.3, 1e8 + 0.3])
@pytest.mark.parametrize("length", [0.3, -0.7, 1e-7, 3.1])
def test_the_field_is_asked_within_the_interval(t0, length):
    """To the last bit: a step's end in floating point is not beyond t1."""
    t1 = t0 + length

    def field(t, x):
        assert min(t0, t1) <= t <= max(t0, t1)
        return torch.sin(3 * x)

    x0 = torch.ones(1, 1, dtype=D)
    for options in ({}, {"steps": 7}, {"steps": 3, "solver": "dopri5", "keep": "steps"}, {"solver": "heun"}):
        solution = integrate(field, x0, t0, t1, **options)
        assert solution.t1 == t1
        if "keep" in options:
            solution((t0 + t1) / 2)


def test_times_of_states_in_float32_are_float64():
    seen = []
    t0 = 1e8

    def field(t, x):
        seen.append(t - t0)
        return torch.full_like(x, math.cos(t - t0))

    for options in ({"steps": 8}, {}):
        solution = integrate(field, torch.zeros(1, 1), t0, t0 + 1, **options)
        assert solution.x1.item() == pytest.approx(math.sin(1), rel=1e-3)
    assert len({round(s, 6) for s in seen}) > 10


def test_the_first_stage_and_sample_that_are_not_finite_are_named():
    wall = lambda t, x: torch.where(x > 2, torch.nan, torch.ones_like(x))  # noqa: E731
    x0 = torch.tensor([[-9.0], [1.0]], dtype=D)
    with pytest.raises(NonFiniteError, match=r"no smaller step avoids it .*stage [123], sample 1\)") as caught:
        integrate(wall, x0, 0.0, 2.0, tolerance=Tolerance(max_step=0.3))
    assert caught.value.sample == 1
    assert caught.value.stage in (1, 2, 3)
    assert caught.value.t == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(NonFiniteError, match=r"first state.*stage 0, sample 1"):
        integrate(wall, 3 + x0, 0.0, 2.0)


@pytest.mark.parametrize("kind", [SolverError, StepUnderflowError, MaxStepsError, NonFiniteError])
def test_errors_come_whole_from_other_processes(kind):
    error = kind("what is wrong", t=0.5, h=0.1, stage=1, sample=2)
    error.solution = integrate(decay, torch.ones(1, 1, requires_grad=True), 0.0, 1.0, keep="steps")
    error.add_note("of a job")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert (copied.t, copied.h, copied.stage, copied.sample) == (0.5, 0.1, 1, 2)
    assert copied.__notes__ == ["of a job"]
    torch.testing.assert_close(copied.solution.x1, error.solution.x1)
    assert len(copied.solution.steps) == len(error.solution.steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_times_are_wider_than_narrow_states(dtype):
    seen = []

    def field(t, x):
        seen.append(t)
        return -x

    solution = integrate(field, torch.ones(2, 1, dtype=dtype), 0.0, 1.0, steps=1000, solver="euler", keep="states")
    assert seen == pytest.approx([i / 1000 for i in range(1000)], abs=1e-12)
    assert solution.x1.dtype == dtype
