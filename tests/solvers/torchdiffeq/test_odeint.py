import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from solvers import odeint, odeint_adjoint
from tests.counting import NoDouble
from tests.solvers.torchdiffeq.fields import D, Forced, Lotka, VanDerPol

PROBLEMS = {"lotka": (Lotka, [1.0, 1.0]), "van der pol": (VanDerPol, [2.0, 0.0]), "forced": (Forced, [1.0, 0.5])}
THEIRS = {"rk4_38": "rk4"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "dopri8", "adaptive_heun", "fehlberg2"])
def test_adaptive_methods_agree_with_torchdiffeq(method, problem, backwards, dtype):
    make, start = PROBLEMS[problem]
    if (problem, backwards) == ("van der pol", True):
        pytest.skip("unstable backwards in time")
    field, y0 = make(), torch.tensor(start, dtype=dtype)
    t = torch.linspace(0.0, 2.0, 7, dtype=dtype)
    t = t.flip(0) if backwards else t
    rtol = 1e-4 if dtype == torch.float32 else 1e-7 if method not in ("adaptive_heun", "fehlberg2") else 1e-5
    with torch.no_grad():
        result = odeint(field, y0, t, method=method, rtol=rtol, atol=rtol / 10)
        expected = torchdiffeq.odeint(field, y0.double(), t.double(), method="dopri5", rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.double(), expected, rtol=300 * rtol, atol=300 * rtol)


@pytest.mark.parametrize("reference", ["torchdiffeq", "scipy"])
def test_dopri8_agrees_with_torchdiffeqs_and_with_scipys_dop853_at_tight_tolerance(reference):
    y0, t = torch.tensor([1.0, 0.5], dtype=D), torch.linspace(0.3, 4.3, 9, dtype=D)
    result = odeint(Forced(), y0, t, method="dopri8", rtol=1e-12, atol=1e-12)
    if reference == "torchdiffeq":
        options = {"step_t": t[1:]}  # at ends of steps, for their interpolant has a digit that is off
        expected = torchdiffeq.odeint(Forced(), y0, t, method="dopri8", rtol=1e-12, atol=1e-12, options=options)
    else:
        field = lambda t, y: Forced()(torch.tensor(t, dtype=D), torch.from_numpy(y)).detach().numpy()  # noqa: E731
        ends = t[0].item(), t[-1].item()
        solved = solve_ivp(field, ends, y0.numpy(), method="DOP853", t_eval=t.numpy(), rtol=1e-13, atol=1e-13)
        expected = torch.from_numpy(solved.y.T)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4_38"])
@pytest.mark.parametrize(
    "options", [{}, {"step_size": 0.07}, {"step_size": 0.07, "interp": "cubic"}, {"step_size": 0.05, "perturb": True}]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_fixed_methods_equal_torchdiffeq(method, options, backwards):
    t = torch.linspace(0.3, 1.3, 6, dtype=D)
    t = t.flip(0) if backwards else t
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    result = odeint(Forced(), y0, t, method=method, options=options)
    expected = torchdiffeq.odeint(Forced(), y0, t, method=THEIRS.get(method, method), options=options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_rk4_is_the_classic_one():
    t = torch.linspace(0.0, 1.0, 5, dtype=D)
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    theirs = torchdiffeq.odeint(Forced(), y0, t, method="rk4")
    assert (odeint(Forced(), y0, t, method="rk4") - theirs).abs().max() > 1e-6
    torch.testing.assert_close(odeint(Forced(), y0, t, method="rk4_38"), theirs)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_states_of_several_tensors(kind):
    a, b = torch.randn(3, 2, dtype=D), torch.randn(4, dtype=D)
    t = torch.linspace(0.0, 1.0, 4, dtype=D)

    def pair(t, state):
        a, b = state
        return torch.sin(a) * b.sum(), -b * t

    expected = torchdiffeq.odeint(pair, (a, b), t, method="bosh3", rtol=1e-8, atol=(1e-8, 1e-9))
    if kind == "tuple":
        result = odeint(pair, (a, b), t, method="bosh3", rtol=1e-8, atol=(1e-8, 1e-9))
    else:
        named = odeint(
            lambda t, s: dict(zip("ab", pair(t, (s["a"], s["b"])), strict=True)), {"a": a, "b": b}, t, method="bosh3",
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        result = (named["a"], named["b"])
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_on_exponential_decay(dtype):
    y0 = torch.ones(3, dtype=dtype)
    rate = 1j if dtype.is_complex else -1.0
    tolerance = {torch.complex128: 1e-8, torch.float32: 1e-5}.get(dtype, 1e-2)
    result = odeint(lambda t, y: rate * y, y0, torch.tensor([0.0, 1.0]), method="bosh3", rtol=tolerance, atol=tolerance)
    assert result.dtype == dtype
    expected = torch.exp(torch.tensor(rate * 1.0)).to(dtype).expand(3)
    torch.testing.assert_close(result[-1], expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("method", "options"), [("dopri5", {}), ("bosh3", {}), ("rk4", {"step_size": 0.11}), ("midpoint", {})]
)
def test_gradients_to_state_times_and_parameters(method, options):
    rates = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)
    y0 = torch.tensor([0.4, -0.2], dtype=D, requires_grad=True)
    t = torch.tensor([0.1, 0.3, 0.5], dtype=D, requires_grad=True)

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


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_the_field_is_asked_between_the_first_and_the_last_time_only(method, backwards):
    """As sqrt(1 - t), which is not defined beyond 1."""
    seen = []

    def field(t, y):
        seen.append(t.item())
        return torch.sqrt(1 - t) * torch.ones_like(y)

    t = torch.tensor([0.0, 0.4, 1.0], dtype=D)
    t = t.flip(0) if backwards else t
    result = odeint(field, torch.zeros(1, dtype=D), t, method=method, rtol=1e-5, atol=1e-5)
    exact = -2 / 3 * (1 - t) ** 1.5
    torch.testing.assert_close(result[:, 0], exact - exact[0], rtol=1e-3, atol=1e-4)
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
        result = solve(field, y0, t, method=method, options=options, **more)
        time, y = result if what == "event" else (None, result)
        (y[0] if what == "tuple" else y)[-1].sum().backward()
    assert field.rate.grad is not None
    if time is not None:
        assert time.item() == pytest.approx(math.log(2), abs=0.02 if method == "rk4" else 1e-3)


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
    result = odeint(lambda t, y: -y, y0, t, method=method, rtol=1e-6, atol=1e-8)
    decay = torch.exp(-(t - t[0])).reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(result, y0 * decay, rtol=1e-4, atol=1e-6)


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
    result = odeint(lambda t, y: -y, torch.ones(2, 3, dtype=dtype), t, method="rk4", options=options)
    assert result.shape == (3, 2, 3)
    expected = (-t.detach()).exp().to(dtype)[:, None, None].expand(3, 2, 3)
    torch.testing.assert_close(result.detach(), expected, rtol=3e-2, atol=1e-3)
