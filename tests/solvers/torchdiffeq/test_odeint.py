import math
import warnings

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from solvers import SolverError, odeint, odeint_adjoint, odeint_event
from solvers.packing import Packing
from solvers.torchdiffeq.problem import MAX_STEPS_TO_EVENT, make_task
from tests.counting import NoDouble

D = torch.float64
Y = torch.ones(2)
T = torch.tensor([0.0, 1.0])


class Lotka(nn.Module):
    """Prey and predator."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=D))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        a, b, c, d = self.rates.to(y.dtype)
        u, v = y.unbind(-1)
        return torch.stack([u * (a - b * v), v * (d * u - c)], -1)


class VanDerPol(nn.Module):
    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


class Forced(nn.Module):
    """Linear, not autonomous."""

    def forward(self, t, y):
        return -0.5 * y + torch.cos(3 * t) * y.new_tensor([1.0, -2.0])


PROBLEMS = {"lotka": (Lotka, [1.0, 1.0]), "van der pol": (VanDerPol, [2.0, 0.0]), "forced": (Forced, [1.0, 0.5])}
THEIRS = {"rk4_38": "rk4"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "adaptive_heun", "fehlberg2"])
def test_adaptive_methods_agree_with_torchdiffeq(method, problem, backwards, dtype):
    make, start = PROBLEMS[problem]
    if (problem, backwards) == ("van der pol", True):
        pytest.skip("unstable backwards in time")
    field, y0 = make(), torch.tensor(start, dtype=dtype)
    t = torch.linspace(0.0, 2.0, 7, dtype=dtype)
    t = t.flip(0) if backwards else t
    rtol = 1e-4 if dtype == torch.float32 else 1e-7 if method not in ("adaptive_heun", "fehlberg2") else 1e-5
    with torch.no_grad():
        found = odeint(field, y0, t, method=method, rtol=rtol, atol=rtol / 10)
        expected = torchdiffeq.odeint(field, y0.double(), t.double(), method="dopri5", rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.double(), expected, rtol=300 * rtol, atol=300 * rtol)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4_38"])
@pytest.mark.parametrize(
    "options",
    [{}, {"step_size": 0.07}, {"step_size": 0.07, "interp": "cubic"}, {"step_size": 0.05, "perturb": True}],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_fixed_methods_equal_torchdiffeq(method, options, backwards):
    t = torch.linspace(0.3, 1.3, 6, dtype=D)
    t = t.flip(0) if backwards else t
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    found = odeint(Forced(), y0, t, method=method, options=options)
    expected = torchdiffeq.odeint(Forced(), y0, t, method=THEIRS.get(method, method), options=options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rk4_is_the_classic_one():
    t = torch.linspace(0.0, 1.0, 5, dtype=D)
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    theirs = torchdiffeq.odeint(Forced(), y0, t, method="rk4")
    assert (odeint(Forced(), y0, t, method="rk4") - theirs).abs().max() > 1e-6
    torch.testing.assert_close(odeint(Forced(), y0, t, method="rk4_38"), theirs)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_bosh3_takes_as_many_evaluations_as_torchdiffeq(problem, rtol):
    """Told to end a step at the last time, as ``odeint`` does: else it steps past it."""
    make, start = PROBLEMS[problem]
    y0, t = torch.tensor(start, dtype=D), torch.tensor([0.0, 1.0, 5.0], dtype=D)
    counts = []
    for solve in (odeint, torchdiffeq.odeint):
        calls = [0]
        inner = make()

        def field(t, y, calls=calls, inner=inner):
            calls[0] += 1
            return inner(t, y)

        options = {"step_t": t[-1:]} if solve is torchdiffeq.odeint else {}
        solve(field, y0, t, method="bosh3", rtol=rtol, atol=rtol / 100, options=options)
        counts.append(calls[0])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_states_of_several_tensors(kind):
    a, b = torch.randn(3, 2, dtype=D), torch.randn(4, dtype=D)
    t = torch.linspace(0.0, 1.0, 4, dtype=D)

    def pair(t, state):
        a, b = state
        return torch.sin(a) * b.sum(), -b * t

    expected = torchdiffeq.odeint(pair, (a, b), t, method="bosh3", rtol=1e-8, atol=(1e-8, 1e-9))
    if kind == "tuple":
        found = odeint(pair, (a, b), t, method="bosh3", rtol=1e-8, atol=(1e-8, 1e-9))
    else:
        named = odeint(
            lambda t, s: dict(zip("ab", pair(t, (s["a"], s["b"])), strict=True)),
            {"a": a, "b": b},
            t,
            method="bosh3",
            rtol=1e-8,
            atol=1e-8,
        )
        found = (named["a"], named["b"])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_on_exponential_decay(dtype):
    y0 = torch.ones(3, dtype=dtype)
    rate = 1j if dtype.is_complex else -1.0
    tolerance = {torch.complex128: 1e-8, torch.float32: 1e-5}.get(dtype, 1e-2)
    found = odeint(lambda t, y: rate * y, y0, torch.tensor([0.0, 1.0]), method="bosh3", rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype
    expected = torch.exp(torch.tensor(rate * 1.0)).to(dtype).expand(3)
    torch.testing.assert_close(found[-1], expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("method", "options"), [("dopri5", {}), ("bosh3", {}), ("rk4", {"step_size": 0.11}), ("midpoint", {})]
)
def test_gradients_to_state_times_and_parameters(method, options):
    rates = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)
    y0 = torch.tensor([0.4, -0.2], dtype=D, requires_grad=True)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=D, requires_grad=True)

    def solve(y0, t, rates):
        return odeint(
            lambda s, y: torch.sin(rates * y + s), y0, t, method=method, options=options, rtol=1e-10, atol=1e-10
        )

    fixed = method in ("rk4", "midpoint")
    if not fixed:  # the true derivative: the solve is accurate, though its steps are chosen without gradient
        assert torch.autograd.gradcheck(solve, (y0, t, rates), atol=1e-5)
        times = torch.autograd.grad(solve(y0, t, rates)[-1].sum(), t)[0]
        ends = torch.sin(rates * solve(y0, t, rates)[-1] + t[-1]).sum()
        torch.testing.assert_close(times[-1], ends, rtol=1e-5, atol=1e-6)
    else:
        assert torch.autograd.gradcheck(solve, (y0, t, rates))
        assert torch.autograd.gradgradcheck(solve, (y0, t.detach(), rates))


def ball(t, state):
    _, speed = state
    return speed, torch.full_like(speed, -9.81)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "fehlberg2"])
def test_event_time_and_its_gradient(method):
    """A falling ball: it lands at t = (v + sqrt(v^2 + 2 g x)) / g."""

    def landing(x, v):
        t, states = odeint_event(
            ball, (x, v), torch.zeros((), dtype=D), event_fn=lambda t, s: s[0], method=method, rtol=1e-8, atol=1e-10
        )
        return torch.cat([t.reshape(1), states[0][-1], states[1][-1]])

    x = torch.tensor([10.0], dtype=D, requires_grad=True)
    v = torch.tensor([2.0], dtype=D, requires_grad=True)
    end = (v + (v * v + 2 * 9.81 * x).sqrt()) / 9.81
    torch.testing.assert_close(landing(x, v)[0], end[0], rtol=1e-8, atol=1e-8)
    for exact, i in ((end, 0), (v - 9.81 * end, 2)):
        expected = torch.autograd.grad(exact.sum(), (x, v), retain_graph=True)
        found = torch.autograd.grad(landing(x, v)[i], (x, v))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_events_of_fixed_methods_backwards_and_of_several_entries():
    start = torch.zeros((), dtype=D)
    t, y = odeint_event(
        lambda t, y: torch.ones_like(y),
        torch.zeros(1, dtype=D),
        start,
        event_fn=lambda t, y: torch.cat([y + 0.5, y + 0.3]),
        reverse_time=True,
        method="rk4",
        options={"step_size": 0.2},
        atol=1e-10,
    )
    assert t.item() == pytest.approx(-0.3, abs=1e-8)
    assert y[-1].item() == pytest.approx(-0.3, abs=1e-8)


def test_jumps_are_not_crossed():
    times = []

    def field(t, y):
        times.append(t.item())
        return torch.where(t < 0.5, torch.ones_like(y), -2 * torch.ones_like(y))

    y = odeint(
        field,
        torch.zeros(1, dtype=D),
        torch.tensor([0.0, 1.0], dtype=D),
        method="dopri5",
        rtol=1e-8,
        atol=1e-8,
        options={"jump_t": torch.tensor([0.5], dtype=D)},
    )
    assert y[-1].item() == pytest.approx(-0.5, abs=1e-12)
    assert 0.5 not in times


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
    found = odeint(lambda t, y: -y, torch.ones(1, dtype=dtype), t, method="rk4", options=options)
    expected = torch.exp(t[0].double() - t.double())[:, None]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    theirs = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=D), grid[[0, 7, 20, 30]], method="rk4")
    torch.testing.assert_close(found.double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_grid_constructor_gets_the_times_as_they_are():
    seen = []
    t = torch.tensor([0.1, 0.7], dtype=D)
    options = {"grid_constructor": lambda f, y, t: seen.append(t) or t}
    odeint(lambda t, y: -y, torch.ones(2), t, method="euler", options=options)
    assert seen[0].dtype == D
    assert torch.equal(seen[0], t)


def test_many_small_steps_end_at_the_last_time():
    t = torch.linspace(0.0, 0.59, 6)
    found = odeint(lambda t, y: -y, torch.ones(1), t, method="euler", options={"step_size": 1e-4})
    torch.testing.assert_close(found[:, 0], torch.exp(-t), rtol=2e-4, atol=0)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "adaptive_heun", "fehlberg2"])
def test_the_field_is_asked_between_the_first_and_the_last_time_only(method, backwards):
    """As sqrt(1 - t), which is not defined beyond 1."""
    seen = []

    def field(t, y):
        seen.append(t.item())
        return torch.sqrt(1 - t) * torch.ones_like(y)

    t = torch.tensor([0.0, 0.4, 1.0], dtype=D)
    t = t.flip(0) if backwards else t
    found = odeint(field, torch.zeros(1, dtype=D), t, method=method, rtol=1e-5, atol=1e-5)
    exact = -2 / 3 * (1 - t) ** 1.5
    torch.testing.assert_close(found[:, 0], exact - exact[0], rtol=1e-3, atol=1e-4)
    assert min(seen) >= 0
    assert max(seen) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_the_field_gets_times_of_the_states_precision_float32_at_least(method, dtype):
    seen = []
    t = torch.tensor([0.1, 0.7], dtype=D)
    odeint(lambda t, y: seen.append(t) or -y, torch.ones(2, dtype=dtype), t, method=method, rtol=1e-2, atol=1e-2)
    assert {time.dtype for time in seen} == {D if dtype == D else torch.float32}
    assert max(time.item() for time in seen) == pytest.approx(0.7, abs=1e-7)


def test_stops_given_as_numbers_keep_their_precision():
    """0.3 is not the float32 next to it, and one number is as good as a list."""
    for value in ([0.3], 0.3, torch.tensor([0.3], dtype=D)):
        ends = []

        class Field(Forced):
            def callback_accept_step(self, t, y, h, ends=ends):
                ends.append((t + h).item())

        odeint(Field(), torch.ones(2, dtype=D), T.double(), options={"step_t": value})
        assert 0.3 in ends


@pytest.mark.parametrize("what", ["plain", "times with gradients", "tuple", "event", "callbacks", "stops"])
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_no_tensor_is_in_float64_where_none_is_asked_for(method, solve, what):
    """In float32 with the option dtype, or by a fixed method."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

        def forward(self, t, y):
            return tuple(-self.rate * x for x in y) if isinstance(y, tuple) else -self.rate * y

    field, t, y0 = Field(), torch.tensor([0.0, 1.0]), torch.ones(2)
    options = {"step_size": 0.25} if method == "rk4" else {"dtype": torch.float32}
    more = {"rtol": 1e-3, "atol": 1e-4}
    if what == "times with gradients":
        t.requires_grad_()
    if what == "tuple":
        y0 = (torch.ones(2), torch.ones(1))
        more = {"rtol": (1e-3, 1e-2), "atol": 1e-4}
    if what == "event":
        more["event_fn"] = lambda t, y: y[0] - 0.5
    if what == "callbacks":
        field.callback_step = lambda t, y, h: more.setdefault("seen", (t, h)) and None
    if what == "stops" and method != "rk4":
        options |= {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.3])}
    with NoDouble():
        found = solve(field, y0, t, method=method, options=options, **more)
        time, y = found if what == "event" else (None, found)
        (y[0] if what == "tuple" else y)[-1].sum().backward()
    assert field.rate.grad is not None
    if time is not None:
        assert time.item() == pytest.approx(math.log(2), abs=0.02 if method == "rk4" else 1e-3)


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
    class Watched(Forced):
        def __init__(self):
            super().__init__()
            self.seen = {"step": 0, "accept": 0, "reject": 0}

        def callback_step(self, t0, y0, dt):
            assert dt > 0
            self.seen["step"] += 1

        def callback_accept_step(self, t0, y0, dt):
            self.seen["accept"] += 1

        def callback_reject_step(self, t0, y0, dt):
            self.seen["reject"] += 1

    counts = []
    for solve in (odeint, torchdiffeq.odeint):
        field = Watched()
        y0, t = torch.tensor([1.0, 0.5], dtype=D), torch.tensor([3.0, 0.0], dtype=D)
        options = {"first_step": 1.0, "step_t": t[-1:]}
        solve(field, y0, t, method="bosh3", rtol=1e-6, atol=1e-8, options=options)
        counts.append(field.seen)
    assert counts[0] == counts[1]
    assert counts[0]["reject"] > 0
    assert counts[0]["step"] == counts[0]["accept"] + counts[0]["reject"]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    times=st.lists(st.floats(-2, 2), min_size=2, max_size=5, unique=True),
    backwards=st.booleans(),
    method=st.sampled_from(["bosh3", "dopri5", "tsit5", "adaptive_heun"]),
)
def test_exponentials_of_any_shape_at_any_times(shape, times, backwards, method):
    t = torch.tensor(sorted(times, reverse=backwards), dtype=D)
    y0 = torch.rand(shape, dtype=D) + 0.5
    found = odeint(lambda t, y: -y, y0, t, method=method, rtol=1e-7, atol=1e-9)
    decay = torch.exp(-(t - t[0])).reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(found, y0 * decay, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "dopri8"}, ValueError, "method 'dopri8' is not supported; supported are bosh3, dopri5"),
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
        (
            {"options": {"jump_t": torch.tensor([0.5], requires_grad=True)}},
            ValueError,
            "jump_t must not require a grad",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["grid", "step size", "times with gradients"])
