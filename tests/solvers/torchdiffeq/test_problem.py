import math
import warnings
from collections import Counter

import pytest
import torch
import torchdiffeq

from solvers import SolverError, odeint, odeint_adjoint
from tests.solvers.torchdiffeq.fields import D, Forced

Y = torch.ones(2)
T = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("grid", ["[0.0, 1.0]", "torch.tensor([0, 1])", "torch.tensor(0.5)"])
def test_what_is_no_grid_is_refused(grid):
    options = {"grid_constructor": lambda f, y, t: eval(grid)}
    with pytest.raises(TypeError, match="grid_constructor must return at least two times"):
        odeint(lambda t, y: -y, Y, T, method="rk4", options=options)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.6, 0.3, 1.0], "without turning back"),
        ([0.0, 0.5], r"must end at t\[-1\] = 1, got 0.5"),
        ([0.1, 1.0], r"must begin at t\[0\] = 0, got 0.1"),
    ],
)
def test_a_grid_goes_from_the_first_time_to_the_last(times, message):
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: -y, Y, T, method="rk4", options={"grid_constructor": lambda f, y, t: torch.tensor(times)})


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of_grid", [torch.float64, torch.float32])
@pytest.mark.parametrize("of_times", [torch.float64, torch.float32])
def test_a_callers_own_grid_of_any_precision(of_times, of_grid, dtype, backwards):
    """Its ends are those of t up to the rounding of either."""
    grid = torch.linspace(0.1, 0.9, 31, dtype=D)
    grid = grid.flip(0) if backwards else grid
    t = grid[[0, 7, 20, 30]].to(of_times)
    options = {"grid_constructor": lambda f, y, t: grid.to(of_grid)}
    result = odeint(lambda t, y: -y, torch.ones(1, dtype=dtype), t, method="rk4", options=options)
    expected = torch.exp(t[0].double() - t.double())[:, None]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    theirs = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=D), grid[[0, 7, 20, 30]], method="rk4")
    torch.testing.assert_close(result.double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_grid_constructor_gets_the_times_as_they_are():
    seen = []
    t = torch.tensor([0.1, 0.7], dtype=D)
    options = {"grid_constructor": lambda f, y, t: seen.append(t) or t}
    odeint(lambda t, y: -y, torch.ones(2), t, method="euler", options=options)
    assert seen[0].dtype == D
    assert torch.equal(seen[0], t)


def test_many_small_steps_end_at_the_last_time():
    t = torch.linspace(0.0, 0.59, 6)
    result = odeint(lambda t, y: -y, torch.ones(1), t, method="euler", options={"step_size": 1e-4})
    torch.testing.assert_close(result[:, 0], torch.exp(-t), rtol=2e-4, atol=0)


def test_stops_given_as_numbers_keep_their_precision():
    """0.3 is not the float32 next to it, and one number is as good as a list."""
    for value in ([0.3], 0.3, torch.tensor([0.3], dtype=D)):
        ends = []

        class Field(Forced):
            def callback_accept_step(self, t, y, h, ends=ends):
                ends.append((t + h).item())

        odeint(Field(), torch.ones(2, dtype=D), T.double(), options={"step_t": value})
        assert 0.3 in ends


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_callbacks_that_a_method_does_not_call_are_warned_about(method):
    class Watched(Forced):
        callback_step = callback_accept_step = callback_reject_step = staticmethod(lambda t, y, h: None)

    warned = []
    for solve in (odeint, torchdiffeq.odeint):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            solve(Watched(), torch.ones(2, dtype=D), T.double(), method=method)
        warned.append([str(w.message) for w in seen if "callback_accept_step" in str(w.message)])
    assert len(warned[0]) == len(warned[1]) == (method == "rk4")
    assert all("does not call callback_accept_step, callback_reject_step" in message for message in warned[0])


def test_callbacks_count_steps():
    counts = []
    for solve in (odeint, torchdiffeq.odeint):
        field, seen = Forced(), []
        for what in ("step", "accept_step", "reject_step"):
            setattr(field, f"callback_{what}", lambda t, y, h, what=what, seen=seen: seen.append((what, h > 0)))
        y0, t = torch.tensor([1.0, 0.5], dtype=D), torch.tensor([3.0, 0.0], dtype=D)
        options = {"first_step": 1.0, "step_t": t[-1:]}
        solve(field, y0, t, method="bosh3", rtol=1e-6, atol=1e-8, options=options)
        assert all(positive for what, positive in seen if what == "step")
        counts.append(Counter(what for what, _ in seen))
    assert counts[0] == counts[1]
    assert counts[0]["reject_step"] > 0
    assert counts[0]["step"] == counts[0]["accept_step"] + counts[0]["reject_step"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "radau"}, ValueError, "method 'radau' is not supported; supported are bosh3, dopri5"),
        ({"options": {"steps": 3}}, ValueError, r"options \['steps'\] are not supported by dopri5; supported are"),
        ({"options": {"step_size": 0.1}}, ValueError, r"options \['step_size'\] are not supported by dopri5"),
        ({"method": "rk4", "options": {"safety": 0.1}}, ValueError, "not supported by rk4"),
        ({"method": "rk4", "options": {"interp": "spline"}}, ValueError, "interp must be 'linear' or 'cubic'"),
        ({"method": "rk4", "options": {"step_size": -0.1}}, ValueError, "step_size must be positive"),
        (
            {"method": "rk4", "options": {"step_size": 0.1, "interp": "spline"}, "event_fn": lambda t, y: y - 0.5},
            ValueError,
            "interp must be 'linear' or 'cubic'",
        ),
        ({"rtol": math.nan}, ValueError, "rtol must be finite"),
        ({"atol": -1.0}, ValueError, "atol must be finite and not negative"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, ValueError, "strictly increasing or strictly decreasing"),
        ({"t": torch.tensor([0.0, 0.0])}, ValueError, "strictly increasing or strictly decreasing"),
        ({"t": torch.tensor([0, 1])}, TypeError, "t must be floating"),
        ({"t": 1.0}, TypeError, "t must be a tensor of times"),
        ({"t": [0.0, 1.0]}, TypeError, r"t must be a tensor of times, got list; make it one with torch.tensor\(t\)"),
        ({"y0": 1.0}, TypeError, "y0 must be a tensor, or a tuple or dictionary"),
        ({"func": lambda t, y: None}, TypeError, "func must return a tensor like y0, got NoneType"),
        ({"func": lambda t, y: None, "method": "rk4"}, TypeError, "func must return a tensor like y0, got NoneType"),
        ({"func": lambda t, y: (y,)}, TypeError, "func must return a tensor like y0, got tuple"),
        ({"func": lambda t, y: 0.0}, TypeError, "func must return a tensor like y0, got float"),
        ({"func": lambda t, y: 1j * y}, TypeError, "func must keep the dtype of y"),
        ({"func": lambda t, y: y[:1]}, ValueError, r"func must keep the shape of y: it returned \(1,\), y has \(2,\)"),
        (
            {"y0": (Y, Y), "func": lambda t, y: (y[0], None)},
            TypeError,
            r"func must hold tensors, got \['Tensor', 'None",
        ),
        ({"y0": (Y, Y), "func": lambda t, y: y[0]}, ValueError, "func must be a tuple of 2 tensors, got Tensor"),
        ({"rtol": [1e-3, 1e-3]}, TypeError, "rtol must be a number or a tensor that broadcasts against y0, got list"),
        ({"atol": torch.ones(3)}, ValueError, r"atol must broadcast against the state \(2,\), got \(3,\)"),
        ({"options": {"max_num_steps": 2}}, SolverError, "2 attempted steps .* raise max_num_steps"),
        ({"options": {"max_num_steps": 0}}, ValueError, "max_num_steps must be a whole number, at least 1, got 0"),
        ({"options": {"safety": 0.0}}, ValueError, "safety must be positive"),
        ({"options": {"ifactor": 0.5}}, ValueError, "ifactor must be at least 1"),
        ({"options": {"dfactor": 1.0}}, ValueError, "dfactor must be between 0 and 1"),
        ({"options": {"norm": "seminorm"}}, ValueError, "norm must be a function, got 'seminorm'"),
        ({"options": {"dtype": torch.bfloat16}}, ValueError, "dtype must be torch.float64 or torch.float32"),
        ({"options": {"step_t": [math.nan]}}, ValueError, "step_t must be finite"),
        ({"options": {"jump_t": T.clone().requires_grad_()}}, ValueError, "jump_t must not require a grad"),
        ({"method": "rk4", "options": {"norm": abs}}, ValueError, r"options \['norm'\] are not supported by rk4"),
        ({"method": "rk4", "options": {"step_size": 1e-12}}, ValueError, "step_size 1e-12 makes 1e[+]12 steps"),
        ({"method": "rk4", "options": {"grid_constructor": 0.1}}, TypeError, "grid_constructor must be a function"),
        ({"t": torch.tensor([0.0, math.inf])}, ValueError, "t must be finite"),
        ({"y0": [1.0]}, TypeError, "y0 must be a tensor, or a tuple or dictionary"),
        ({"y0": torch.ones(2, dtype=torch.long)}, TypeError, "y0 must be floating or complex"),
        ({"y0": torch.tensor([math.nan])}, ValueError, "y0 must be finite"),
        ({"y0": ()}, ValueError, "y0 must hold at least one number"),
        ({"func": lambda t, y: y.sum()}, ValueError, r"stage 0 has shape \(\)|keep the shape"),
        ({"func": lambda t, y: y.double()}, TypeError, "dtype"),
        ({"func": lambda t, y: y / 0}, SolverError, "not finite"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"func": lambda t, y: -y, "y0": Y, "t": T} | change
    with pytest.raises(error, match=message):
        odeint(arguments.pop("func"), arguments.pop("y0"), arguments.pop("t"), **arguments)


