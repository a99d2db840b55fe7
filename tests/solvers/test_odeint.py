import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from solvers import SolverError, odeint, odeint_event

D = torch.float64


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


Y = torch.ones(2)
T = torch.tensor([0.0, 1.0])


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