def test_no_output_is_lost_where_the_state_is_narrower_than_the_times(dtype, way):
    """0.7 in the state's precision lies before 0.7."""
    t = torch.tensor([0.0, 0.35, 0.7], dtype=torch.float64, requires_grad=way == "times with gradients")
    options = {"step_size": 0.1}
    if way == "grid":
        options = {
            "grid_constructor": lambda f, y, t: torch.stack([t[0], *(t[-1] * k / 7 for k in range(1, 7)), t[-1]])
        }
    found = odeint(lambda t, y: -y, torch.ones(2, 3, dtype=dtype), t, method="rk4", options=options)
    assert found.shape == (3, 2, 3)
    expected = (-t.detach()).exp().to(dtype)[:, None, None].expand(3, 2, 3)
    torch.testing.assert_close(found.detach(), expected, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2", "dopri5"])
@pytest.mark.parametrize("stop", ["output", "step_t", "jump_t"])
def test_a_step_clipped_by_a_stop_is_no_underflow(method, stop):
    """Ten steps of 0.1 end a rounding before 1."""
    t = torch.tensor([0.0, 1.0, 2.0] if stop == "output" else [0.0, 2.0], dtype=torch.float64)
    options = {"max_step": 0.1, "first_step": 0.1} | ({} if stop == "output" else {stop: torch.tensor([1.0])})
    found = odeint(
        lambda t, y: -y, torch.ones(2, dtype=torch.float64), t, method=method, rtol=1e-2, atol=1e-2, options=options
    )
    torch.testing.assert_close(found[-1], torch.full((2,), math.exp(-2), dtype=torch.float64), rtol=1e-2, atol=0)


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


def test_times_too_far_apart_for_the_state_are_refused():
    with pytest.raises(ValueError, match=r"t must span a time that is finite in torch.float32, got 0 to 1e\+300"):
        odeint(lambda t, y: -y, Y, torch.tensor([0.0, 1e300], dtype=D), method="rk4")