def test_times_too_far_apart_for_the_state_are_refused():
    with pytest.raises(ValueError, match=r"t must span a time that is finite in torch.float32, got 0 to 1e\+300"):
        odeint(lambda t, y: -y, Y, torch.tensor([0.0, 1e300], dtype=D), method="rk4")


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2", "dopri5"])
@pytest.mark.parametrize("stop", ["output", "step_t", "jump_t"])
def test_a_step_clipped_by_a_stop_is_no_underflow(method, stop):
    """Ten steps of 0.1 end a rounding before 1."""
    t = torch.tensor([0.0, 1.0, 2.0] if stop == "output" else [0.0, 2.0], dtype=torch.float64)
    options = {"max_step": 0.1, "first_step": 0.1} | ({} if stop == "output" else {stop: torch.tensor([1.0])})
    result = odeint(
        lambda t, y: -y, torch.ones(2, dtype=torch.float64), t, method=method, rtol=1e-2, atol=1e-2, options=options
    )
    torch.testing.assert_close(result[-1], torch.full((2,), math.exp(-2), dtype=torch.float64), rtol=1e-2, atol=0)


def test_jumps_are_not_crossed():
    times = []

    def field(t, y):
        times.append(t.item())
        return torch.where(t < 0.5, torch.ones_like(y), -2 * torch.ones_like(y))

    y = odeint(
        field, torch.zeros(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D), method="dopri5", rtol=1e-8, atol=1e-8,
        options={"jump_t": torch.tensor([0.5], dtype=D)},
    )  # fmt: skip
    assert y[-1].item() == pytest.approx(-0.5, abs=1e-12)
    assert 0.5 not in times


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_a_function_of_y_and_t_is_told_the_order(solve):
    class Exchanged(torch.nn.Module):
        def forward(self, y, t):
            return torch.sin(t) * y

    with pytest.raises(
        TypeError, match=r"func must take t and x.*\(y, t\) \(t is its first argument\); odeint calls func"
    ):
        solve(Exchanged(), torch.ones(5, 2), torch.tensor([0.0, 1.0]))
