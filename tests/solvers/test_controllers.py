import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import PI, PID, ControllerState, Fixed, HalveDouble, I
from solvers.controllers import SampleStates

STATE = ControllerState(0.1)


def test_fixed_keeps_h():
    assert Fixed()(STATE, math.inf, 2) == STATE


@pytest.mark.parametrize(
    ("error", "h", "accepted"),
    [(2.0, 0.05, False), (math.nan, 0.05, False), (1.0, 0.1, True), (0.13, 0.1, True), (0.12, 0.2, True)],
)
def test_halve_double(error, h, accepted):
    state = HalveDouble()(STATE, error, 2)
    assert (state.h, state.accepted) == (pytest.approx(h), accepted)


def test_i_uses_the_power_of_the_lower_order():
    assert I()(STATE, 0.5, 2).h == pytest.approx(0.1 * 0.9 * 0.5 ** (-1 / 3))
    assert I()(STATE, 0.0, 2).h == pytest.approx(0.5)
    assert I()(STATE, 1e9, 2).h == pytest.approx(0.02)
    assert I()(STATE, 1.0 + 1e-9, 2).accepted is False


@pytest.mark.parametrize("controller", [I(), PI(), PID()])
def test_limits(controller):
    for error in (math.nan, math.inf, 1e30):
        state = controller(STATE, error, 2)
        assert state.h == pytest.approx(0.02)
        assert not state.accepted
    rejected = STATE._replace(accepted=False)
    assert controller(rejected, 1e-9, 2).h <= STATE.h
    assert controller(STATE, 1e-30, 2).h <= 5 * STATE.h


def test_pid_reads_three_errors():
    state = ControllerState(0.1, True, (0.4, 0.7))
    after = PID(beta=(0.5, -0.3, 0.1))(state, 0.6, 2)
    assert after.h == pytest.approx(0.1 * 0.9 * 0.6 ** (-0.5 / 3) * 0.4 ** (0.3 / 3) * 0.7 ** (-0.1 / 3))
    assert after.errors == (0.6, 0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HalveDouble(K=1), "K must be greater than 1"),
        (lambda: I(safety=0), "safety must be in"),
        (lambda: PI(facmin=2), "need 0 < facmin < 1 <= facmax"),
    ],
)
def test_coefficients_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BEFORE, ERROR = st.floats(1e-12, 1), st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf, 0.0])


@settings(max_examples=60, deadline=None)
@given(
    controller=st.sampled_from([I(), PI(), PID(), PID(facmin=0.95), HalveDouble(), HalveDouble(3.0), Fixed()]),
    samples=st.lists(st.tuples(st.floats(1e-6, 10), st.booleans(), BEFORE, BEFORE, ERROR), min_size=1, max_size=5),
    order=st.integers(1, 4),
)
def test_each_sample_is_controlled_as_if_alone(controller, samples, order):
    h, accepted, last, before, error = (np.array(column) for column in zip(*samples, strict=True))
    result = controller.each(SampleStates(h, accepted, (last, before)), error, order)
    for i, (h, accepted, last, before, error) in enumerate(samples):
        one = controller(ControllerState(h, accepted, (last, before)), error, order)
        assert result.h[i] == pytest.approx(one.h, rel=1e-12)
        assert result.accepted[i] == one.accepted
        assert [e[i] for e in result.errors] == pytest.approx(one.errors)
